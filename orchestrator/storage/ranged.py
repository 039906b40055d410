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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

import fsspec

from orchestrator.storage import faults, files, s3, urls
from orchestrator.storage.files import StorageError
from orchestrator.storage.local import LocalReader
from orchestrator.storage.s3 import EndedEarlyError, PendingCalls, Progress, TruncatedError

T = TypeVar("T")

_JITTER = secrets.SystemRandom()  # the global generator belongs to whoever seeded it


@dataclass(frozen=True)
class Patience:
    """How long a remote read is tried before it fails."""

    tries: int = 8  # without a byte of progress
    requests: int = 64  # of one read
    first_wait_seconds: float = 0.2
    longest_wait_seconds: float = 10.0
    connect_seconds: float = s3.CONNECT_SECONDS
    read_seconds: float = s3.READ_SECONDS  # without a byte
    total_seconds: float = 300.0  # of one read, and beyond that
    slowest_bytes_per_second: float = 64 * 2**10

    def limit_seconds(self, length: int) -> float:
        """The longest that a read of so many bytes may take."""
        return self.total_seconds + length / self.slowest_bytes_per_second

    def wait_seconds(self, tries: int) -> float:
        """The pause after so many tries without progress: exponential, bounded, and not the same for all readers."""
        longest = min(self.longest_wait_seconds, self.first_wait_seconds * 2.0 ** max(0, tries - 1))
        return _JITTER.uniform(0.5, 1.0) * longest


@dataclass
class Transfer:
    """What was moved so far."""

    bytes: int = 0
    requests: int = 0
    retries: int = 0


class Source(Protocol):
    """A kind of remote storage. Errors are the store's own; `faults` tells them apart."""

    def fill(self, url: str, start: int, view: memoryview, progress: Progress, seconds: float) -> None:
        """Ask once for the bytes of the view; `progress` counts those that came."""

    def size(self, url: str, seconds: float) -> int:
        """Bytes of an object, asked once."""

    def close(self) -> None:
        """Close the connections."""


