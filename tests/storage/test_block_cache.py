"""The node's cache: right bytes always, one download per node, bounded, harmless when the disk fails."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.storage import block_cache
from orchestrator.storage.block_cache import BlockCache
from orchestrator.storage.file_io import StorageError
from tests.support.launched import ROOT, until

BLOCK = 1000
DATA = bytes(range(256)) * 40  # ten blocks and a rest
URL, VERSION = "s3://b/object", "sha256"


class Source:
    """A source of bytes that records its requests."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, view: memoryview) -> None:
        self.asked.append((start, len(view)))
        view[:] = self.data[start : start + len(view)]


def read(cache: BlockCache, source: Source, start: int = 0, length: int = len(DATA), version: str = VERSION) -> bytes:
    data = bytearray(length)
    cache.read_into(URL, version, len(source.data), start, memoryview(data), source)
    return bytes(data)


def blocks(folder: Path) -> list[Path]:
    return sorted((folder / "orchestrator-cache" / "blocks").rglob("*.*"))


def held(folder: Path) -> int:
    """Bytes on disk, those being written included."""
    writing = (folder / "orchestrator-cache" / "writing").iterdir()
    return sum(path.stat().st_size for path in (*blocks(folder), *writing))


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(str(tmp_path), 100 * BLOCK, BLOCK)


# ------------------------------------------------------------------ bytes
def test_ranges_are_exact_and_each_block_is_fetched_once(cache: BlockCache) -> None:
    source = Source()
    for start, length in ((0, 1), (999, 2), (500, 3000), (len(DATA) - 1, 1), (0, len(DATA)), (7, 0)):
        assert read(cache, source, start, length) == DATA[start : start + length]
    assert sorted(source.asked) == [(start, min(BLOCK, len(DATA) - start)) for start in range(0, len(DATA), BLOCK)]
    assert cache.misses == len(source.asked) == 11
    source.asked.clear()
    hits = cache.hits
    assert read(cache, source) == DATA
    assert not source.asked
    assert cache.hits == hits + 11
    assert cache.disk_error is None


def test_versions_and_block_sizes_do_not_mix(cache: BlockCache, tmp_path: Path) -> None:
    other = Source(DATA[::-1])
    assert read(cache, Source()) == DATA
    assert read(cache, other, version="another") == DATA[::-1]
    assert read(BlockCache(str(tmp_path), 100 * BLOCK, BLOCK // 2), Source()) == DATA
    assert read(cache, Source()) == DATA


def test_a_quota_below_a_block_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 999 bytes"):
        BlockCache(str(tmp_path), BLOCK - 1, BLOCK)


def test_a_failed_fetch_is_raised_and_stores_nothing(cache: BlockCache, tmp_path: Path) -> None:
    def fail(start: int, view: memoryview) -> None:
        raise StorageError("the source is down")

    with pytest.raises(StorageError, match="source is down"):
        cache.read_into(URL, VERSION, len(DATA), 0, memoryview(bytearray(10)), fail)
    assert cache.disk_error is None, "an error of the source is not one of the cache"
    assert held(tmp_path) == 0
    assert read(cache, Source()) == DATA


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK + 1])
def test_a_block_of_another_size_is_fetched_again(cache: BlockCache, tmp_path: Path, size: int) -> None:
    read(cache, Source())
    for path in blocks(tmp_path):
        path.write_bytes(bytes(size))
    source = Source()
    assert read(cache, source) == DATA
    assert len(source.asked) == 11


def test_damaged_blocks_are_dropped(cache: BlockCache, tmp_path: Path) -> None:
    read(cache, Source())
    for path in blocks(tmp_path):
        path.write_bytes(b"x" * path.stat().st_size)
    assert read(cache, Source(), 2500, 10) == b"x" * 10
    cache.invalidate_range(URL, VERSION, 2500, 501)
    source = Source()
    assert read(cache, source, 2500, 501) == DATA[2500:3001]
    assert source.asked == [(2000, BLOCK), (3000, BLOCK)]
    cache.invalidate_range(URL, "never seen", 0, 10)


# ------------------------------------------------------------------ quota
def test_the_quota_holds_and_the_least_recent_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.storage.block_cache.TOUCH_INTERVAL_SECONDS", 0.0)
    cache, source = BlockCache(str(tmp_path), 4 * BLOCK, BLOCK), Source()
    for number in range(4):
        read(cache, source, number * BLOCK, BLOCK)
        age(tmp_path)
    read(cache, source, 0, BLOCK)  # used again: 1 is now the oldest
    read(cache, source, 4 * BLOCK, BLOCK)
    assert held(tmp_path) == 4 * BLOCK
    source.asked.clear()
    for number in (0, 2, 3, 4):
        read(cache, source, number * BLOCK, BLOCK)
    assert not source.asked
    read(cache, source, BLOCK, BLOCK)
    assert source.asked == [(BLOCK, BLOCK)]


