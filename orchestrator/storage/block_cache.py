"""A node's LRU cache of remote objects: aligned blocks on local disk, shared by all processes, bounded.

After a disk error the cache stores nothing more, keeps the error in `disk_error`, and reads go to the source. Blocks
are renamed into place without fsync, since a cache is not worth the wait. After a crash of the machine a block may be
short, which is detected here, or hold anything, which the reader's checksums detect; it then calls `invalidate_range`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

BLOCK_BYTES = 4 * 2**20
# Longer than a block's download takes; a process that has waited so long downloads the block as well.
DOWNLOAD_WAIT_SECONDS = 60.0
# A use is recorded once in so many seconds, so that most reads write nothing.
TOUCH_INTERVAL_SECONDS = 30.0
LEFTOVER_SECONDS = 3600.0  # the writer of an older temporary file has died
# A process lists the folder each time it has written a twentieth of the quota; eviction frees as much at a time.
_SCAN_DIVISOR = 20
# A last use further ahead than this was recorded under a wrong clock.
_MAX_CLOCK_SKEW_SECONDS = 60.0

FetchFn = Callable[[int, memoryview], None]


class BlockCache:
    """One process's access to the node's cache, for any thread and for forked children.

    `hits` and `misses` count blocks; `disk_error` is the reason why nothing is stored any more. Processes do not count
    together: each one beyond the first may exceed the quota by a twentieth of it, or by a block if that is more.
    """

    def __init__(self, folder: str, quota_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        if not 0 < block_bytes <= quota_bytes:
            raise ValueError(f"cache: the quota must hold a block of {block_bytes} bytes, got {quota_bytes} bytes")
        self._block, self._quota = block_bytes, quota_bytes
        # Below the user's folder, so that no other files or modes change.
        self._folder = os.path.join(folder, "orchestrator-cache")
        self._blocks, self._writing, self._locks = (
            os.path.join(self._folder, name) for name in ("blocks", "writing", "locks")
        )
        self.disk_error: str | None = None
        # Without a lock, which a fork could leave locked: the interpreter does not switch threads within a `+= 1`.
        self.hits = self.misses = 0
        self._room = 0  # bytes to write until the next scan
        with self._record_disk_error():
            self._prepare_folder()
            self._make_room(0)

    def read_into(self, url: str, version: str, size: int, start: int, view: memoryview, fetch: FetchFn) -> None:
        """Fill the view with the object's bytes from `start` on; `fetch(start, view)` reads from the source.

        version: identifies the content, such as a checksum. size: bytes of the object. Raises what `fetch` raises.
        """
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
            with self._record_disk_error(), suppress(FileNotFoundError):
                os.unlink(self._get_block_path(digest, number))

    def _get_block_path(self, digest: str, number: int) -> str:
        return os.path.join(self._blocks, digest[:2], f"{digest}.{number}")

    def _read_block(self, digest: str, number: int, length: int, offset: int, view: memoryview, fetch: FetchFn) -> None:
        path = self._get_block_path(digest, number)
        if self._read_cached(path, length, offset, view):
            return
        with ExitStack() as stack:
            if self.disk_error is None:
                # One download per node: the others wait for it, within bounds. Blocks share 256 locks, which stay.
                lock = os.path.join(self._locks, f"{(int(digest[:8], 16) + number) % 256:02x}")
                with self._record_disk_error():
                    stack.enter_context(_hold_lock(lock, DOWNLOAD_WAIT_SECONDS))
                if self._read_cached(path, length, offset, view):
                    return
            self.misses += 1
            if self.disk_error is not None:
                fetch(number * self._block + offset, view)
                return
            block = view if len(view) == length else memoryview(bytearray(length))
            fetch(number * self._block, block)
            if block is not view:
                view[:] = block[offset : offset + len(view)]
            with self._record_disk_error():
                self._store(path, block)

    def _read_cached(self, path: str, length: int, offset: int, view: memoryview) -> bool:
        """Read a block into the view; return False when it is not there. Eviction does not disturb an open block."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            facts = os.fstat(file)
            if facts.st_size != length or os.preadv(file, [view], offset) != len(view):
                os.unlink(path)
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
        return True

    @contextmanager
    def _record_disk_error(self) -> Iterator[None]:
        """Record the first error of the disk and swallow it."""
        try:
            yield
        except OSError as error:
            if self.disk_error is None:
                self.disk_error = f"cache {self._folder}: {error}: nothing more is kept there by this process"

    def _prepare_folder(self) -> None:
        """Make the folder, readable by this user only."""
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

    def _store(self, path: str, block: memoryview) -> None:
        size = len(block)
        if self._room < size:
            self._make_room(size)
        self._room -= size
        number, temp = tempfile.mkstemp(dir=self._writing)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(block)
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            os.rename(temp, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temp)
            raise

    def _make_room(self, size: int) -> None:
        """List the folder, and remove the least recently used blocks if `size` more bytes exceed the quota."""
        now = time.time()
        for temp in Path(self._writing).iterdir():
            with suppress(FileNotFoundError):
                if abs(now - temp.stat().st_mtime) > LEFTOVER_SECONDS:
                    temp.unlink()
        blocks = []
        for block in Path(self._blocks).glob("*/*"):
            with suppress(FileNotFoundError):
                facts = block.lstat()
                recent = facts.st_mtime if facts.st_mtime <= now + _MAX_CLOCK_SKEW_SECONDS else 0.0
                blocks.append((recent, facts.st_size, block))
        used, slack = sum(length for _, length, _ in blocks), self._quota // _SCAN_DIVISOR
        if used + size > self._quota:
            target = self._quota - size - (slack - slack % size if size else slack)
            for _, length, block in sorted(blocks):
                if used <= target:
                    break
                # A process that has it open can still read it.
                block.unlink(missing_ok=True)
                used -= length
        self._room = min(self._quota - used, size + slack)


@lru_cache(4096)
def _compute_digest(url: str, version: str, block: int) -> str:
    """Return 32 hexadecimal digits for a version of an object in blocks of that size."""
    return hashlib.blake2b("\0".join((url, version, str(block))).encode(), digest_size=16).hexdigest()


@contextmanager
def _hold_lock(path: str, seconds: float) -> Iterator[None]:
    """Hold a lock between all threads and processes of a node; continue without it after so many seconds."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        yield
    finally:
        # Also when a process that was forked meanwhile has inherited it. Without the lock it does nothing.
        fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)
