"""The disk behind a node's cache: block files within a quota, written and evicted by many processes.

What is used is a number in a file, under a lock that the kernel frees when its holder dies. It may be too high after a
death, never by more than was being written too low; every eviction counts anew.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# The accounts are held for a look at a number, now and then for an eviction: who cannot have them does not store.
ACCOUNT_SECONDS = 5.0
# Eviction frees a twentieth at a time, so that its listing of the whole folder is rare.
_SLACK = 20
# A last use further ahead than this was recorded under a clock that was wrong, and the block not used since.
_AHEAD_SECONDS = 60.0
_BLOCK_NAME = re.compile(r"[0-9a-f]{32}\.\d+")


class Space:
    """A private folder of block files. All methods raise OSError when the disk is in trouble."""

    def __init__(self, folder: str, quota_bytes: int) -> None:
        self._folder, self._quota = folder, quota_bytes
        self._blocks, self._writing = os.path.join(folder, "blocks"), os.path.join(folder, "writing")
        self._locks = os.path.join(folder, "locks")

    def prepare(self) -> None:
        """Make the folder, for nobody else's eyes and hands; remove leftovers, and what is above the quota."""
        os.makedirs(os.path.dirname(self._folder), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(self._folder, 0o700)
        facts = os.lstat(self._folder)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            raise PermissionError("it is no folder of this user")
        if facts.st_mode & 0o077:
            os.chmod(self._folder, 0o700)
        for below in (self._blocks, self._writing, self._locks):
            os.makedirs(below, mode=0o700, exist_ok=True)
        self._sweep()
        self._reserve(0)

    def path(self, digest: str, number: int) -> str:
        """Where a block lies."""
        return os.path.join(self._blocks, digest[:2], f"{digest}.{number}")

    def lock_path(self, digest: str, number: int) -> str:
        """The lock of a block's download. Blocks share 256 of them, which are never removed."""
        return os.path.join(self._locks, f"{(int(digest[:8], 16) + number) % 256:02x}")

    def store(self, path: str, block: memoryview) -> None:
        """Write a block and rename it into place, when there is room or room can be made."""
        if not self._reserve(len(block)):
            return
        temp = os.path.join(self._writing, uuid.uuid4().hex)
        try:
            number = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                # Held until it is renamed: a temporary file without a lock has lost its writer.
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
            self._return(len(block))
            # The folder was emptied, or a sweep came before the lock: the next block may be stored.
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
        self._return(size)

    # -------------------------------------------------------------- accounts
    def _reserve(self, size: int) -> bool:
        with self._accounts() as account:
            if account is None:
                return False
            used = _read_number(account)
            if used is None or used + size > self._quota:
                used = self._evict(size)
            if used + size > self._quota:
                return False
            _write_number(account, used + size)
            return True

    def _return(self, size: int) -> None:
        with suppress(OSError), self._accounts() as account:
            if account is not None:
                _write_number(account, max(0, (_read_number(account) or 0) - size))

    @contextmanager
    def _accounts(self) -> Iterator[int | None]:
        """The file with the number of bytes used, locked; None when others keep it."""
        account = acquire(os.path.join(self._folder, "used"), ACCOUNT_SECONDS)
        try:
            yield account
        finally:
            if account is not None:
                release(account)

    def _evict(self, size: int) -> int:
        """Remove the blocks used longest ago until `size` fits; returns the bytes that remain."""
        self._sweep()
        now, found = time.time(), []
        for entry in self._entries():
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                recent = facts.st_mtime if facts.st_mtime <= now + _AHEAD_SECONDS else 0.0
                found.append((recent, facts.st_size, entry.path))
        used = sum(each[1] for each in found)
        if used + size <= self._quota:
            return used
        found.sort()
        slack = self._quota // _SLACK
        wanted = self._quota - size - (slack - slack % size if size else slack)
        for _, length, path in found:
            if used <= wanted:
                break
            # Somebody who has it open can still read it.
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= length
        return used

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self._blocks):
            with os.scandir(folder.path) as entries:
                yield from (entry for entry in entries if _BLOCK_NAME.fullmatch(entry.name))

    def _sweep(self) -> None:
        """Remove what writers left that are no more."""
        for name in os.listdir(self._writing):
            path = os.path.join(self._writing, name)
            with suppress(FileNotFoundError, BlockingIOError):
                number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                finally:
                    os.close(number)


def acquire(path: str, seconds: float, enough: Callable[[], bool] = lambda: False) -> int | None:
    """A lock between all threads and processes of a node, that ends with its holder; None when it was not to be had.

    Waits that long, or until `enough()`. Raises OSError when the lock file cannot be opened.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline, pause = time.monotonic() + seconds, 0.001
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return number
            if time.monotonic() >= deadline or enough():
                os.close(number)
                return None
            time.sleep(pause)
            pause = min(0.05, pause * 2)
    except BaseException:
        os.close(number)
        raise


def release(lock: int) -> None:
    """Give up a lock, also when a process that was forked meanwhile has inherited it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def _read_number(file: int) -> int | None:
    data = os.pread(file, 20, 0)
    return int(data) if len(data) == 20 and data.isdigit() else None


def _write_number(file: int, number: int) -> None:
    os.pwrite(file, b"%020d" % number, 0)
