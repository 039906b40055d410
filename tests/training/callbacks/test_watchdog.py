"""The watchdog: which phases it ends, what it says, and what it leaves alone."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.data.sample_audit import AuditRecord
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.callbacks import watchdog
from orchestrator.training.callbacks.watchdog import StopMonitor, Watchdog
from orchestrator.training.config import PhaseTimeouts
from orchestrator.training.rank_sync import SyncReport, SyncResult


@pytest.fixture
def fired(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Causes, in place of this process's end."""
    causes: list[str] = []
    monkeypatch.setattr(watchdog, "PHASE_POLL_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", lambda status: time.sleep(0.2))
    return causes


def dog(fired: list[str], **limits: float) -> Watchdog:
    return Watchdog(PhaseTimeouts(**limits), lambda cause, stacks: fired.append(cause))


def until(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.005)
    return bool(condition())


def test_a_start_that_does_not_end(fired: list[str]) -> None:
    one = dog(fired, start_seconds=0.05)
    assert until(lambda: fired)
    one.on_end()
    assert "the phase 'start'" in fired[0]
    assert "limit 0.1 s" in fired[0]
    assert "test_watchdog.py" in fired[0], "it says where the training thread is"


def test_no_step(fired: list[str]) -> None:
    one = dog(fired, start_seconds=0.05, step_seconds=0.3)
    for _ in range(20):
        one.on_step_end()
        time.sleep(0.01)
    assert fired == []
    assert until(lambda: fired)
    one.on_end()
    assert "the phase 'step'" in fired[0]


def test_slow_steps_have_a_longer_limit(fired: list[str]) -> None:
    one = dog(fired, step_seconds=0.05, step_times=20)
    for _ in range(5):
        one.on_step_end()
        time.sleep(0.04)
    time.sleep(0.3)
    assert fired == [], "20 steps of 40 ms are not over"
    one.on_end()


def test_no_step_is_due_in_an_evaluation_and_it_has_its_own_limit(fired: list[str]) -> None:
    one = dog(fired, step_seconds=0.05, step_times=2)
    one.on_step_end()
    with one.watch_phase("evaluation", 10.0):
        time.sleep(0.2)
        assert fired == []
    one.on_step_end()
    with one.watch_phase("evaluation", 0.05):
        assert until(lambda: fired)
    one.on_end()
    assert "the phase 'evaluation'" in fired[0]


@contextmanager
def saving(by: Watchdog, limit: float) -> Iterator[None]:
    """A save in the background that does not end while the block runs."""
    release = threading.Event()

    def save() -> None:
        with by.watch_phase("save", limit):
            release.wait(10)

    saver = threading.Thread(target=save)
    saver.start()
    try:
        yield
    finally:
        release.set()
        saver.join()


def test_a_save_in_the_background_does_not_excuse_the_steps(fired: list[str]) -> None:
    one = dog(fired, step_seconds=0.1, step_times=2)
    one.on_step_end()
    with saving(one, 10.0):
        assert until(lambda: fired)
    one.on_end()
    assert "the phase 'step'" in fired[0]


def test_a_save_that_hangs(fired: list[str]) -> None:
    one = dog(fired)
    with saving(one, 0.05):
        assert until(lambda: fired)
    one.on_end()
    assert "the phase 'save'" in fired[0]


def test_a_stop_request_that_training_ignores(fired: list[str]) -> None:
    one = dog(fired, stop_seconds=0.1)
    one.on_step_end()
    one.expect_stop()
    assert until(lambda: fired)
    one.on_end()
    assert "the phase 'stop'" in fired[0]


def test_a_stop_request_waits_for_an_evaluation_and_ends_once_seen(fired: list[str]) -> None:
    one = dog(fired, stop_seconds=0.1)
    one.on_step_end()
    with one.watch_phase("evaluation", 10.0):
        one.expect_stop()
        time.sleep(0.2)
    one.on_sync(cast(Any, None), SyncResult(SyncReport(should_stop=1.0), AuditRecord(), []))
    time.sleep(0.2)
    one.on_end()
    assert fired == []


