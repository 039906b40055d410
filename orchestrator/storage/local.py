"""Ranged reads of local files straight into memory: a bounded number of them stays open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from orchestrator.storage import faults, files, urls
from orchestrator.storage.files import StorageError

OPEN_FILES = 256


class LocalReader:
    """Reads for any thread."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, url: str, start: int, view: memoryview) -> None:
        """Fill a view. Raises FileNotFoundError, or StorageError when the file is too short or cannot be read."""
        path, done, wanted = urls.local_path(url), 0, len(view)
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
            raise StorageError(f"cannot read {url} at byte {start + done}: {faults.told(error)}") from error

    def advise(self, url: str, start: int, length: int) -> None:
        """Let the operating system read ahead. Raises FileNotFoundError or StorageError."""
        with files.naming("read", url):
            held = self._open(urls.local_path(url))
            os.posix_fadvise(held.number, start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all files, each as soon as nobody reads it."""
        with self._lock:
            self._held.clear()

    def _open(self, path: str) -> _Descriptor:
        with self._lock:
            held = self._held.get(path)
            if held is not None:
                self._held.move_to_end(path)
                return held
        opened = _Descriptor(path)
        with self._lock:
            held = self._held.setdefault(path, opened)
            if len(self._held) > OPEN_FILES:
                self._held.popitem(last=False)
        return held


class _Descriptor:
    """An open file that closes when nobody holds it, so that none is closed under a reader."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        # Not blocking: a pipe in the place of a tar must fail, not wait for its writer.
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)
