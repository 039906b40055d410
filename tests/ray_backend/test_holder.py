import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from orchestrator.ray_backend import lease
from orchestrator.ray_backend.lease import LeaseOwner
from orchestrator.storage import file_io
from tests.support import drivers
from tests.support.damage import DAMAGED
from tests.support.launched import until


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


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(tmp_path: Path) -> None:
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
        until(held.is_stop_requested)
    finally:
        held.release()