class Ranges:
    """Ranged reads by URL for all threads of a process; after a fork the child starts anew, without connections."""

    def __init__(self, streams: int = 16, patience: Patience | None = None) -> None:
        if streams < 1:
            raise ValueError(f"streams: {streams} remote reads at a time are too few: at least 1")
        self._streams, self._patience = streams, patience or Patience()
        self.transfer = Transfer()
        self._start()
        _LIVE.add(self)

    def _start(self) -> None:
        self._local = LocalReader()
        self._sources: dict[str, Source] = {}
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self._streams)
        self._closed = threading.Event()

    def read_into(self, url: str, start: int, view: memoryview) -> None:
        """Fill a view of bytes from byte `start` of an object on.

        Raises FileNotFoundError when it is absent, StorageError when it ends before that, was replaced meanwhile,
        may not be read or does not answer in time.
        """
        if start < 0:
            raise ValueError(f"{urls.redact(url)}: there is no byte {start}")
        if self._closed.is_set():
            raise StorageError(f"cannot read {urls.redact(url)}: the reader is closed")
        if not len(view):
            return
        if urls.is_local(url):
            self._local.read_into(url, start, view)
            self._count(moved=len(view), requests=1)
            return
        progress = Progress()

        def attempt(seconds: float) -> None:
            done = progress.done
            self._source(url).fill(url, start + done, view[done:], progress, seconds)

        self._persist("read", url, attempt, progress, start, len(view))

    def read(self, url: str, start: int, length: int) -> bytearray:
        """Exactly `length` bytes from byte `start` on. Raises what `read_into` does."""
        data = bytearray(length)
        self.read_into(url, start, memoryview(data))
        return data

    def size(self, url: str) -> int:
        """Bytes of an object. Raises FileNotFoundError when it is absent, StorageError otherwise."""
        if urls.is_local(url):
            return files.size(url)
        return self._persist("measure", url, lambda seconds: self._source(url).size(url, seconds), Progress())

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
    def _source(self, url: str) -> Source:
        kind = "s3" if urls.scheme(url) in s3.SCHEMES else "any"
        with self._lock:
            if kind not in self._sources:
                patience = self._patience
                self._sources[kind] = (
                    s3.S3Reader(patience.connect_seconds, patience.read_seconds, self._streams)
                    if kind == "s3"
                    else _AnyReader()
                )
            return self._sources[kind]

    def _persist(
        self, verb: str, url: str, attempt: Callable[[float], T], progress: Progress, start: int = 0, length: int = 0
    ) -> T:
        """The attempt's result; it is made again, from the last good byte, while that may help."""
        began = time.monotonic()
        limit, tries = self._patience.limit_seconds(length), 0
        with self._slot(verb, url, limit):
            for request in range(1, self._patience.requests + 1):
                before = progress.done
                try:
                    return attempt(began + limit - time.monotonic())
                except Exception as error:
                    tries = 0 if progress.done > before else tries + 1
                    out = tries >= self._patience.tries or request == self._patience.requests
                    if out or faults.is_final(error) or time.monotonic() >= began + limit:
                        spent = f"{request} requests in {time.monotonic() - began:.1f} s" if request > 1 else ""
                        raise _failure(verb, url, start + progress.done, error, spent) from error
                finally:
                    self._count(progress.done - before, requests=1)
                self._count(retries=1)
                if self._closed.wait(self._patience.wait_seconds(tries)):
                    break
        raise StorageError(f"cannot {verb} {urls.redact(url)}: the reader was closed")

    @contextmanager
    def _slot(self, verb: str, url: str, seconds: float) -> Iterator[None]:
        """One of the streams. Who has one gives it back in bounded time, also while it backs off."""
        slots = self._slots
        if not slots.acquire(timeout=seconds):
            raise StorageError(f"cannot {verb} {urls.redact(url)}: all {self._streams} streams busy for {seconds:g} s")
        try:
            yield
        finally:
            slots.release()

    def _count(self, moved: int = 0, requests: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.transfer.bytes += moved
            self.transfer.requests += requests
            self.transfer.retries += retries


class _AnyReader:
    """Ranges of what fsspec can open; those of asynchronous filesystems are given up in time, and on closing."""

    def __init__(self) -> None:
        self._pending = PendingCalls()

    def fill(self, url: str, start: int, view: memoryview, progress: Progress, seconds: float) -> None:
        """Ask once; an answer may be shorter than asked for."""
        filesystem = fsspec.filesystem(urls.scheme(url), **files.OPTIONS.get(urls.scheme(url), {}))
        path = filesystem._strip_protocol(urls.normalize(url))
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
        raise EndedEarlyError(f"{len(data)} of {len(view)} bytes came")

    def size(self, url: str, seconds: float) -> int:
        """Bytes of an object."""
        filesystem = fsspec.filesystem(urls.scheme(url), **files.OPTIONS.get(urls.scheme(url), {}))
        size = self._call(filesystem, "info", seconds, filesystem._strip_protocol(urls.normalize(url)))["size"]
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


def _truncated(url: str, what: str) -> StorageError:
    return StorageError(f"{urls.redact(url)}: truncated: {what}")


def _failure(verb: str, url: str, byte: int, error: Exception, spent: str) -> OSError:
    """The error for the caller: object, byte, cause, and how often it was tried."""
    if faults.is_absent(error):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), urls.redact(url))
    if isinstance(error, TruncatedError):
        return _truncated(url, str(error))
    if faults.status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return _truncated(url, f"it has no byte {byte}")
    place = f"{urls.redact(url)} at byte {byte}" if verb == "read" else urls.redact(url)
    cause = urls.redact(faults.told(error))
    return StorageError(f"cannot {verb} {place}: {cause}" + (f" (gave up after {spent})" if spent else ""))


def close_all() -> None:
    """Close every reader of this process, so that threads which wait for a store end; for a job that is interrupted."""
    for ranges in list(_LIVE):
        ranges.close()


_LIVE: weakref.WeakSet[Ranges] = weakref.WeakSet()
_LEFT: list[object] = []


def _start_anew() -> None:
    # Locks may have been held by threads that the child does not have. The parent's connections are kept, unused:
    # to close them would be to wait for the parent's event loop.
    for ranges in list(_LIVE):
        _LEFT.append(ranges._sources)
        ranges._start()


os.register_at_fork(after_in_child=_start_anew)