def age(folder: Path, seconds: float = 100.0) -> None:
    """Let the last use of every block be longer ago."""
    for path in blocks(folder):
        last = path.stat().st_mtime - seconds
        os.utime(path, (last, last))


def test_a_clock_that_was_ahead_does_not_keep_blocks_for_ever(tmp_path: Path) -> None:
    cache, source = BlockCache(str(tmp_path), 4 * BLOCK, BLOCK), Source()
    read(cache, source, 0, 4 * BLOCK)
    age(tmp_path, -1e6)
    read(cache, source, 0, BLOCK)  # used under the right clock
    read(cache, source, 4 * BLOCK, 3 * BLOCK)
    source.asked.clear()
    read(cache, source, 0, BLOCK)
    read(cache, source, 4 * BLOCK, 3 * BLOCK)
    assert not source.asked, "those of the future went first"


def test_a_large_cache_frees_a_twentieth_at_a_time(tmp_path: Path) -> None:
    cache, source = BlockCache(str(tmp_path), 100, 1), Source(bytes(200))
    read(cache, source, 0, 101)
    assert held(tmp_path) == 95
    for end in range(102, 107):
        read(cache, source, end - 1, 1)
        assert held(tmp_path) == 95 + end - 101


def test_a_smaller_quota_is_adopted(tmp_path: Path) -> None:
    read(BlockCache(str(tmp_path), 100 * BLOCK, BLOCK), Source())
    cache = BlockCache(str(tmp_path), 3 * BLOCK, BLOCK)
    assert held(tmp_path) <= 3 * BLOCK
    assert read(cache, Source()) == DATA
    assert held(tmp_path) <= 3 * BLOCK
    assert cache.disk_error is None


def test_each_further_process_may_exceed_the_quota_by_a_twentieth(tmp_path: Path) -> None:
    caches = [BlockCache(str(tmp_path), 100, 1) for _ in range(3)]
    for start in range(0, 300, 3):
        for number, cache in enumerate(caches):
            read(cache, Source(bytes(300)), start + number, 1)
            assert held(tmp_path) <= 110
    assert held(tmp_path) > 90


def test_a_block_evicted_while_it_is_open_is_read(cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    read(cache, Source())
    preadv = os.preadv

    def evicted(file: int, views: list[memoryview], start: int) -> int:
        os.unlink(os.readlink(f"/proc/self/fd/{file}"))
        return preadv(file, views, start)

    monkeypatch.setattr(os, "preadv", evicted)
    source = Source()
    assert read(cache, source) == DATA
    assert not source.asked


# ------------------------------------------------------------------ errors of the disk
def test_a_full_disk_disables_the_cache(cache: BlockCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    read(cache, source, 0, BLOCK)

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert read(cache, source, BLOCK, 2 * BLOCK) == DATA[BLOCK : 3 * BLOCK]
    assert cache.disk_error is not None
    assert "No space left on device" in cache.disk_error
    assert str(tmp_path) in cache.disk_error
    assert held(tmp_path) == BLOCK, "nothing half-written is left"
    source.asked.clear()
    assert read(cache, source, 500, 5000) == DATA[500:5500]
    assert (1000, 1000) in source.asked
    assert source.asked[-1] == (5000, 500), "no more is fetched than is wanted"
    assert (0, 1000) not in source.asked, "what is there is still used"


@pytest.mark.parametrize("obstacle", ["file", "link", "below a file"])
def test_an_unusable_folder_disables_the_cache(tmp_path: Path, obstacle: str) -> None:
    folder = tmp_path / "folder"
    if obstacle == "below a file":
        folder.write_bytes(b"")
    else:
        folder.mkdir()
        (tmp_path / "elsewhere").mkdir()
        planted = folder / "orchestrator-cache"
        planted.write_bytes(b"") if obstacle == "file" else planted.symlink_to(tmp_path / "elsewhere")
    cache, source = BlockCache(str(folder), 100 * BLOCK, BLOCK), Source()
    assert cache.disk_error is not None
    assert str(folder) in cache.disk_error
    assert read(cache, source, 5, 10) == DATA[5:15]
    assert source.asked == [(5, 10)]
    cache.invalidate_range(URL, VERSION, 0, 10)
    assert obstacle != "link" or not list((tmp_path / "elsewhere").iterdir())


def test_the_folder_is_private_and_other_folders_keep_their_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "orchestrator-cache").mkdir(mode=0o777)
    (tmp_path / "orchestrator-cache").chmod(0o777)
    read(BlockCache(str(tmp_path), 100 * BLOCK, BLOCK), Source())
    assert (tmp_path / "orchestrator-cache").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in blocks(tmp_path))
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_cache_emptied_by_hand_is_still_read_through(cache: BlockCache, tmp_path: Path) -> None:
    read(cache, Source())
    (tmp_path / "orchestrator-cache").rename(tmp_path / "gone")
    for _ in range(3):
        assert read(cache, Source()) == DATA


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), 100 * BLOCK, BLOCK)
    writing = tmp_path / "orchestrator-cache" / "writing"
    for name, seconds in (("dead", block_cache.LEFTOVER_SECONDS + 1), ("alive", 10.0)):
        (writing / name).write_bytes(bytes(BLOCK))
        os.utime(writing / name, (time.time() - seconds,) * 2)
    BlockCache(str(tmp_path), 100 * BLOCK, BLOCK)
    assert [path.name for path in writing.iterdir()] == ["alive"]
    assert read(cache, Source()) == DATA


