"""Whole-file operations by URL: read, read a range, write atomically, create conditionally, list, remove.

Local files use the standard library (temp file, fsync, rename or link), everything else fsspec. Filesystem objects are
made in the process and thread that uses them, never carried over a fork (s3fs is not fork-safe:
https://github.com/fsspec/s3fs/issues/369).
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import strip_protocol as strip_fsspec_protocol

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_object
from orchestrator.storage import s3, storage_errors, urls
from orchestrator.storage.storage_errors import call_with_retries

join = urls.join

TEMP_PREFIX = ".tmp-"  # of files that are being written, and of those that a killed writer left
_MAX_CONCURRENT_REQUESTS = 16


class StorageError(OSError):
    """An error of storage that retries did not mend; the message names the object."""


def read_bytes(url: str) -> bytes:
    """Return all bytes of an object. Raises FileNotFoundError when it is absent, StorageError otherwise."""
    with wrap_errors("read", url):
        if urls.is_local(url):
            with open(urls.to_local_path(url), "rb") as file:
                return file.read()
        return bytes(_call_filesystem(url, "cat_file"))


def read_json_or_empty(url: str) -> dict[str, Any]:
    """Return a JSON object; empty when there is none at `url`, or another type. Raises StorageError."""
    try:
        return parse_object(read_bytes(url))
    except (FileNotFoundError, ValueError):
        return {}


def write_bytes(url: str, data: bytes) -> None:
    """Replace an object atomically: readers see the old bytes or the new ones."""
    with wrap_errors("write", url):
        if urls.is_local(url):
            path = urls.to_local_path(url)
            os.replace(_write_temp(path, data), path)
        else:
            _call_filesystem(url, "pipe_file", data)


def create_bytes(url: str, data: bytes) -> bool:
    """Create an object unless there is one, and return whether this call did: link(2) locally, If-None-Match on S3."""
    with wrap_errors("create", url):
        if not urls.is_local(url):
            return _create_remote(url, data)
        path = urls.to_local_path(url)
        temp = _write_temp(path, data)
        try:
            os.link(temp, path)
        except FileExistsError:
            return False
        finally:
            os.unlink(temp)
        return True


def exists(url: str) -> bool:
    """Return whether an object or folder is there."""
    with wrap_errors("look for", url):
        if urls.is_local(url):
            return os.path.exists(urls.to_local_path(url))
        # Unless it is strict, fsspec takes a failing web server for one without the file.
        options = {"strict": True} if urls.is_web(url) else {}
        try:
            return bool(_call_filesystem(url, "exists", **options))
        except Exception as error:
            if storage_errors.is_not_found(error):
                return False
            raise


def get_size(url: str) -> int:
    """Return the bytes of an object. Raises FileNotFoundError when it is absent."""
    with wrap_errors("measure", url):
        if urls.is_local(url):
            return os.path.getsize(urls.to_local_path(url))
        size = _call_filesystem(url, "size")
        if size is None:
            raise StorageError(f"{redaction.redact(url)}: the server must send a Content-Length, got none")
        return int(size)


def list_names(url: str) -> list[str]:
    """Return the sorted names directly below a folder; empty when there is no such folder."""
    with wrap_errors("list", url):
        if urls.is_local(url):
            return sorted(entry.name for entry in _list_local(url))
        return sorted({urls.get_basename(entry["name"]) for entry in _list_remote(url)})


def list_sizes(url: str, names: Collection[str] | None = None) -> dict[str, int]:
    """Return name to bytes of the objects directly below a folder; empty when there is no such folder.

    names: those of interest; of a web server, which has no list, each is requested.
    """
    if urls.is_web(url) and names is not None:
        with ThreadPoolExecutor(_MAX_CONCURRENT_REQUESTS, thread_name_prefix="sizes") as pool:
            sizes = pool.map(_find_size, (join(url, name) for name in names))
            return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}
    with wrap_errors("list", url):
        if urls.is_local(url):
            return {entry.name: entry.stat().st_size for entry in _list_local(url) if entry.is_file()}
        files = (entry for entry in _list_remote(url) if entry["type"] == "file")
        return {urls.get_basename(entry["name"]): int(entry["size"]) for entry in files}


def remove(url: str) -> None:
    """Remove an object or a whole folder; nothing happens when it is absent."""
    with wrap_errors("remove", url):
        if urls.is_local(url):
            path = urls.to_local_path(url)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif os.path.lexists(path):
                os.unlink(path)
        elif urls.get_scheme(url) in s3.SCHEMES:
            s3.remove(urls.normalize_scheme(url))
        else:
            # One by one, since `rm` reads `*`, `?` and `[` in a path as patterns.
            entries = _call_filesystem(url, "find", withdirs=True, detail=True)
            for name, facts in sorted(entries.items(), reverse=True):
                method = "rmdir" if facts.get("type") == "directory" else "rm_file"
                with suppress(FileNotFoundError):  # object stores have no folders
                    call_with_retries(partial(getattr(get_filesystem(url), method), name))


def find_write_problem(url: str) -> str | None:
    """Write, read and remove a small object below `url`; return the error, None when all went well."""
    probe = join(url, f"probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, probe.encode())
        if read_bytes(probe) != probe.encode():
            return f"{redaction.redact(url)}: reads back other bytes than were written"
        remove(probe)
    except (OSError, ValueError) as error:
        return f"{redaction.redact(url)}: not writable: {error}"
    return None


def predict_write_problem(url: str) -> str | None:
    """Return the error that a write below `url` would probably raise, without writing; None when none is known."""
    if not urls.is_local(url):
        try:
            list_names(url)
        except (OSError, ValueError) as error:
            return f"{redaction.redact(url)}: {error}"
        return None
    path = Path(urls.to_local_path(url))
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return None
    why = "this user may not write there" if nearest.is_dir() else "it is not a folder"
    return f"{path}: not writable: {nearest}: {why}"


def find_conditional_create_problem(url: str) -> str | None:
    """Return a warning when a store ignores If-None-Match; None otherwise, and when nothing could be written."""
    if urls.is_local(url):
        return None  # link(2) holds
    probe = join(url, f"probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"first")
        try:
            overwrote = create_bytes(probe, b"second")
        finally:
            remove(probe)
    except (OSError, ValueError):
        return None
    if not overwrote:
        return None
    return (
        f"{redaction.redact(url)}: this store ignores conditional creates (If-None-Match), so it cannot keep a second "
        "driver from training the same run: never start a job twice at the same time"
    )


def get_filesystem(url: str) -> Any:
    """Return fsspec's filesystem for a URL."""
    scheme = urls.get_scheme(url)
    if scheme in s3.SCHEMES:
        return s3.get_filesystem()
    # HTTP takes credentials from ~/.netrc and proxies from the environment, as others do.
    options = {"client_kwargs": {"trust_env": True}} if urls.is_web(url) else {}
    return fsspec.filesystem(scheme, **options)


