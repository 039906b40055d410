"""A node's LRU cache of remote objects: aligned blocks on local disk, shared by all processes, bounded.

After a disk error the cache stores nothing more, keeps the error in `disk_error`, and reads go to the source. Blocks
are renamed into place without fsync, since a cache is not worth the wait. After a crash of the machine a block may be
short, which is detected here, or hold anything, which the reader's checksums detect; it then calls `invalidate_range`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

BLOCK_BYTES = 4 * 2**20
# Longer than a block's download takes; a process that has waited so long downloads the block as well.
DOWNLOAD_WAIT_SECONDS = 60.0
# A use is recorded once in so many seconds, so that most reads write nothing.
TOUCH_INTERVAL_SECONDS = 30.0

FetchFn = Callable[[int, memoryview], None]


class BlockCache:
    """One process's access to the node's cache, for any thread and for forked children.

    `hits` and `misses` count blocks, `bytes` those served from disk; `disk_error` is the reason why nothing is stored
    any more. At most one block per process exceeds the quota, while it is written.
    """

    def __init__(
        self, folder: str, quota_bytes: int, block_bytes: int = BLOCK_BYTES, wait_seconds: float = DOWNLOAD_WAIT_SECONDS
    ) -> None:
        if not 0 < block_bytes <= quota_bytes:
            raise ValueError(f"cache: the quota must hold a block of {block_bytes} bytes, got {quota_bytes} bytes")
        self._block, self._wait = block_bytes, wait_seconds
        # Below the user's folder, so that no other files or modes change.
        self._folder = os.path.join(folder, "orchestrator-cache")
        self._store = BlockStore(self._folder, quota_bytes)
        self.disk_error: str | None = None
        # Without a lock, which a fork could leave locked: the interpreter does not switch threads within a `+= 1`.
        self.hits = self.misses = self.bytes = 0
        with self._record_disk_error():
            self._store.prepare()

    def read_into(self, url: str, version: str, size: int, start: int, view: memoryview, fetch: FetchFn) -> None:
        """Fill the view with the object's bytes from `start` on; `fetch(start, view)` reads from the source.

        version: identifies the content, such as a checksum. size: bytes of the object. Raises what `fetch` raises.
        """
        if not 0 <= start <= start + len(view) <= size:
            raise ValueError(f"cache: bytes must be within 0 to {size}, got {start} to {start + len(view)}")
        digest, done = _compute_digest(url, version, self._block), 0
        while done < len(view):
            number, offset = divmod(start + done, self._block)
            piece = view[done : done + self._block - offset]
            self._read_block(digest, number, min(self._block, size - number * self._block), offset, piece, fetch)
            done += len(piece)

    def invalidate_range(self, url: str, version: str, start: int, length: int) -> None:
        """Remove the blocks of a range that turned out damaged."""
        digest = _compute_digest(url, version, self._block)
        for number in range(start // self._block, -(-(start + length) // self._block)):
            with self._record_disk_error():
                self._store.remove(self._store.get_block_path(digest, number))

    def _read_block(self, digest: str, number: int, length: int, offset: int, view: memoryview, fetch: FetchFn) -> None:
        path = self._store.get_block_path(digest, number)
        if self._read_cached(path, length, offset, view):
            return
        if self.disk_error is not None:
            self.misses += 1
            fetch(number * self._block + offset, view)
            return
        lock = None
        try:
            # One download per node: the others wait for it, within bounds.
            with self._record_disk_error():
                lock = acquire_lock(self._store.get_lock_path(digest, number), self._wait, lambda: os.path.exists(path))
            if not self._read_cached(path, length, offset, view):
                self.misses += 1
                self._download(path, number * self._block, length, offset, view, fetch)
        finally:
            if lock is not None:
                release_lock(lock)

    def _download(self, path: str, begin: int, length: int, offset: int, view: memoryview, fetch: FetchFn) -> None:
        """Read a block from its source into the view, and store it."""
        whole = len(view) == length
        block = view if whole else memoryview(bytearray(length))
        fetch(begin, block)
        if not whole:
            view[:] = block[offset : offset + len(view)]
        with self._record_disk_error():
            self._store.store(path, block)

    def _read_cached(self, path: str, length: int, offset: int, view: memoryview) -> bool:
        """Read a block into the view; return False when it is not there. Eviction does not disturb an open block."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            facts = os.fstat(file)
            if facts.st_size != length or os.preadv(file, [view], offset) != len(view):
                self._store.remove(path)
                return False
            # abs: the last use lies in the future after the clock was set back.
            if abs(time.time() - facts.st_mtime) > TOUCH_INTERVAL_SECONDS:
                with suppress(OSError):
                    os.utime(file)
        except OSError:
            # A bad sector: the source has the block.
            return False
        finally:
            os.close(file)
        self.hits += 1
        self.bytes += len(view)
        return True

    @contextmanager
    def _record_disk_error(self) -> Iterator[None]:
        """Record the first error of the disk and swallow it."""
        try:
            yield
        except OSError as error:
            if self.disk_error is None:
                self.disk_error = f"cache {self._folder}: {error}: nothing more is kept there by this process"


@lru_cache(4096)
def _compute_digest(url: str, version: str, block: int) -> str:
    """Return 32 hexadecimal digits for a version of an object in blocks of that size."""
    return hashlib.blake2b("\0".join((url, version, str(block))).encode(), digest_size=16).hexdigest()


