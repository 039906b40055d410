import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.checkpoint.checkpoint_dir import make_checkpoint_url
from orchestrator.cli import stop
from orchestrator.cli.config import StopConfig
from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import lease
from orchestrator.ray_backend.lease import Lease, LeaseOwner
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.storage import commit, file_io
from orchestrator.training.run_dir import get_checkpoints_dir, get_outcome_path
from tests.support import drivers
from tests.support.launched import recipe, spec


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "POLL_SECONDS", 0.02)


@pytest.fixture
def run(tmp_path: Path) -> RunSpec:
    one = spec(recipe("net"), str(tmp_path))
    drivers.begun(one)
    return one


def ask_to_stop(of: str | list[str], storage: Path, save: bool = True, wait: float = 10.0) -> tuple[int, str]:
    out = io.StringIO()
    names = (of,) if isinstance(of, str) else tuple(of)
    status = stop.run_stop(
        StopConfig(runs=names, storage=str(storage), save=save, wait=wait), Console(width=100, file=out)
    )
    return status, out.getvalue()


class Driver:
    """Ends a lease, as a driver does, once it is asked to; keeps what it was asked."""

    def __init__(self, held: Lease, samples: int = 0) -> None:
        self.flag: bytes | None = None
        self._held, self._samples = held, samples
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def end(self) -> None:
        self._ended.set()
        self.thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            if file_io.exists(self._held.stop_flag):
                self.flag = file_io.read_bytes(self._held.stop_flag)
                break
        self._held.release()


@pytest.fixture
def driver(run: RunSpec) -> Iterator[Driver]:
    one = Driver(lease.acquire_lease(run.folder))
    yield one
    one.end()


def test_a_run_is_asked_and_waited_for(run: RunSpec, driver: Driver, tmp_path: Path) -> None:
    commit.write_folder(make_checkpoint_url(get_checkpoints_dir(run.folder), 640, 1), {}, {})
    file_io.write_bytes(make_checkpoint_url(get_checkpoints_dir(run.folder), 960, 1) + "/state.pt", b"half")
    file_io.write_bytes(get_outcome_path(run.folder), json.dumps({"status": "stopped"}).encode())
    status, text = ask_to_stop(run.name, tmp_path)
    assert (status, driver.flag) == (0, b"")
    asked, ended = text.splitlines()
    assert asked.startswith(f"{run.name}: run by process ")
    assert asked.endswith("s ago: asked to stop")
    assert ended == (
        f"{run.name}: ended; its last attempt ended as 'stopped'; its newest checkpoint is at 640 samples; "
        "rerun the command that started it to resume it"
    )
    assert ask_to_stop(run.name, tmp_path)[1].startswith(
        f"{run.name}: not running; its last attempt ended as 'stopped'; "
    )


def test_without_a_checkpoint_the_flag_says_so(run: RunSpec, driver: Driver, tmp_path: Path) -> None:
    assert ask_to_stop(run.name, tmp_path, save=False)[0] == 0
    assert driver.flag is not None
    assert json.loads(driver.flag) == {"save": False}


def test_an_ensemble_is_stopped_with_its_members(tmp_path: Path) -> None:
    members = [spec(recipe(f"net-m{number}"), str(tmp_path)) for number in (1, 2, 3)]
    folder = drivers.ensemble(str(tmp_path), "net-x3", members)
    running = [
        Driver(lease.acquire_lease(each)) for each in (folder, members[0].folder, members[1].folder)
    ]  # one waits
    try:
        status, text = ask_to_stop(folder, tmp_path, save=False)
        assert status == 0
        assert {one.flag for one in running} == {stop.STOP_WITHOUT_CHECKPOINT}
        assert [line.split(": ")[0] for line in text.splitlines()] == ["net-x3", "net-x3"]
        assert text.endswith("rerun the command that started it to resume it\n")
    finally:
        for one in running:
            one.end()


def test_the_members_of_an_ensemble_with_a_damaged_record_are_unknown(tmp_path: Path) -> None:
    folder = drivers.ensemble(str(tmp_path), "net-x2", [])
    file_io.write_bytes(file_io.join(folder, "ensemble.json"), b"{")
    text = ask_to_stop("net-x2", tmp_path)[1]
    assert text.startswith(f"net-x2: not running; it is unknown whether its members run: {folder}/ensemble.json: ")


def test_a_run_that_does_not_stop_in_time_is_reported_with_status_1(run: RunSpec, tmp_path: Path) -> None:
    drivers.lease(run.folder, beat=0)
    status, text = ask_to_stop(run.name, tmp_path, wait=0.1)
    assert status == 1
    assert f"{run.name}: still run by job raysubmit_abc, process 1 on another-host, since " in text
    assert "--wait" in text


def test_not_to_wait_is_no_failure(run: RunSpec, tmp_path: Path) -> None:
    stem = drivers.lease(run.folder, beat=0)
    status, text = ask_to_stop(run.name, tmp_path, wait=0)
    assert status == 0
    assert text.endswith("asked to stop; not waited for\n")
    assert file_io.exists(stem + ".stop")


def test_an_owner_without_heartbeats_counts_as_dead(run: RunSpec, tmp_path: Path) -> None:
    drivers.lease(run.folder, beat=5000)
    status, text = ask_to_stop(run.name, tmp_path)
    assert status == 0
    assert "last heartbeat 5000 s ago" in text
    assert "its driver died without releasing its lease (job raysubmit_abc, process 1 on another-host" in text


def test_a_dead_owner_on_this_machine_is_noticed_immediately(run: RunSpec, tmp_path: Path) -> None:
    drivers.lease(run.folder, LeaseOwner(socket.gethostname(), 2**22 + 1, "", time.time()), beat=0)
    status, text = ask_to_stop(run.name, tmp_path)
    assert status == 0
    assert "its driver died without releasing its lease" in text


def test_a_driver_that_took_over_is_left_alone(run: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers.lease(run.folder, beat=0)
    monkeypatch.setattr(time, "sleep", lambda _: drivers.lease(run.folder, number=2, beat=0))
    status, text = ask_to_stop(run.name, tmp_path)
    assert status == 0
    assert "another driver has taken it over" in text
    assert not file_io.exists(file_io.join(run.folder, "lease", "000002.stop"))


def test_storage_that_fails_for_a_moment_ends_no_wait(
    run: RunSpec, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = lease.read_lease, []

    def look(folder: str) -> object:
        calls.append(folder)
        if len(calls) == 2:
            raise file_io.StorageError("away")
        return real(folder)

    monkeypatch.setattr(lease, "read_lease", look)
    assert ask_to_stop(run.name, tmp_path)[0] == 0
    assert len(calls) > 2


def test_nothing_is_stopped_when_one_of_the_names_is_unknown(run: RunSpec, tmp_path: Path) -> None:
    stem = drivers.lease(run.folder, beat=0)
    with pytest.raises(ConfigError, match="'other': no such run"):
        ask_to_stop([run.name, "other"], tmp_path)
    assert not file_io.exists(stem + ".stop")
    with pytest.raises(ConfigError, match="at least one run"):
        ask_to_stop([], tmp_path)
