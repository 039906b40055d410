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
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from orchestrator.config.redaction import redact
from orchestrator.storage import file_io, s3, storage_errors, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.s3 import IncompleteBodyError, PendingCalls, ReadProgress, TruncatedError

T = TypeVar("T")

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

    def compute_time_limit(self, length: int) -> float:
        """Return the longest that a read of so many bytes may take, in seconds."""
        return self.total_seconds + length / self.slowest_bytes_per_second

    def compute_backoff(self, tries: int) -> float:
        """Return the pause after so many tries without progress, in seconds: exponential, bounded, with jitter."""
        longest = min(self.longest_wait_seconds, self.first_wait_seconds * 2.0 ** max(0, tries - 1))
        return _JITTER.uniform(0.5, 1.0) * longest


@dataclass
class TransferStats:
    """Totals of a reader."""

    bytes: int = 0
    requests: int = 0
    retries: int = 0


class RangeSource(Protocol):
    """A kind of remote storage; it raises its client's own errors."""

    def fill(self, url: str, start: int, view: memoryview, progress: ReadProgress, seconds: float) -> None:
        """Request the bytes of the view once; `progress` counts those that came."""

    def size(self, url: str, seconds: float) -> int:
        """Return the bytes of an object, by one request."""

    def close(self) -> None:
        """Close the connections."""


class RangeReader:
    """Ranged reads by URL for all threads of a process; a forked child starts without connections."""

    def __init__(self, streams: int = 16, retry_policy: ReadRetryPolicy | None = None) -> None:
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams}")
        self._streams, self._policy = streams, retry_policy or ReadRetryPolicy()
        self.transfer = TransferStats()
        self._reset_state()
        _LIVE_READERS.add(self)

    def _reset_state(self) -> None:
        self._local = LocalReader()
        self._sources: dict[str, RangeSource] = {}
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
            self._local.read_into(url, start, view)
            self._add_to_stats(moved=len(view), requests=1)
            return
        progress = ReadProgress()

        def attempt(seconds: float) -> None:
            done = progress.done
            self._get_source(url).fill(url, start + done, view[done:], progress, seconds)

        self._run_with_retries("read", url, attempt, progress, start, len(view))

    def read(self, url: str, start: int, length: int) -> bytearray:
        """Return exactly `length` bytes from byte `start` on. Raises what `read_into` does."""
        data = bytearray(length)
        self.read_into(url, start, memoryview(data))
        return data

    def size(self, url: str) -> int:
        """Return the bytes of an object. Raises FileNotFoundError when it is absent, StorageError otherwise."""
        if urls.is_local(url):
            return file_io.get_size(url)
        return self._run_with_retries(
            "measure", url, lambda seconds: self._get_source(url).size(url, seconds), ReadProgress()
        )

    def advise(self, url: str, start: int, length: int) -> None:
        """Let the operating system read ahead in a local file; no effect on others. Raises what `read_into` does."""
        if urls.is_local(url):
            self._local.advise(url, start, length)

    def close(self) -> None:
        """Close files and connections; reads that wait for a retry fail immediately. No reads after this."""
        self._closed.set()
        self._local.close()
        with self._lock:
            for source in self._sources.values():
                source.close()
            self._sources.clear()

    def _get_source(self, url: str) -> RangeSource:
        is_s3 = urls.get_scheme(url) in s3.SCHEMES
        kind = "s3" if is_s3 else "any"
        with self._lock:
            if kind not in self._sources:
                policy = self._policy
                self._sources[kind] = (
                    s3.S3Reader(policy.connect_seconds, policy.read_seconds, self._streams)
                    if is_s3
                    else _FsspecReader()
                )
            return self._sources[kind]

    def _run_with_retries(
        self,
        verb: str,
        url: str,
        attempt: Callable[[float], T],
        progress: ReadProgress,
        start: int = 0,
        length: int = 0,
    ) -> T:
        """Return the attempt's result; repeat it, from the last good byte, while that may help."""
        began = time.monotonic()
        limit, tries = self._policy.compute_time_limit(length), 0
        with self._acquire_slot(verb, url, limit):
            for request in range(1, self._policy.requests + 1):
                before = progress.done
                try:
                    return attempt(began + limit - time.monotonic())
                except Exception as error:
                    tries = 0 if progress.done > before else tries + 1
                    exhausted = tries >= self._policy.tries or request == self._policy.requests
                    if exhausted or storage_errors.is_permanent(error) or time.monotonic() >= began + limit:
                        spent = f"{request} requests in {time.monotonic() - began:.1f} s" if request > 1 else ""
                        raise _make_read_error(verb, url, start + progress.done, error, spent) from error
                finally:
                    self._add_to_stats(progress.done - before, requests=1)
                self._add_to_stats(retries=1)
                if self._closed.wait(self._policy.compute_backoff(tries)):
                    break
        raise StorageError(f"cannot {verb} {redact(url)}: the reader was closed")

    @contextmanager
    def _acquire_slot(self, verb: str, url: str, seconds: float) -> Iterator[None]:
        """Hold one of the streams. A holder returns it in bounded time, also while it backs off."""
        slots = self._slots
        if not slots.acquire(timeout=seconds):
            raise StorageError(f"cannot {verb} {redact(url)}: all {self._streams} streams busy for {seconds:g} s")
        try:
            yield
        finally:
            slots.release()

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
        """Request the range once; an answer may be shorter."""
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
        raise IncompleteBodyError(f"{len(data)} of {len(view)} bytes came")

    def size(self, url: str, seconds: float) -> int:
        """Return the bytes of an object."""
        size = self._call(url, "info", seconds)["size"]
        if size is None:
            raise ValueError("the server must send a Content-Length, got none")
        return int(size)

    def close(self) -> None:
        """Cancel the running reads."""
        self._pending.cancel()

    def _call(self, url: str, method: str, seconds: float, **options: Any) -> Any:
        filesystem, path = file_io.get_filesystem(url), file_io.strip_protocol(url)
        if not filesystem.async_impl:
            return getattr(filesystem, method)(path, **options)
        # fsspec's documented name of the coroutine behind a method.
        return self._pending.run(filesystem.loop, getattr(filesystem, f"_{method}")(path, **options), seconds)


