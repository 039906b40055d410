"""What a model's run costs besides training: `python benchmarks/startup.py [RUNS_FOLDER]`.

Reads the leases and journals of the runs that finished in their first attempt and prints, for each, the seconds from
the driver's decision to the first step, of training, and from the last step to the driver's free slot. Nothing is run.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from orchestrator.tracking import journal


def main() -> int:
    """Print a line for each run and the medians; the exit status."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ORCHESTRATOR_RUNS", "runs")).resolve()
    rows = {folder.name: row for folder in sorted((root / "models").glob("*")) if (row := measured(folder)) is not None}
    if not rows:
        print(f"{root}: no run that finished in its first attempt", file=sys.stderr)
        return 1
    print(f"{'run':42} {'start s':>8} {'train s':>8} {'end s':>8}")
    for name, row in rows.items():
        print(f"{name:42} " + " ".join(f"{seconds:8.1f}" for seconds in row))
    medians = (statistics.median(column) for column in zip(*rows.values(), strict=True))
    print(f"{'median':42} " + " ".join(f"{seconds:8.1f}" for seconds in medians))
    return 0


def measured(folder: Path) -> tuple[float, float, float] | None:
    """Seconds of start, training and end of a run; None when it did not finish in its first attempt."""
    lease, released = folder / "lease" / "000001.json", folder / "lease" / "000001.released"
    if not released.exists() or (folder / "attempts" / "000002.json").exists():
        return None
    events, _ = journal.read(str(folder / "journal"))
    times = {event.kind: event.time for event in events}
    if "finished" not in times:
        return None
    return (
        times["started"] - lease.stat().st_mtime,
        times["finished"] - times["started"],
        released.stat().st_mtime - times["finished"],
    )


if __name__ == "__main__":
    raise SystemExit(main())
