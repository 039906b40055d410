"""Which stores are opened beside other work, and how."""

import os
import threading
from pathlib import Path

import pytest

from orchestrator.tracking import connect
from orchestrator.tracking.tracker import TrackingError


def test_only_a_database_that_is_not_there_yet_is_opened_beside_the_work(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mlflow.db"
    uri = f"sqlite:///{path}"
    assert connect.will_create_database(uri)
    (tmp_path / "new").write_bytes(b"a file where the folder should be")
    assert not connect.will_create_database(uri)
    (tmp_path / "new").unlink()
    path.parent.mkdir()
    path.touch()
    assert not connect.will_create_database(uri), "what is there must be asked"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere" / "mlflow.db")
    assert not connect.will_create_database(uri)


def test_servers_are_always_asked() -> None:
    assert not connect.will_create_database("http://127.0.0.1:9")
    assert not connect.will_create_database("postgresql://127.0.0.1:9/x")


def test_a_uri_that_is_refused() -> None:
    with pytest.raises(TrackingError, match="folder"):
        connect.will_create_database("/tmp/mlruns")


def test_what_is_done_beside_comes_back_and_yields_to_other_work() -> None:
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found = connect.run_at_low_priority(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert found == connect.LOW_PRIORITY_NICE > mine
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
    with pytest.raises(ValueError, match="why"):
        connect.run_at_low_priority(lambda: int("why"))