def _make_read_error(verb: str, url: str, byte: int, error: Exception, spent: str) -> OSError:
    """Return the error for the caller: object, byte, cause, and how often it was tried."""
    if storage_errors.is_not_found(error):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), redact(url))
    if isinstance(error, TruncatedError):
        return StorageError(f"{redact(url)}: truncated: {error}")
    if storage_errors.get_http_status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return StorageError(f"{redact(url)}: truncated: it has no byte {byte}")
    place = f"{redact(url)} at byte {byte}" if verb == "read" else redact(url)
    cause = redact(storage_errors.describe_error(error))
    return StorageError(f"cannot {verb} {place}: {cause}" + (f" (gave up after {spent})" if spent else ""))


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


class LocalReader:
    """Reads of local files, for any thread; the most recent files stay open."""

    def __init__(self) -> None:
        self._open_files: OrderedDict[str, _SharedDescriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, url: str, start: int, view: memoryview) -> None:
        """Fill a view. Raises FileNotFoundError, or StorageError when the file is too short or cannot be read."""
        path, done, length = urls.to_local_path(url), 0, len(view)
        try:
            file = self._open(path)
            while done < length:
                count = os.preadv(file.number, [view[done:]], start + done)
                if count == 0:
                    raise StorageError(
                        f"{url}: truncated: bytes {start} to {start + length} wanted, it ends at byte {start + done}"
                    )
                done += count
        except (FileNotFoundError, StorageError):
            raise
        except OSError as error:
            # Reopening mends the stale handle of a network filesystem.
            with self._lock:
                self._open_files.pop(path, None)
            reason = storage_errors.describe_error(error)
            raise StorageError(f"cannot read {url} at byte {start + done}: {reason}") from error

    def advise(self, url: str, start: int, length: int) -> None:
        """Let the operating system read ahead. Raises FileNotFoundError or StorageError."""
        with file_io.wrap_errors("read", url):
            file = self._open(urls.to_local_path(url))
            os.posix_fadvise(file.number, start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all files, each when its last read ends."""
        with self._lock:
            self._open_files.clear()

    def _open(self, path: str) -> _SharedDescriptor:
        with self._lock:
            if (file := self._open_files.get(path)) is not None:
                self._open_files.move_to_end(path)
                return file
        opened = _SharedDescriptor(path)
        with self._lock:
            file = self._open_files.setdefault(path, opened)
            if len(self._open_files) > MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
        return file


class _SharedDescriptor:
    """An open file that closes with its last reference, so that none is closed under a reader."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        # Non-blocking: a pipe in the place of a tar must fail, not wait for its writer.
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)