# ------------------------------------------------------------------ threads and processes
def test_threads_download_a_block_once(cache: BlockCache) -> None:
    source, ready = Source(), threading.Barrier(8)

    def slow(start: int, view: memoryview) -> None:
        source(start, view)
        time.sleep(0.05)

    def one(_: int) -> bytes:
        data = bytearray(3 * BLOCK)
        ready.wait(10)
        cache.read_into(URL, VERSION, len(DATA), 0, memoryview(data), slow)
        return bytes(data)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(one, range(8))) == {DATA[: 3 * BLOCK]}
    assert sorted(source.asked) == [(number * BLOCK, BLOCK) for number in range(3)]
    assert cache.misses == 3


def test_a_waiter_that_times_out_downloads_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "DOWNLOAD_WAIT_SECONDS", 0.05)
    caches = [BlockCache(str(tmp_path), 100 * BLOCK, BLOCK) for _ in range(2)]
    source, begun, done = Source(), threading.Event(), threading.Event()

    def stuck(start: int, view: memoryview) -> None:
        begun.set()
        assert done.wait(30)
        source(start, view)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(caches[0].read_into, URL, VERSION, len(DATA), 0, memoryview(bytearray(10)), stuck)
        assert begun.wait(10)
        assert read(caches[1], source, 0, 10) == DATA[:10]
        done.set()
        first.result(10)
    assert len(source.asked) == 2


# Downloads blocks slowly, noting each in a file; "stuck" hangs within the first.
CHILD = """
import sys, time, json
from orchestrator.storage.block_cache import BlockCache
folder, notes, mode = sys.argv[1:4]
data = bytes(range(256)) * 40
def fetch(start, view):
    with open(notes, "a") as file:
        file.write(json.dumps(start) + "\\n")
    time.sleep(600 if mode == "stuck" else 0.02)
    view[:] = data[start : start + len(view)]
cache, found = BlockCache(folder, 100_000, 1000), bytearray(len(data))
for start in range(0, len(data), 500):
    length = min(500, len(data) - start)
    cache.read_into("s3://b/object", "sha256", len(data), start, memoryview(found)[start : start + length], fetch)
assert found == data and cache.disk_error is None, cache.disk_error
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(mode: str = "") -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / "notes"), mode]
        started.append(subprocess.Popen(command, cwd=ROOT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(10)


def notes(folder: Path) -> list[int]:
    path = folder / "notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.process
def test_processes_download_a_block_once(tmp_path: Path, child: Callable[..., "subprocess.Popen[bytes]"]) -> None:
    for process in [child() for _ in range(3)]:
        assert process.wait(60) == 0
    assert sorted(notes(tmp_path)) == list(range(0, len(DATA), BLOCK))
    assert held(tmp_path) == len(DATA)


@pytest.mark.process
def test_a_killed_downloader_blocks_no_other_process(
    tmp_path: Path, child: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    dead = child("stuck")
    until(lambda: notes(tmp_path) == [0], 30)
    follower = child()
    # It waits for the first, which will never end, until that is killed.
    dead.send_signal(signal.SIGKILL)
    dead.wait(10)
    assert follower.wait(30) == 0
    assert sorted(notes(tmp_path)) == sorted([0, *range(0, len(DATA), BLOCK)])


def _hammer(folder: str, seed: int) -> None:
    cache, source = BlockCache(folder, 5 * BLOCK, BLOCK), Source()
    for turn in range(150):
        start = (seed * 7919 + turn * 4973) % (len(DATA) - 2500)
        assert read(cache, source, start, 2500) == DATA[start : start + 2500]
    assert cache.disk_error is None, cache.disk_error
    assert cache.hits


@pytest.mark.process
def test_processes_under_eviction_read_right_bytes_within_the_quota(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    num = 3
    processes = [context.Process(target=_hammer, args=(str(tmp_path), seed)) for seed in range(num)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        try:
            most = max(most, held(tmp_path))
        except FileNotFoundError:
            continue  # evicted while we looked
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * num
    assert held(tmp_path) <= (5 + num - 1) * BLOCK
    assert 0 < most <= (5 + num) * BLOCK
