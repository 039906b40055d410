"""Two sides that take turns on the machine: each side's clock, and that all of its processes stop."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import turns
from benchmarks.turns import Side, Stopwatch
from tests.support.launched import process_tree, until

# A process that starts another; both leave a file with the time in its name, many times a second.
_COUNTS = """
import subprocess, sys, time
from pathlib import Path
if len(sys.argv) == 3:
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:], "child"])
mine = Path(sys.argv[1]) / ("child" if len(sys.argv) == 4 else "parent")
mine.mkdir(parents=True)
for number in range(round(float(sys.argv[2]) / 0.01)):
    (mine / f"{time.time():.6f}").touch()
    time.sleep(0.01)
if len(sys.argv) == 3:
    child.wait()
"""


def test_a_stopwatch_stands_still_while_its_side_does(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch()
    for moment, note in ((10.0, watch.stopped), (10.5, watch.stopped), (14.0, watch.continued), (20.0, watch.stopped)):
        monkeypatch.setattr(time, "time", lambda moment=moment: moment)
        note()
    assert watch.between(5.0, 9.0) == 4.0  # before it was ever stopped
    assert watch.between(9.0, 12.0) == 1.0
    assert watch.between(11.0, 13.0) == 0.0
    assert watch.between(9.0, 15.0) == 2.0
    assert watch.between(15.0, 30.0) == 5.0  # stopped and not continued


class Counters:
    """A process and its child, and when each of them was at work."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        words = [sys.executable, "-c", _COUNTS, str(folder), str(seconds)]
        self.process = subprocess.Popen(words)
        self.side = Side(lambda: [self.process.pid] if self.process.poll() is None else [])
        until(lambda: all(self.moments(name) for name in ("parent", "child")), 20)

    def moments(self, name: str) -> list[float]:
        place = self.folder / name
        return sorted(float(path.name) for path in place.iterdir()) if place.exists() else []


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Counters, Counters]]:
    made = [Counters(tmp_path / name, seconds) for name, seconds in (("one", 3.0), ("other", 0.6))]
    yield made[0], made[1]
    for counters in made:
        for pid in process_tree(counters.process.pid)[::-1]:
            subprocess.run(["kill", "-KILL", str(pid)], check=False, capture_output=True)
        counters.process.wait()


@pytest.mark.process
def test_only_one_of_two_process_trees_works_at_a_time(two: tuple[Counters, Counters]) -> None:
    first, second = two
    second.side.stop()
    with turns.taken(first.side, 0.3, second.side, 0.2):
        assert first.process.wait(30) == 0
    assert second.process.wait(30) == 0
    for name in ("parent", "child"):
        # Where a clock stands still, its own processes do; some may write when the signal is on its way.
        for counters in two:
            still = [a for a, b in _stops(counters.side.watch) for at in counters.moments(name) if a + 0.05 < at < b]
            assert not still, f"{counters.folder.name}'s {name} worked on {len(still)} times when it was stopped"
        assert len(_stops(first.side.watch)) >= 2


def _stops(watch: Stopwatch) -> list[tuple[float, float]]:
    return list(zip(watch._edges[::2], watch._edges[1::2], strict=True))


@pytest.mark.process
def test_an_error_between_the_turns_is_raised_and_both_sides_continue(
    two: tuple[Counters, Counters], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    second.side.stop()
    monkeypatch.setattr(turns, "MOST_LOOKS", 0)
    with (
        pytest.raises(RuntimeError, match="faster than they can be stopped"),
        turns.taken(first.side, 1, second.side, 1),
    ):
        assert first.process.wait(30) == 0
    assert second.process.wait(30) == 0
