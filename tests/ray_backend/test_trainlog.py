"""What Ray Train's controllers say, of several runs in one process."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.logging.logging import LoggingManager

from orchestrator.ray_backend import fast_start, ray_env

LOGGER = logging.getLogger(fast_start.RAY_TRAIN_LOGGER)


@pytest.fixture(autouse=True)
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    kept = (list(LOGGER.handlers), LOGGER.level, LOGGER.propagate)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_worker_id=lambda: "0a"))
    monkeypatch.setattr(LoggingManager, "get_log_directory", lambda: str(tmp_path / "first"))
    monkeypatch.setenv(fast_start.STRUCTURED_LOGGING_VARIABLE, "0")
    yield tmp_path
    LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = kept


def say(run: str, words: str) -> None:
    with fast_start.patch_ray_train(), fast_start._label_logs(run):
        logging.getLogger(f"{fast_start.RAY_TRAIN_LOGGER}.v2.somewhere").info(words)


def lines(folder: Path) -> list[str]:
    return [line.split(" ", 2)[2] for line in (folder / "ray-train-app-controller-0a.log").read_text().splitlines()]


def test_each_line_names_its_run(session: Path) -> None:
    runs = [threading.Thread(target=say, args=(f"m{number}", "started")) for number in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(lines(session / "first")) == [f"INFO m{number}: started" for number in range(3)]


def test_nothing_reaches_the_screen(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = logging.StreamHandler()
    logging.getLogger().addHandler(shown)
    try:
        say("m1", "started")
    finally:
        logging.getLogger().removeHandler(shown)
    assert lines(session / "first") == ["INFO m1: started"]
    assert capsys.readouterr() == ("", "")


def test_another_session_of_ray_s_gets_a_file_of_its_own(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say("m1", "one")
    monkeypatch.setattr(LoggingManager, "get_log_directory", lambda: str(session / "second"))
    say("m1", "two")
    assert (lines(session / "first"), lines(session / "second")) == (["INFO m1: one"], ["INFO m1: two"])


def test_who_wants_ray_s_own_set_up_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast_start.STRUCTURED_LOGGING_VARIABLE, "1")
    before = list(LOGGER.handlers)
    say("m1", "started")
    assert LOGGER.handlers == before


def test_jobs_set_the_switch() -> None:
    assert ray_env._RAY_VARIABLES[fast_start.STRUCTURED_LOGGING_VARIABLE] == "0"