# The usage file is locked for a moment, or for an eviction: a process that waits longer does not store.
USAGE_LOCK_SECONDS = 5.0
# Eviction frees a twentieth at a time, so that it rarely lists the whole folder.
_EVICTION_DIVISOR = 20
# A last use further ahead than this was recorded under a wrong clock.
_MAX_CLOCK_SKEW_SECONDS = 60.0
_BLOCK_NAME = re.compile(r"[0-9a-f]{32}\.\d+")


class BlockStore:
    """A private folder of block files. All methods raise OSError for errors of the disk."""

    def __init__(self, folder: str, quota_bytes: int) -> None:
        self._folder, self._quota = folder, quota_bytes
        self._blocks, self._writing = os.path.join(folder, "blocks"), os.path.join(folder, "writing")
        self._locks = os.path.join(folder, "locks")

    def prepare(self) -> None:
        """Make the folder, readable by this user only; remove leftovers, and blocks above the quota."""
        os.makedirs(os.path.dirname(self._folder), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(self._folder, 0o700)
        facts = os.lstat(self._folder)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            raise PermissionError("it must be a folder of this user")
        if facts.st_mode & 0o077:
            os.chmod(self._folder, 0o700)
        for below in (self._blocks, self._writing, self._locks):
            os.makedirs(below, mode=0o700, exist_ok=True)
        self._remove_leftovers()
        self._reserve_bytes(0)

    def get_block_path(self, digest: str, number: int) -> str:
        """Return the path of a block."""
        return os.path.join(self._blocks, digest[:2], f"{digest}.{number}")

    def get_lock_path(self, digest: str, number: int) -> str:
        """Return the path of the lock of a block's download. Blocks share 256 locks, which are never removed."""
        return os.path.join(self._locks, f"{(int(digest[:8], 16) + number) % 256:02x}")

    def store(self, path: str, block: memoryview) -> None:
        """Write a block and rename it into place, if it fits after eviction."""
        if not self._reserve_bytes(len(block)):
            return
        temp = os.path.join(self._writing, uuid.uuid4().hex)
        try:
            number = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                # Locked until it is renamed: the writer of an unlocked temporary file has died.
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                written = 0
                while written < len(block):
                    written += os.write(number, block[written:])
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                os.rename(temp, path)
            finally:
                os.close(number)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(temp)
            self._free_bytes(len(block))
            # The folder was emptied, or cleaned before the lock: the next block may be stored.
            if isinstance(error, FileNotFoundError | BlockingIOError):
                self.prepare()
                return
            raise

    def remove(self, path: str) -> None:
        """Remove a block if it is there."""
        try:
            size = os.stat(path).st_size
            os.unlink(path)
        except FileNotFoundError:
            return
        self._free_bytes(size)

    def _reserve_bytes(self, size: int) -> bool:
        with self._lock_usage() as account:
            if account is None:
                return False
            used = _read_number(account)
            if used is None or used + size > self._quota:
                used = self._evict_blocks(size)
            if used + size > self._quota:
                return False
            _write_number(account, used + size)
            return True

    def _free_bytes(self, size: int) -> None:
        with suppress(OSError), self._lock_usage() as account:
            if account is not None:
                _write_number(account, max(0, (_read_number(account) or 0) - size))

    @contextmanager
    def _lock_usage(self) -> Iterator[int | None]:
        """Lock the file with the number of used bytes; yield None when others hold it too long."""
        account = acquire_lock(os.path.join(self._folder, "used"), USAGE_LOCK_SECONDS)
        try:
            yield account
        finally:
            if account is not None:
                release_lock(account)

    def _evict_blocks(self, size: int) -> int:
        """Remove the least recently used blocks until `size` fits; return the used bytes."""
        self._remove_leftovers()
        now, blocks = time.time(), []
        for entry in self._iter_blocks():
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                recent = facts.st_mtime if facts.st_mtime <= now + _MAX_CLOCK_SKEW_SECONDS else 0.0
                blocks.append((recent, facts.st_size, entry.path))
        used = sum(length for _, length, _ in blocks)
        if used + size <= self._quota:
            return used
        blocks.sort()
        slack = self._quota // _EVICTION_DIVISOR
        target = self._quota - size - (slack - slack % size if size else slack)
        for _, length, path in blocks:
            if used <= target:
                break
            # A process that has it open can still read it.
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= length
        return used

    def _iter_blocks(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self._blocks):
            with os.scandir(folder.path) as entries:
                yield from (entry for entry in entries if _BLOCK_NAME.fullmatch(entry.name))

    def _remove_leftovers(self) -> None:
        """Remove the files of writers that died."""
        for name in os.listdir(self._writing):
            path = os.path.join(self._writing, name)
            with suppress(FileNotFoundError, BlockingIOError):
                number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                finally:
                    os.close(number)


def acquire_lock(path: str, seconds: float, is_obsolete: Callable[[], bool] = lambda: False) -> int | None:
    """Return a lock between all threads and processes of a node, released when its holder ends; None without it.

    Waits that long, or until `is_obsolete()`. Raises OSError when the lock file cannot be opened.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline, pause = time.monotonic() + seconds, 0.001
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return number
            if time.monotonic() >= deadline or is_obsolete():
                os.close(number)
                return None
            time.sleep(pause)
            pause = min(0.05, pause * 2)
    except BaseException:
        os.close(number)
        raise


def release_lock(lock: int) -> None:
    """Release a lock, also when a process that was forked meanwhile has inherited it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def _read_number(file: int) -> int | None:
    data = os.pread(file, 20, 0)
    return int(data) if len(data) == 20 and data.isdigit() else None


def _write_number(file: int, number: int) -> None:
    os.pwrite(file, b"%020d" % number, 0)
