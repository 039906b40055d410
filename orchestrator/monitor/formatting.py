"""Numbers, durations, times and sizes as they are shown."""

from __future__ import annotations

import math
import time


def format_number(value: float | None, spec: str) -> str:
    """Format a value, or "-" when it is unknown."""
    return "-" if value is None else format(value, spec)


def format_duration(seconds: float | None) -> str:
    """Format seconds as 1:02:03 or 2:03, or "-" when they are unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_eta(seconds: float | None) -> str:
    """Format the local time in so many seconds as 14:35, with its date when that is not today; "-" when unknown."""
    if seconds is None:
        return "-"
    now = time.time()
    then, today = time.localtime(now + seconds), time.localtime(now)
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%b %d %H:%M", then)


def format_bytes(number: float | None) -> str:
    """Format bytes as 1.2 GB, or "-" when they are unknown."""
    if number is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} PB"
