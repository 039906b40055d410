"""Numbers, durations, times, sizes, lines and tables of progress as they are shown."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.table import Table

from orchestrator.monitor.journal_summary import EpochMetrics
from orchestrator.monitor.run_status import RunSnapshot


def print_line(console: Console, text: str) -> None:
    """Print a text as it is, on one line."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


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


def format_bytes(number: float) -> str:
    """Format bytes as 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} PB"


def make_progress_table(last_column: str, title: str | None = None) -> Table:
    """Make an empty table of runs that fits 100 columns; names of models may fold, numbers are never cut."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("epoch", "loss", "top-1 %", "top-5 %", "images/s", last_column):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def format_metrics(row: EpochMetrics | RunSnapshot) -> tuple[str, str, str, str]:
    """Format the cells of loss, top-1 and top-5 error and images per second."""
    return (
        format_number(row.loss, ".3f"),
        format_number(row.top1_error, ".2f"),
        format_number(row.top5_error, ".2f"),
        format_number(row.images_per_second, ".0f"),
    )