def strip_protocol(url: str) -> str:
    """Return the path of a URL as its filesystem takes it."""
    return str(strip_fsspec_protocol(urls.normalize_scheme(url)))


@contextmanager
def wrap_errors(verb: str, url: str) -> Iterator[None]:
    """Turn every storage error into a StorageError with the object's name; FileNotFoundError stays what it is."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not storage_errors.is_not_found(error):
            reason = storage_errors.describe_error(error)
            raise StorageError(f"cannot {verb} {redaction.redact(url)}: {reason}") from error
        # S3's error says "NoSuchKey" only.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), redaction.redact(url)) from error


def _call_filesystem(url: str, method: str, *arguments: object, **options: object) -> Any:
    def call() -> Any:
        filesystem = get_filesystem(url)
        filesystem.invalidate_cache()  # of listings, since another machine may have written
        return getattr(filesystem, method)(strip_protocol(url), *arguments, **options)

    return call_with_retries(call)


def _list_local(url: str) -> list[os.DirEntry[str]]:
    """Return what is in a local folder, without files that are being written."""
    try:
        with os.scandir(urls.to_local_path(url)) as entries:
            return [entry for entry in entries if not entry.name.startswith(TEMP_PREFIX)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _list_remote(url: str) -> list[dict[str, Any]]:
    if urls.is_web(url):
        raise StorageError(
            f"cannot list {redaction.redact(url)}: a web server has no list of files; give names in full or with "
            "braces such as train-{000..099}.tar"
        )
    # Some stores list the folder itself, others nothing but the object when `url` names one.
    own = strip_protocol(url).strip("/")
    try:
        entries = _call_filesystem(url, "ls", detail=True)
    except FileNotFoundError:
        return []
    return [entry for entry in entries if str(entry["name"]).strip("/") != own]


def _find_size(url: str) -> int | None:
    try:
        return get_size(url)
    except FileNotFoundError:
        return None


def _create_remote(url: str, data: bytes) -> bool:
    """Create by If-None-Match. On S3 the metadata identifies the creator, since a retry may find its own object."""
    if urls.get_scheme(url) not in s3.SCHEMES:
        try:
            get_filesystem(url).pipe_file(strip_protocol(url), data, mode="create")
        except FileExistsError:
            return False
        return True
    creation = {"creation": uuid.uuid4().hex}
    try:
        _call_filesystem(url, "pipe_file", data, mode="create", Metadata=creation)
    except OSError as error:
        # s3fs makes it a FileExistsError by a word in the answer that not every store sends.
        exists_already = isinstance(error, FileExistsError)
        if not exists_already and storage_errors.get_http_status(error) != HTTPStatus.PRECONDITION_FAILED:
            raise
        try:
            return dict(_call_filesystem(url, "metadata", refresh=True)) == creation
        except FileNotFoundError:
            return False  # another creator's, removed meanwhile
    return True


def _write_temp(path: str, data: bytes) -> str:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temp = os.path.join(folder, f"{TEMP_PREFIX}{uuid.uuid4().hex}")
    descriptor = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(temp)
        raise
    return temp
