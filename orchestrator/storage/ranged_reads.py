"""Ranged reads into memory that the caller owns, continued at the last good byte when storage falters.

Local files are read by preadv without a copy; S3 bodies are streamed into place; any other filesystem of fsspec is
asked for ranges. Measured from an S3 server on the same machine: about 0.5 CPU-seconds of the client per GB in ranges
of 8 MiB, and 1.3 ms a request. botocore's blocking client needs as much.
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

import fsspec

from orchestrator.config import redaction
from orchestrator.storage import file_io, s3, storage_errors, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.s3 import IncompleteBodyError, PendingCalls, ReadProgress, TruncatedError

T = TypeVar("T")

_JITTER = secrets.SystemRandom()  # the global generator belongs to whoever seeded it


@dataclass(frozen=True)
class ReadRetryPolicy:
    """How long a remote read is tried before it fails."""

    tries: int = 8  # without a byte of progress
    requests: int = 64  # of one read
    first_wait_seconds: float = 0.2
    longest_wait_seconds: float = 10.0
    connect_seconds: float = s3.CONNECT_SECONDS
    read_seconds: float = s3.READ_SECONDS  # without a byte
    total_seconds: float = 300.0  # of one read, and beyond that
    slowest_bytes_per_second: float = 64 * 2**10

    def compute_time_limit(self, length: int) -> float:
        """The longest that a read of so many bytes may take."""
        return self.total_seconds + length / self.slowest_bytes_per_second

    def compute_backoff(self, tries: int) -> float:
        """The pause after so many tries without progress: exponential, bounded, and not the same for all readers."""
        longest = min(self.longest_wait_seconds, self.first_wait_seconds * 2.0 ** max(0, tries - 1))
        return _JITTER.uniform(0.5, 1.0) * longest


@dataclass
class TransferStats:
    """What was moved so far."""

    bytes: int = 0
    requests: int = 0
    retries: int = 0


class RangeSource(Protocol):
    """A kind of remote storage. Errors are the store's own; `faults` tells them apart."""

    def fill(self, url: str, start: int, view: memoryview, progress: ReadProgress, seconds: float) -> None:
        """Ask once for the bytes of the view; `progress` counts those that came."""

    def size(self, url: str, seconds: float) -> int:
        """Bytes of an object, asked once."""

    def close(self) -> None:
        """Close the connections."""


class RangeReader:
    """Ranged reads by URL for all threads of a process; after a fork the child starts anew, without connections."""

    def __init__(self, streams: int = 16, patience: ReadRetryPolicy | None = None) -> None:
        if streams < 1:
            raise ValueError(f"streams: {streams} remote reads at a time are too few: at least 1")
        self._streams, self._patience = streams, patience or ReadRetryPolicy()
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
            raise ValueError(f"{redaction.redact(url)}: there is no byte {start}")
        if self._closed.is_set():
            raise StorageError(f"cannot read {redaction.redact(url)}: the reader is closed")
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
        """Exactly `length` bytes from byte `start` on. Raises what `read_into` does."""
        data = bytearray(length)
        self.read_into(url, start, memoryview(data))
        return data

    def size(self, url: str) -> int:
        """Bytes of an object. Raises FileNotFoundError when it is absent, StorageError otherwise."""
        if urls.is_local(url):
            return file_io.get_size(url)
        return self._run_with_retries(
            "measure", url, lambda seconds: self._get_source(url).size(url, seconds), ReadProgress()
        )

    def advise(self, url: str, start: int, length: int) -> None:
        """Let the operating system read ahead in a local file; of no effect on others. Raises what `read_into` does."""
        if urls.is_local(url):
            self._local.advise(url, start, length)

    def close(self) -> None:
        """Close files and connections; what waits for another try fails at once. No reads after this."""
        self._closed.set()
        self._local.close()
        with self._lock:
            for source in self._sources.values():
                source.close()
            self._sources.clear()

    # -------------------------------------------------------------- remote
    def _get_source(self, url: str) -> RangeSource:
        kind = "s3" if urls.get_scheme(url) in s3.SCHEMES else "any"
        with self._lock:
            if kind not in self._sources:
                patience = self._patience
                self._sources[kind] = (
                    s3.S3Reader(patience.connect_seconds, patience.read_seconds, self._streams)
                    if kind == "s3"
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
        """The attempt's result; it is made again, from the last good byte, while that may help."""
        began = time.monotonic()
        limit, tries = self._patience.compute_time_limit(length), 0
        with self._acquire_slot(verb, url, limit):
            for request in range(1, self._patience.requests + 1):
                before = progress.done
                try:
                    return attempt(began + limit - time.monotonic())
                except Exception as error:
                    tries = 0 if progress.done > before else tries + 1
                    out = tries >= self._patience.tries or request == self._patience.requests
                    if out or storage_errors.is_permanent(error) or time.monotonic() >= began + limit:
                        spent = f"{request} requests in {time.monotonic() - began:.1f} s" if request > 1 else ""
                        raise _make_read_error(verb, url, start + progress.done, error, spent) from error
                finally:
                    self._add_to_stats(progress.done - before, requests=1)
                self._add_to_stats(retries=1)
                if self._closed.wait(self._patience.compute_backoff(tries)):
                    break
        raise StorageError(f"cannot {verb} {redaction.redact(url)}: the reader was closed")

    @contextmanager
    def _acquire_slot(self, verb: str, url: str, seconds: float) -> Iterator[None]:
        """One of the streams. Who has one gives it back in bounded time, also while it backs off."""
        slots = self._slots
        if not slots.acquire(timeout=seconds):
            raise StorageError(
                f"cannot {verb} {redaction.redact(url)}: all {self._streams} streams busy for {seconds:g} s"
            )
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
    """Ranges of what fsspec can open; those of asynchronous filesystems are given up in time, and on closing."""

    def __init__(self) -> None:
        self._pending = PendingCalls()

    def fill(self, url: str, start: int, view: memoryview, progress: ReadProgress, seconds: float) -> None:
        """Ask once; an answer may be shorter than asked for."""
        filesystem = fsspec.filesystem(urls.get_scheme(url), **file_io.FILESYSTEM_OPTIONS.get(urls.get_scheme(url), {}))
        path = filesystem._strip_protocol(urls.normalize_scheme(url))
        data = self._call(filesystem, "cat_file", seconds, path, start=start, end=start + len(view))
        if len(data) > len(view):
            raise ValueError(f"{len(data)} bytes came where {len(view)} were asked for: it serves no ranges")
        view[: len(data)] = data
        progress.done += len(data)
        if len(data) == len(view):
            return
        size = self._call(filesystem, "info", seconds, path)["size"]
        if size is not None and start + len(data) >= size:
            raise TruncatedError(f"bytes {start} to {start + len(view)} wanted, it has {size}")
        raise IncompleteBodyError(f"{len(data)} of {len(view)} bytes came")

    def size(self, url: str, seconds: float) -> int:
        """Bytes of an object."""
        filesystem = fsspec.filesystem(urls.get_scheme(url), **file_io.FILESYSTEM_OPTIONS.get(urls.get_scheme(url), {}))
        size = self._call(filesystem, "info", seconds, filesystem._strip_protocol(urls.normalize_scheme(url)))["size"]
        if size is None:
            raise ValueError("the server must send a Content-Length, got none")
        return int(size)

    def close(self) -> None:
        """Give up the reads that are under way."""
        self._pending.cancel()

    def _call(self, filesystem: Any, method: str, seconds: float, *arguments: Any, **options: Any) -> Any:
        if not filesystem.async_impl:
            return getattr(filesystem, method)(*arguments, **options)
        # fsspec names the coroutines of its asynchronous filesystems so.
        call = getattr(filesystem, f"_{method}")(*arguments, **options)
        return self._pending.run(filesystem.loop, call, seconds)


def _make_truncated_error(url: str, what: str) -> StorageError:
    return StorageError(f"{redaction.redact(url)}: truncated: {what}")


def _make_read_error(verb: str, url: str, byte: int, error: Exception, spent: str) -> OSError:
    """The error for the caller: object, byte, cause, and how often it was tried."""
    if storage_errors.is_not_found(error):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), redaction.redact(url))
    if isinstance(error, TruncatedError):
        return _make_truncated_error(url, str(error))
    if storage_errors.get_http_status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return _make_truncated_error(url, f"it has no byte {byte}")
    place = f"{redaction.redact(url)} at byte {byte}" if verb == "read" else redaction.redact(url)
    cause = redaction.redact(storage_errors.describe_error(error))
    return StorageError(f"cannot {verb} {place}: {cause}" + (f" (gave up after {spent})" if spent else ""))


