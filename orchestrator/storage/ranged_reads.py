"""Ranged reads into the caller's memory, resumed at the last good byte after storage errors.

Local files are read by preadv without a copy; S3 bodies are streamed into place; other fsspec filesystems are asked for
ranges.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
import weakref
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from orchestrator.config.redaction import redact
from orchestrator.storage import file_io, s3, storage_errors, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.s3 import PendingCalls, ReadProgress, TruncatedError

MAX_OPEN_FILES = 256
_JITTER = secrets.SystemRandom()  # the global generator's seed belongs to the caller


@dataclass(frozen=True)
class ReadRetryPolicy:
    """Limits of the retries of a remote read."""

    tries: int = 8  # without a byte of progress
    requests: int = 64  # of one read
    first_wait_seconds: float = 0.2
    longest_wait_seconds: float = 10.0
    connect_seconds: float = s3.CONNECT_SECONDS
    read_seconds: float = s3.READ_SECONDS  # without a byte
    total_seconds: float = 300.0  # of one read, on top of its transfer at the slowest rate
    slowest_bytes_per_second: float = 64 * 2**10


@dataclass
class TransferStats:
    """Totals of a reader."""

    bytes: int = 0
    requests: int = 0
    retries: int = 0


class RangeReader:
    """Ranged reads by URL for all threads of a process; a forked child starts without connections."""

    def __init__(self, streams: int = 16, retry_policy: ReadRetryPolicy | None = None) -> None:
        self._streams, self._policy = streams, retry_policy or ReadRetryPolicy()
        self.transfer = TransferStats()
        self._reset_state()
        _LIVE_READERS.add(self)

    def _reset_state(self) -> None:
        self._open_file = lru_cache(MAX_OPEN_FILES)(_SharedDescriptor)
        self._sources: dict[str, s3.S3Reader | _FsspecReader] = {}
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self._streams)
        self._closed = threading.Event()

    def read_into(self, url: str, start: int, view: memoryview) -> None:
        """Fill a view of bytes from byte `start` of an object on.

        Raises FileNotFoundError when it is absent, StorageError when it ends before that, was replaced meanwhile,
        may not be read or does not answer in time.
        """
        if start < 0:
            raise ValueError(f"{redact(url)}: start must be 0 or more, got {start}")
        if self._closed.is_set():
            raise StorageError(f"cannot read {redact(url)}: the reader is closed")
        if not len(view):
            return
        if urls.is_local(url):
            self._read_local(url, start, view)
            return
        limit = self._policy.total_seconds + len(view) / self._policy.slowest_bytes_per_second
        # A holder of a slot returns it in bounded time, also while it backs off.
        slots = self._slots
        if not slots.acquire(timeout=limit):
            raise StorageError(f"cannot read {redact(url)}: all {self._streams} streams busy for {limit:g} s")
        try:
            self._read_remote(url, start, view, limit)
        finally:
            slots.release()

    def read(self, url: str, start: int, length: int) -> bytearray:
        """Return exactly `length` bytes from byte `start` on. Raises what `read_into` does."""
        data = bytearray(length)
        self.read_into(url, start, memoryview(data))
        return data

    def advise(self, url: str, start: int, length: int) -> None:
        """Let the operating system read ahead in a local file; no effect on others. Raises what `read_into` does."""
        if urls.is_local(url):
            with file_io.wrap_errors("read", url):
                file = self._open_file(urls.to_local_path(url))
                os.posix_fadvise(file.number, start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close files and connections; reads that wait for a retry fail immediately. No reads after this."""
        self._closed.set()
        self._open_file.cache_clear()
        with self._lock:
            for source in self._sources.values():
                source.close()
            self._sources.clear()

    def _read_local(self, url: str, start: int, view: memoryview) -> None:
        done, length = 0, len(view)
        try:
            file = self._open_file(urls.to_local_path(url))
            while done < length:
                count = os.preadv(file.number, [view[done:]], start + done)
                if count == 0:
                    raise TruncatedError(f"bytes {start} to {start + length} wanted, it ends at byte {start + done}")
                done += count
        except (OSError, TruncatedError) as error:
            # Reopening mends the stale handle of a network filesystem.
            self._open_file.cache_clear()
            raise _make_read_error(url, start + done, error, "") from error
        self._add_to_stats(length, requests=1)

    def _read_remote(self, url: str, start: int, view: memoryview, limit: float) -> None:
        """Request the range again, from the last good byte on, while that may help."""
        deadline, progress, tries = time.monotonic() + limit, ReadProgress(), 0
        for request in range(1, self._policy.requests + 1):
            before = progress.done
            try:
                source = self._get_source(url)
                source.fill(url, start + before, view[before:], progress, deadline - time.monotonic())
                return
            except Exception as error:
                tries = 0 if progress.done > before else tries + 1
                exhausted = tries >= self._policy.tries or request == self._policy.requests
                if exhausted or storage_errors.is_permanent(error) or time.monotonic() >= deadline:
                    seconds = time.monotonic() - deadline + limit
                    spent = f" (gave up after {request} requests in {seconds:.1f} s)" if request > 1 else ""
                    raise _make_read_error(url, start + progress.done, error, spent) from error
            finally:
                self._add_to_stats(progress.done - before, requests=1)
            self._add_to_stats(retries=1)
            backoff = self._policy.first_wait_seconds * 2.0 ** max(0, tries - 1)
            if self._closed.wait(_JITTER.uniform(0.5, 1.0) * min(self._policy.longest_wait_seconds, backoff)):
                break
        raise StorageError(f"cannot read {redact(url)}: the reader was closed")

    def _get_source(self, url: str) -> s3.S3Reader | _FsspecReader:
        is_s3, policy = urls.get_scheme(url) in s3.SCHEMES, self._policy
        with self._lock:
            if is_s3 and "s3" not in self._sources:
                self._sources["s3"] = s3.S3Reader(policy.connect_seconds, policy.read_seconds, self._streams)
            return self._sources["s3"] if is_s3 else self._sources.setdefault("any", _FsspecReader())

    def _add_to_stats(self, moved: int = 0, requests: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.transfer.bytes += moved
            self.transfer.requests += requests
            self.transfer.retries += retries


class _FsspecReader:
    """Ranges of any fsspec filesystem; those of asynchronous ones can be cancelled and time out."""

    def __init__(self) -> None:
        self._pending = PendingCalls()

    def fill(self, url: str, start: int, view: memoryview, progress: ReadProgress, seconds: float) -> None:
        data = self._call(url, "cat_file", seconds, start=start, end=start + len(view))
        if len(data) > len(view):
            raise ValueError(f"{len(data)} bytes came where {len(view)} were requested: the server has no ranges")
        view[: len(data)] = data
        progress.done += len(data)
        if len(data) == len(view):
            return
        size = self._call(url, "info", seconds)["size"]
        if size is not None and start + len(data) >= size:
            raise TruncatedError(f"bytes {start} to {start + len(view)} wanted, it has {size}")
        raise OSError(f"{len(data)} of {len(view)} bytes came")

    def close(self) -> None:
        self._pending.cancel()

    def _call(self, url: str, method: str, seconds: float, **options: Any) -> Any:
        filesystem, path = file_io.get_filesystem(url), file_io.strip_protocol(url)
        if not filesystem.async_impl:
            return getattr(filesystem, method)(path, **options)
        # fsspec's documented name of the coroutine behind a method.
        return self._pending.run(filesystem.loop, getattr(filesystem, f"_{method}")(path, **options), seconds)


def _make_read_error(url: str, byte: int, error: Exception, spent: str) -> OSError:
    """Return the error for the caller: object, byte, cause, and how often it was tried."""
    if storage_errors.is_not_found(error):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), redact(url))
    if isinstance(error, TruncatedError):
        return StorageError(f"{redact(url)}: truncated: {error}")
    if storage_errors.get_http_status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return StorageError(f"{redact(url)}: truncated: it has no byte {byte}")
    return StorageError(f"cannot read {redact(url)} at byte {byte}: {storage_errors.describe_error(error)}{spent}")


def close_all_readers() -> None:
    """Close every reader of this process, so that the threads of an interrupted job end."""
    for reader in list(_LIVE_READERS):
        reader.close()


_LIVE_READERS: weakref.WeakSet[RangeReader] = weakref.WeakSet()
_ABANDONED_SOURCES: list[object] = []


def _reset_after_fork() -> None:
    # Threads that the child lacks may have held locks. The parent's connections stay open, unused: closing them would
    # wait for the parent's event loop.
    for reader in list(_LIVE_READERS):
        _ABANDONED_SOURCES.append(reader._sources)
        reader._reset_state()


os.register_at_fork(after_in_child=_reset_after_fork)


class _SharedDescriptor:
    """An open file that closes with its last reference, so that none is closed under a reader."""

    def __init__(self, path: str) -> None:
        # Non-blocking: a pipe in the place of a tar must fail, not wait for its writer.
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # Not at exit, when threads may read still.
        weakref.finalize(self, os.close, self.number).atexit = False