def test_storage_that_hangs_does_not_keep_a_process_from_ending(
    fired: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(watchdog, "REPORT_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    hangs = threading.Event()

    def tell(cause: str, stacks: str) -> None:
        hangs.wait(10)

    one = Watchdog(PhaseTimeouts(start_seconds=0.01), tell)
    assert ended.wait(5)
    one.on_end()
    hangs.set()


_HANGS = """
import time
from orchestrator.training.config import PhaseTimeouts
from orchestrator.training.callbacks.watchdog import Watchdog

def stuck():
    time.sleep(60)

Watchdog(PhaseTimeouts(start_seconds=0.1), lambda cause, stacks: print(cause, stacks, flush=True))
stuck()
"""


@pytest.mark.process
def test_a_process_that_hangs_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == watchdog.EXIT_STATUS
    assert "in stuck" in ended.stdout, "with the stacks of its threads"


def test_slow_steps_are_given_the_time_to_come_to_a_pulse(fired: list[str]) -> None:
    one = Watchdog(PhaseTimeouts(stop_seconds=0.05), lambda cause, stacks: fired.append(cause), pulse_steps=10)
    for _ in range(4):
        one.on_step_end()
        time.sleep(0.03)
    one.expect_stop()
    time.sleep(0.3)
    assert fired == [], "30 steps of 30 ms are not over"
    one.on_end()


def test_a_stop_request_waits_for_a_start(fired: list[str]) -> None:
    one = dog(fired, stop_seconds=0.1)
    one.expect_stop()
    time.sleep(0.3)
    assert fired == []
    one.on_step_end()
    assert until(lambda: fired)
    one.on_end()


def test_saves_of_two_kinds_are_watched_each_for_itself(fired: list[str]) -> None:
    one = dog(fired)

    def best() -> None:
        with one.watch_phase("save-best", 10.0):
            pass

    with saving(one, 0.2):
        other = threading.Thread(target=best)
        other.start()
        other.join()
        assert until(lambda: fired)
    one.on_end()
    assert "the phase 'save'" in fired[0]


def test_the_place_of_a_training_thread_that_has_ended_is_not_the_watchdogs(fired: list[str]) -> None:
    made: list[Watchdog] = []
    trainer = threading.Thread(target=lambda: made.append(dog(fired, start_seconds=0.01)))
    trainer.start()
    trainer.join()
    assert until(lambda: fired)
    made[0].on_end()
    assert fired[0].endswith("in a thread that has ended")


def test_a_cause_names_what_takes_long_in_other_threads(fired: list[str]) -> None:
    one = dog(fired, start_seconds=0.05)
    one.describe_slow_work = lambda: [f"sample {key!r}" for key in "abcde"]
    assert until(lambda: fired)
    one.on_end()
    assert fired[0].endswith("; meanwhile: sample 'a'; sample 'b'; sample 'c'")


# ------------------------------------------------------------------ the stop flag, later attempts and heartbeats
@pytest.fixture(autouse=True)
def _sharp_eye(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_SECONDS", "FENCE_SECONDS", "BEAT_SECONDS"):
        monkeypatch.setattr(watchdog, name, 0.005)


@pytest.mark.parametrize(
    ("flag", "wish"),
    [
        (b"", "save-and-stop"),
        (b'{"save": true}', "save-and-stop"),
        (b'{"save": false}', "stop"),
        (b"[]", "save-and-stop"),
    ],
)
def test_the_stop_flag_is_seen_and_what_it_says(tmp_path: Path, flag: bytes, wish: str) -> None:
    wishes: list[int] = []
    one = StopMonitor(attempts.create_attempt(str(tmp_path), 1), str(tmp_path / "stop"), "", lambda: wishes.append(1))
    assert not until(lambda: one.request != "go-on", 0.05)
    file_io.write_bytes(str(tmp_path / "stop"), flag)
    assert until(lambda: one.request == wish)
    assert until(lambda: wishes == [1])
    one.on_end()


@pytest.mark.parametrize("how", ["attempt", "driver"])
def test_a_successor_is_seen_and_outweighs_a_stop_request(tmp_path: Path, how: str) -> None:
    one = StopMonitor(attempts.create_attempt(str(tmp_path), 1), str(tmp_path / "stop"), str(tmp_path / "000002.json"))
    file_io.write_bytes(str(tmp_path / "stop"), b"")
    assert until(lambda: one.request == "save-and-stop")
    if how == "attempt":
        attempts.create_attempt(str(tmp_path), 1)
    else:
        file_io.write_bytes(str(tmp_path / "000002.json"), b"")
    assert until(lambda: one.request == "superseded")
    one.on_end()


def test_a_failed_poll_is_ignored(tmp_path: Path) -> None:
    one = StopMonitor(attempts.create_attempt(str(tmp_path), 1), "nonsense://nowhere/stop", "nonsense://nowhere/next")
    assert not until(lambda: one.request != "go-on", 0.1)
    one.on_end()


def test_the_heartbeat_has_the_samples(tmp_path: Path) -> None:
    attempt = attempts.create_attempt(str(tmp_path), 1)
    one = StopMonitor(attempt, str(tmp_path / "stop"), "")
    one.samples = 640
    beat = Path(attempt.folder, "000001.beat")
    assert until(lambda: beat.exists() and json.loads(beat.read_bytes())["samples"] == 640)
    one.on_end()
