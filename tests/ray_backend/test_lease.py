"""Leases: who has them, who may take them over, and what others see of them."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ray.dashboard.modules.job.cli import job_cli_group

from orchestrator.ray_backend import lease
from orchestrator.ray_backend.lease import Lease, LeaseHeldError, LeaseOwner
from orchestrator.storage import file_io
from tests.support import drivers
from tests.support.damage import DAMAGED
from tests.support.launched import ROOT, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "run")


def foreign(folder: str, host: str = "another-host", pid: int = 1, job: str = "raysubmit_abc") -> str:
    """A lease of another driver; the stem of its files."""
    stem = file_io.join(folder, "lease", "000001")
    file_io.write_bytes(stem + ".json", json.dumps(asdict(LeaseOwner(host, pid, job, 0.0))).encode())
    return stem


def beating(stem: str, ended: threading.Event) -> threading.Thread:
    def beat() -> None:
        while not ended.wait(0.05):
            file_io.write_bytes(stem + ".beat", str(time.monotonic()).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    return thread


@pytest.mark.parametrize("record", DAMAGED)
def test_a_lease_that_cannot_be_read_is_held_as_long_as_it_beats(folder: str, record: bytes) -> None:
    stem = foreign(folder)
    file_io.write_bytes(stem + ".json", record)
    ended = threading.Event()
    thread = beating(stem, ended)
    try:
        with pytest.raises(LeaseHeldError, match=r"an unknown process \(its lease cannot be read\).*orchestrator stop"):
            lease.acquire_lease(folder, 60)
    finally:
        ended.set()
        thread.join()
    held = lease.acquire_lease(folder, 0.2)
    assert held.number == 2
    held.release()


def test_a_lease_of_a_newer_version_is_read(folder: str) -> None:
    stem = foreign(folder)
    about = asdict(LeaseOwner("another-host", 7, "raysubmit_abc", 1e9)) | {"region": {"name": "x"}}
    assert lease.parse_owner(json.dumps(about).encode()) == LeaseOwner("another-host", 7, "raysubmit_abc", 1e9)
    file_io.write_bytes(file_io.join(folder, "lease", "notes.json"), b"{}")  # of somebody else
    file_io.write_bytes(stem + ".json", json.dumps(about).encode())
    held = lease.acquire_lease(folder, 0.1)
    assert held.number == 2
    held.release()


@pytest.mark.parametrize(
    "change", [{"pid": 0}, {"pid": True}, {"pid": 2**40}, {"since": 1e300}, {"host": None}, {"job": 3}, {"since": "x"}]
)
def test_an_owner_that_cannot_be_is_unknown(change: dict[str, object]) -> None:
    assert lease.parse_owner(json.dumps(asdict(LeaseOwner("h", 1, "", 1.0)) | change).encode()) == lease.UNKNOWN_OWNER


def test_of_eight_threads_one_gets_the_lease(folder: str) -> None:
    barrier = threading.Barrier(8)

    def take(_: int) -> Lease | LeaseHeldError:
        barrier.wait()
        try:
            return lease.acquire_lease(folder, 2)
        except LeaseHeldError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(take, range(8)))
    held = [result for result in results if isinstance(result, Lease)]
    assert len(held) == 1
    assert held[0].number == 1
    held[0].release()


def test_a_released_lease_is_free_immediately(folder: str) -> None:
    lease.acquire_lease(folder).release()
    began = time.monotonic()
    second = lease.acquire_lease(folder, stale_seconds=20)
    assert time.monotonic() - began < 10
    assert second.number == 2
    second.release()


def test_release_ends_a_wait(folder: str) -> None:
    stem = foreign(folder)
    timer = threading.Timer(0.3, file_io.write_bytes, (stem + ".released", b""))
    timer.start()
    began = time.monotonic()
    held = lease.acquire_lease(folder, stale_seconds=20)
    assert time.monotonic() - began < 15
    held.release()
    timer.join()


def test_a_dead_process_of_this_host_frees_the_run_immediately(folder: str) -> None:
    import socket

    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    foreign(folder, socket.gethostname(), int(process.stdout))
    began = time.monotonic()
    held = lease.acquire_lease(folder, stale_seconds=20)
    assert time.monotonic() - began < 10
    assert held.number == 2
    held.release()


def test_a_silent_owner_elsewhere_is_dead_after_stale_seconds(folder: str) -> None:
    file_io.write_bytes(foreign(folder) + ".beat", b"the last one")
    began = time.monotonic()
    held = lease.acquire_lease(folder, stale_seconds=0.6)
    assert 0.6 <= time.monotonic() - began < 15
    held.release()


@pytest.mark.parametrize(
    ("job", "attach"), [("raysubmit_abc", "ray job logs --follow raysubmit_abc"), ("", "terminal")]
)
def test_a_beating_owner_keeps_it_and_is_named(folder: str, job: str, attach: str) -> None:
    stem, ended = foreign(folder, "node-7", 4242, job), threading.Event()
    thread = beating(stem, ended)
    try:
        with pytest.raises(LeaseHeldError) as raised:
            lease.acquire_lease(folder, stale_seconds=5)
    finally:
        ended.set()
        thread.join()
    text = str(raised.value)
    assert all(word in text for word in (folder, job, "process 4242 on node-7", attach))
    # What it suggests can be pasted into a shell.
    (line,) = re.findall(r"from anywhere: (.*)\) and submit again", text)
    assert shlex.split(line) == ["orchestrator", "stop", folder]
    for command in re.findall(r"ray job [^),]*", text):
        name, *arguments = shlex.split(command)[2:]
        assert job_cli_group.commands[name].make_context(name, arguments).params["job_id"] == job
    assert file_io.list_names(file_io.join(folder, "lease")) == ["000001.beat", "000001.json"]


def test_a_held_lease_beats_until_it_is_released(folder: str) -> None:
    held = lease.acquire_lease(folder)
    beat = file_io.join(folder, "lease", "000001.beat")
    first = file_io.read_bytes(beat)
    until(lambda: file_io.read_bytes(beat) != first)
    held.release()
    last = file_io.read_bytes(beat)
    time.sleep(0.2)
    assert file_io.read_bytes(beat) == last


def test_the_stop_flag_is_of_one_lease_alone(folder: str) -> None:
    first = lease.acquire_lease(folder)
    assert not file_io.exists(first.stop_flag)
    first.request_stop()
    assert file_io.exists(first.stop_flag)
    assert file_io.exists(first.stop_flag)
    first.release()
    second = lease.acquire_lease(folder)
    assert not file_io.exists(second.stop_flag)
    second.release()


def test_a_heartbeat_survives_storage_that_fails_for_a_while(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = lease.acquire_lease(folder)
    write, failures = file_io.write_bytes, [OSError("away")] * 3

    def flaky(url: str, data: bytes) -> None:
        if failures and url.endswith(".beat"):
            raise failures.pop()
        write(url, data)

    monkeypatch.setattr(file_io, "write_bytes", flaky)
    until(lambda: not failures)
    beat = file_io.read_bytes(file_io.join(folder, "lease", "000001.beat"))
    until(lambda: file_io.read_bytes(file_io.join(folder, "lease", "000001.beat")) != beat)
    held.release()
    assert "heartbeat not written" in caplog.text


@pytest.mark.process
def test_a_killed_owner_of_this_host_leaves_the_run_free(folder: str) -> None:
    code = f"import time; from orchestrator.ray_backend import lease; lease.acquire_lease({folder!r})"
    code += "; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(LeaseHeldError, match=f"process {process.pid} on"):
            lease.acquire_lease(folder)
        process.kill()
    held = lease.acquire_lease(folder)
    assert held.number == 2
    assert held.stop_flag.endswith("000002.stop")
    held.release()


def test_this_process_is_named_as_an_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert lease.get_current_owner().job == ""
    config = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_xyz", "job_name": "raysubmit_xyz"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    assert (lease.get_current_owner().job, lease.get_current_owner().pid) == ("raysubmit_xyz", os.getpid())


def test_an_owner_that_was_superseded_stops(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    held = lease.acquire_lease(folder)
    assert not file_io.exists(held.stop_flag)
    assert file_io.create_bytes(file_io.join(folder, "lease", f"{held.number + 1:06d}.json"), b"another driver")
    deadline = time.monotonic() + 5
    while not file_io.exists(held.stop_flag):
        assert time.monotonic() < deadline, "it continues under a lease that another has"
        time.sleep(0.01)
    held.release()


def test_a_process_of_another_container_on_this_host_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Containers on the host's network share its name; their process numbers are their own."""
    elsewhere = replace(lease.get_current_owner(), pid=2**22 + 1, space="the same boot, another namespace")
    assert not elsewhere.is_dead
    assert replace(elsewhere, space=lease.get_current_owner().space).is_dead


