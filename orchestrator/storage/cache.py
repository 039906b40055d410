"""A node's cache of remote objects: aligned blocks on local disk, shared by all processes, bounded, least recent out.

Whatever is wrong with the disk, data still flows: the cache steps aside, says why in `trouble`, and reads go to the
source. Blocks are renamed into place without fsync: nothing in a cache is worth waiting for the disk. After a crash of
the machine a block may be short, which is seen here, or hold anything, which the reader's checksums see; it then calls
`drop`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

from orchestrator.storage.cache_space import Space, acquire, release

BLOCK_BYTES = 4 * 2**20
# Longer than a block's download takes; who has waited so long downloads it as well.
WAIT_SECONDS = 60.0
# A use is recorded once in so many seconds: the order of eviction needs no more, and reads stay reads.
TOUCH_SECONDS = 30.0

Fetch = Callable[[int, memoryview], None]


class BlockCache:
    """One node's cache, as one process sees it; any thread, and children after a fork, may use it.

    `hits` and `misses` count blocks, `bytes` what was served from disk; `trouble` says why nothing is stored any more.
    Beyond the quota is at most one block per process, while it is written.
    """

    def __init__(
        self, folder: str, quota_bytes: int, block_bytes: int = BLOCK_BYTES, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        if not 0 < block_bytes <= quota_bytes:
            raise ValueError(f"cache: a quota of {quota_bytes} bytes does not hold a block of {block_bytes} bytes")
        self._block, self._wait = block_bytes, wait_seconds
        # Below the folder that the user names, so that nothing else's mode or files are touched.
        self._folder = os.path.join(folder, "orchestrator-cache")
        self._space = Space(self._folder, quota_bytes)
        self.trouble: str | None = None
        # Without a lock, which a fork could leave locked: the interpreter does not switch threads within a `+= 1`.
        self.hits = self.misses = self.bytes = 0
        with self._stepping_aside():
            self._space.prepare()

    def read_into(self, url: str, version: str, size: int, start: int, view: memoryview, fetch: Fetch) -> None:
        """Fill the view with the object's bytes from `start` on; `fetch(start, view)` reads from the source.

        `version` names the content (its checksum), `size` is the whole object's. Raises what `fetch` raises.
        """
        if not 0 <= start <= start + len(view) <= size:
            raise ValueError(f"cache: bytes {start} to {start + len(view)} wanted of an object of {size} bytes")
        digest, done = _digest(url, version, self._block), 0
        while done < len(view):
            number, offset = divmod(start + done, self._block)
            piece = view[done : done + self._block - offset]
            self._read_block(digest, number, min(self._block, size - number * self._block), offset, piece, fetch)
            done += len(piece)

    def drop(self, url: str, version: str, start: int, length: int) -> None:
        """Remove the blocks of a range that turned out damaged."""
        digest = _digest(url, version, self._block)
        for number in range(start // self._block, -(-(start + length) // self._block)):
            with self._stepping_aside():
                self._space.remove(self._space.path(digest, number))

    # -------------------------------------------------------------- blocks
    def _read_block(self, digest: str, number: int, length: int, offset: int, view: memoryview, fetch: Fetch) -> None:
        path = self._space.path(digest, number)
        if self._found(path, length, offset, view):
            return
        if self.trouble is not None:
            self.misses += 1
            fetch(number * self._block + offset, view)
            return
        lock = None
        try:
            # One download a node: the others wait for it, but not for ever.
            with self._stepping_aside():
                lock = acquire(self._space.lock_path(digest, number), self._wait, lambda: os.path.exists(path))
            if not self._found(path, length, offset, view):
                self.misses += 1
                self._download(path, number * self._block, length, offset, view, fetch)
        finally:
            if lock is not None:
                release(lock)

    def _download(self, path: str, begin: int, length: int, offset: int, view: memoryview, fetch: Fetch) -> None:
        """Read a block from its source into the view, and keep it."""
        whole = len(view) == length
        block = view if whole else memoryview(bytearray(length))
        fetch(begin, block)
        if not whole:
            view[:] = block[offset : offset + len(view)]
        with self._stepping_aside():
            self._space.store(path, block)

    def _found(self, path: str, length: int, offset: int, view: memoryview) -> bool:
        """Whether the block is there and was read. If it is evicted while it is open, it can still be read."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            facts = os.fstat(file)
            if facts.st_size != length or os.preadv(file, [view], offset) != len(view):
                self._space.remove(path)
                return False
            # Also when the last use lies in the future, as after the clock was set back.
            if abs(time.time() - facts.st_mtime) > TOUCH_SECONDS:
                with suppress(OSError):
                    os.utime(file)
        except OSError:
            # A bad spot of the disk: the source has it.
            return False
        finally:
            os.close(file)
        self.hits += 1
        self.bytes += len(view)
        return True

    @contextmanager
    def _stepping_aside(self) -> Iterator[None]:
        """Keep the first trouble with the disk, and go on without."""
        try:
            yield
        except OSError as error:
            if self.trouble is None:
                self.trouble = f"cache {self._folder}: {error}: nothing more is kept there by this process"


@lru_cache(4096)
def _digest(url: str, version: str, block: int) -> str:
    """32 hexadecimal digits for a version of an object in blocks of that size."""
    return hashlib.blake2b("\0".join((url, version, str(block))).encode(), digest_size=16).hexdigest()