def close_all_readers() -> None:
    """Close every reader of this process, so that threads which wait for a store end; for a job that is interrupted."""
    for ranges in list(_LIVE_READERS):
        ranges.close()


_LIVE_READERS: weakref.WeakSet[RangeReader] = weakref.WeakSet()
_ABANDONED_SOURCES: list[object] = []


def _reset_after_fork() -> None:
    # Locks may have been held by threads that the child does not have. The parent's connections are kept, unused:
    # to close them would be to wait for the parent's event loop.
    for ranges in list(_LIVE_READERS):
        _ABANDONED_SOURCES.append(ranges._sources)
        ranges._reset_state()


os.register_at_fork(after_in_child=_reset_after_fork)


MAX_OPEN_FILES = 256


class LocalReader:
    """Reads for any thread."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, _SharedDescriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, url: str, start: int, view: memoryview) -> None:
        """Fill a view. Raises FileNotFoundError, or StorageError when the file is too short or cannot be read."""
        path, done, wanted = urls.to_local_path(url), 0, len(view)
        try:
            held = self._open(path)
            while done < wanted:
                count = os.preadv(held.number, [view[done:]], start + done)
                if count == 0:
                    raise StorageError(
                        f"{url}: truncated: bytes {start} to {start + wanted} wanted, it ends at byte {start + done}"
                    )
                done += count
        except (FileNotFoundError, StorageError):
            raise
        except OSError as error:
            # The stale handle of a network filesystem heals by opening anew.
            with self._lock:
                self._held.pop(path, None)
            raise StorageError(
                f"cannot read {url} at byte {start + done}: {storage_errors.describe_error(error)}"
            ) from error

    def advise(self, url: str, start: int, length: int) -> None:
        """Let the operating system read ahead. Raises FileNotFoundError or StorageError."""
        with file_io.wrap_errors("read", url):
            held = self._open(urls.to_local_path(url))
            os.posix_fadvise(held.number, start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all files, each as soon as nobody reads it."""
        with self._lock:
            self._held.clear()

    def _open(self, path: str) -> _SharedDescriptor:
        with self._lock:
            held = self._held.get(path)
            if held is not None:
                self._held.move_to_end(path)
                return held
        opened = _SharedDescriptor(path)
        with self._lock:
            held = self._held.setdefault(path, opened)
            if len(self._held) > MAX_OPEN_FILES:
                self._held.popitem(last=False)
        return held


class _SharedDescriptor:
    """An open file that closes when nobody holds it, so that none is closed under a reader."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        # Not blocking: a pipe in the place of a tar must fail, not wait for its writer.
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)