# ------------------------------------------------------------------ a lease as others see it
def lives(folder: str, patience: float = 0.3) -> bool:
    return lease.is_driver_alive(folder, lease.read_lease(folder), patience)


def test_a_real_lease_is_seen_and_its_release_too(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert lease.read_lease(folder) is None
    assert not lives(folder)
    held = lease.acquire_lease(folder)
    try:
        seen = lease.read_lease(folder)
        assert seen is not None
        assert (seen.number, seen.owner.pid, seen.released, seen.stop_requested) == (1, os.getpid(), False, False)
        assert seen.stop_flag == held.stop_flag
        assert lives(folder)
        held.request_stop()
        assert (again := lease.read_lease(folder)) is not None and again.stop_requested
    finally:
        held.release()
    assert not lives(folder)


def test_the_last_lease_counts(tmp_path: Path) -> None:
    drivers.lease(str(tmp_path), number=1, beat=0, released=b"")
    drivers.lease(str(tmp_path), number=2, beat=0)
    seen = lease.read_lease(str(tmp_path))
    assert seen is not None and (seen.number, seen.released) == (2, False)


def test_a_fresh_heartbeat_is_believed_and_an_old_one_looked_at_twice(tmp_path: Path) -> None:
    stem = drivers.lease(str(tmp_path), beat=3)
    assert lives(str(tmp_path))
    drivers.beats(stem, ago=100)
    assert not lives(str(tmp_path))
    # A clock that is behind: the heartbeat is old and changes.
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            drivers.beats(stem, ago=100)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert lives(str(tmp_path), patience=5)
    finally:
        ended.set()
        thread.join()


def test_a_heartbeat_of_long_ago_is_not_waited_for(tmp_path: Path) -> None:
    drivers.lease(str(tmp_path), beat=3600)
    began = time.monotonic()
    assert not lives(str(tmp_path), patience=60)
    assert time.monotonic() - began < 30


def test_a_process_of_this_machine_that_is_gone_is_dead_immediately(tmp_path: Path) -> None:
    gone = LeaseOwner(socket.gethostname(), 2**22 + 1, "", time.time())  # beyond the largest pid there is
    drivers.lease(str(tmp_path), gone, beat=0)
    assert not lives(str(tmp_path), patience=60)


def test_a_lease_without_a_heartbeat_yet_is_as_old_as_itself(tmp_path: Path) -> None:
    drivers.lease(str(tmp_path), LeaseOwner("another-host", 1, "", time.time()))
    assert lives(str(tmp_path), patience=60)


@pytest.mark.parametrize("record", [*DAMAGED, json.dumps({"host": "x"}).encode()])
def test_a_lease_that_cannot_be_read_lives_as_long_as_it_beats(tmp_path: Path, record: bytes) -> None:
    stem = drivers.lease(str(tmp_path))
    file_io.write_bytes(stem + ".json", record)
    seen = lease.read_lease(str(tmp_path))
    assert seen is not None and "cannot be read" in str(seen.owner)
    assert not lives(str(tmp_path)), "nothing says that anybody has it"
    drivers.beats(stem, 1)
    assert lives(str(tmp_path))
    drivers.beats(stem, 10_000)
    assert not lives(str(tmp_path))


@pytest.mark.parametrize("beat", DAMAGED[1:])  # an empty one is as good as none
def test_a_heartbeat_that_cannot_be_read_is_watched_for_a_change(tmp_path: Path, beat: bytes) -> None:
    stem = drivers.lease(str(tmp_path))
    file_io.write_bytes(stem + ".beat", beat)
    assert not lives(str(tmp_path))
    writer = threading.Timer(0.2, drivers.beats, (stem, 1))
    writer.start()
    assert lives(str(tmp_path), patience=60)
    writer.join()


def test_a_wish_for_no_checkpoint_is_not_overwritten_by_the_driver(tmp_path: Path) -> None:
    held = lease.acquire_lease(str(tmp_path))
    try:
        file_io.write_bytes(held.stop_flag, b'{"save": false}')
        held.request_stop()
        assert file_io.read_bytes(held.stop_flag) == b'{"save": false}'
        until(lambda: file_io.exists(held.stop_flag))
    finally:
        held.release()
