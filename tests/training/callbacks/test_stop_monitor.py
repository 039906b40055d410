"""The stop flag, later attempts and heartbeats."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.callbacks import watchdog
from orchestrator.training.callbacks.watchdog import StopMonitor


@pytest.fixture(autouse=True)
def _sharp_eye(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_SECONDS", "FENCE_SECONDS", "BEAT_SECONDS"):
        monkeypatch.setattr(watchdog, name, 0.005)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.005)
    return condition()


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
def test_a_successor_is_seen_and_outweighs_a_wish_to_stop(tmp_path: Path, how: str) -> None:
    one = StopMonitor(attempts.create_attempt(str(tmp_path), 1), str(tmp_path / "stop"), str(tmp_path / "000002.json"))
    file_io.write_bytes(str(tmp_path / "stop"), b"")
    assert until(lambda: one.request == "save-and-stop")
    if how == "attempt":
        attempts.create_attempt(str(tmp_path), 1)
    else:
        file_io.write_bytes(str(tmp_path / "000002.json"), b"")
    assert until(lambda: one.request == "superseded")
    one.on_end()


def test_not_to_know_is_not_to_stop(tmp_path: Path) -> None:
    one = StopMonitor(attempts.create_attempt(str(tmp_path), 1), "nonsense://nowhere/stop", "nonsense://nowhere/next")
    assert not until(lambda: one.request != "go-on", 0.1)
    one.on_end()


def test_signs_of_life_say_how_far_training_came(tmp_path: Path) -> None:
    attempt = attempts.create_attempt(str(tmp_path), 1)
    one = StopMonitor(attempt, str(tmp_path / "stop"), "")
    one.samples = 640
    beat = Path(attempt.folder, "000001.beat")
    assert until(lambda: beat.exists() and json.loads(beat.read_bytes())["samples"] == 640)
    one.on_end()
