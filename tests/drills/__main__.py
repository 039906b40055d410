"""Faults against real runs on this machine: `python -m tests.drills [NAME ...] [--seed N]`, all drills without a name.

Prints a line per drill, DRILL SECONDS REPLAYED PASS|FAIL (seconds from the fault to a new step, samples trained again;
- for what does not apply), and SKIP for what this machine does not permit; exit status 1 when one fails.
"""

from __future__ import annotations

import argparse
import random
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.drills import scenes, stage
from tests.drills.checks import Report
from tests.drills.scenes import Scene, Skipped


def main(words: list[str]) -> int:
    """Run the named drills; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=(__doc__ or "").split(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(scenes.SCENES)}; all by default")
    parser.add_argument("--seed", type=int, default=None, help="of the random points; another each time by default")
    parser.add_argument("--kills", type=int, default=20, help="faults of the random drill (default: 20)")
    options = parser.parse_args(words)
    if unknown := [name for name in options.names if name not in scenes.SCENES]:
        parser.error(f"no drill {unknown[0]!r}; there are {', '.join(scenes.SCENES)}")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    _say(f"seed {seed}")
    failed = False
    # A SIGTERM still ends the cluster and the runs.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="drills-") as folder, stage.cluster() as cluster:
        scene = Scene(cluster, Path(folder), random.Random(seed), options.kills)
        for name in options.names or scenes.SCENES:
            for report in _reports(name, scene):
                failed |= bool(report.problems)
                print(report.line(), flush=True)
                for problem in report.problems:
                    _say(f"{report.name}: {problem}")
    return 1 if failed else 0


def _reports(name: str, scene: Scene) -> Iterator[Report]:
    """Yield a drill's reports; an error that it raises becomes one of a failure."""
    _say(name)
    began = time.monotonic()
    try:
        yield from scenes.SCENES[name](scene)
    except Skipped as reason:
        print(f"{name} - - SKIP", flush=True)
        _say(f"{name}: skipped: {reason}")
    except Exception as error:  # a drill that breaks is a drill that failed; the others are still played
        traceback.print_exc()
        yield Report(name, problems=[f"{type(error).__name__}: {error}"])
    _say(f"{name}: {time.monotonic() - began:.0f} s in all")


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
