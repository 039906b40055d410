"""The tools that benchmarks measure with: verdicts, CPU seconds of children, pairing, pinning, failed parts."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from benchmarks import __main__ as runner
from benchmarks import frame
from benchmarks.frame import Figure

BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"


@pytest.mark.parametrize(
    ("figure", "line"),
    [
        (Figure("a.b", 0.8, at_least=0.8), "a.b 0.8 >=0.8 PASS"),
        (Figure("a.b", 0.7999, at_least=0.8), "a.b 0.7999 >=0.8 SHORT"),
        (Figure("a.b", 10.0, at_most=10), "a.b 10 <=10 PASS"),
        (Figure("a.b", 10.5, at_most=10), "a.b 10.5 <=10 SHORT"),
        (Figure("a.b", math.nan, at_most=10), "a.b nan <=10 SHORT"),
        (Figure("a.b", 1234.5), "a.b 1234 - INFO"),
    ],
)
def test_line(figure: Figure, line: str) -> None:
    assert figure.line() == line


def test_a_value_that_misses_its_goal_by_less_than_the_printed_digits_is_short() -> None:
    assert Figure("a.b", 0.79999999, at_least=0.8).line().endswith("SHORT")


def test_report_prints_each_figure_and_fails_when_one_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.report([Figure("one", 1.0), Figure("two", 2.0, at_least=1)]) == 0
    assert frame.report([Figure("one", 1.0, at_least=2), Figure("two", 2.0, at_least=1)]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["one 1 >=2 SHORT", "two 2 >=1 PASS"]


def test_a_benchmark_without_figures_is_no_success() -> None:
    assert frame.report([]) == 1


def test_ratio_pairs_the_rounds() -> None:
    # A slow spell in the second round meets both parts: the ratio stays, though the values do not.
    assert frame.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.process
def test_cpu_of_ended_children_and_their_children_counts() -> None:
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN.format(seconds=0.3)!r}], check=True)"
    taken = frame.cost(lambda: subprocess.run([sys.executable, "-c", nested], check=True))
    assert taken.cpu >= 0.28


@pytest.mark.process
def test_cpu_of_live_children_counts() -> None:
    code = BURN.format(seconds=0.3) + "print('done', flush=True)\nimport sys\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        before = frame.cpu_seconds()
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        alive = frame.cpu_seconds() - before
        process.stdin.close()
    # Nothing is lost, and nothing counted twice, when the child ends and is waited for.
    assert alive >= 0.2
    assert frame.cpu_seconds() - before >= alive - 0.02


def test_parts_run_in_turn_and_back() -> None:
    ran: list[str] = []
    measured = frame.interleaved({name: lambda name=name: ran.append(name) for name in "abc"}, 2)  # type: ignore[misc]
    assert "".join(ran) == "abccba"
    assert {name: len(costs) for name, costs in measured.items()} == {"a": 2, "b": 2, "c": 2}


def test_pinning_holds_threads_that_run_already_and_is_undone() -> None:
    before, stop = os.sched_getaffinity(0), threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True)
    thread.start()
    try:
        with frame.pinned(frame.cores(1)):
            assert os.sched_getaffinity(thread.native_id or 0) == set(frame.cores(1))
        assert os.sched_getaffinity(thread.native_id or 0) == before == os.sched_getaffinity(0)
    finally:
        stop.set()
        thread.join()


def test_memory_grows_with_the_bytes_in_use() -> None:
    before = frame.memory("VmRSS")
    block = b"x" * (64 * 2**20)
    assert frame.memory("VmRSS") - before > 32
    assert len(block) and frame.memory("VmHWM") >= frame.memory("VmRSS") - 1


@pytest.mark.process
def test_a_part_that_fails_in_its_process_raises_with_its_status() -> None:
    with pytest.raises(RuntimeError, match=r"benchmarks\.no_such_part .* status 1"):
        frame.child("no_such_part", "word")


def test_an_unknown_benchmark_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["dada"]) == 2
    assert "no benchmark 'dada'; there are data, large" in capsys.readouterr().err


@pytest.mark.parametrize(("statuses", "status"), [([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([0, -9], 1)])
def test_one_benchmark_that_is_short_or_dies_fails_the_whole_command(
    monkeypatch: pytest.MonkeyPatch, statuses: list[int], status: int
) -> None:
    class Ended:
        pid = 0

        def __init__(self, number: int) -> None:
            self.returncode = number

        def wait(self, _seconds: float) -> int:
            return self.returncode

        def poll(self) -> int:
            return self.returncode

    left: Iterator[int] = iter(statuses)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Ended(next(left)))
    assert runner.main(["plan", "memory"]) == status
