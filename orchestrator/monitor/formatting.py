"""Figures of a run out of its journal's events, and how they are shown. Importable without ray or torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from orchestrator.tracking.events import Event


@dataclass(frozen=True)
class EpochMetrics:
    """What an epoch's event tells; errors in percent, those of the averaged weights as soon as there are any."""

    epoch: int
    loss: float | None
    images_per_second: float | None
    top1_error: float | None
    top5_error: float | None
    goodput: float | None = None  # share of the run's time whose work counts


NO_METRICS = EpochMetrics(0, None, None, None, None)


def parse_epoch_metrics(event: Event) -> EpochMetrics:
    """The figures of an "epoch" event."""
    values = event.values
    kind = "averaged" if "validation/averaged_top1_error" in values else "raw"
    return EpochMetrics(
        parse_int(values.get("train/epoch")) or 0,
        parse_float(values.get("train/loss")),
        parse_float(values.get("train/images_per_second")),
        parse_float(values.get(f"validation/{kind}_top1_error")),
        parse_float(values.get(f"validation/{kind}_top5_error")),
        parse_float(values.get("train/goodput")),
    )


def parse_loss(event: Event) -> float | None:
    """Return the loss that an event tells: of the last steps at a point of the curves, of the epoch at its end.

    Journals of earlier versions have both under one name.
    """
    return parse_float(event.values.get("train/step_loss", event.values.get("train/loss")))


def parse_float(value: object) -> float | None:
    """The value if it is a number."""
    return float(value) if isinstance(value, int | float) else None


def parse_int(value: object) -> int | None:
    """Return the value as a whole number if it is a finite number."""
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def format_number(value: float | None, form: str) -> str:
    """The value in that format, or "-" when unknown."""
    return "-" if value is None else format(value, form)


def format_duration(seconds: float | None) -> str:
    """1:02:03, 2:03, or "-" when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_eta(seconds: float | None) -> str:
    """The local time in so many seconds, 14:35, with its day when that is not today; "-" when unknown."""
    if seconds is None:
        return "-"
    now = time.time()
    then, today = time.localtime(now + seconds), time.localtime(now)
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%b %d %H:%M", then)


def format_bytes(number: float | None) -> str:
    """Bytes as people say them: 1.2 GB; "-" when unknown."""
    if number is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} PB"
