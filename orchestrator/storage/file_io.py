"""Whole-file operations by URL: read, range, atomic write, conditional create, list, remove.

Local files are handled with the standard library (temp file, fsync, rename or link); everything else by
fsspec. Filesystem objects are made in the process and thread that uses them, never carried over a fork
(s3fs is not fork-safe: https://github.com/fsspec/s3fs/issues/369).
"""

from __future__ import annotations

import errno
import os
import re
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

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_object
from orchestrator.storage import s3, storage_errors, urls
from orchestrator.storage.storage_errors import call_with_retries

join = urls.join


class StorageError(OSError):
    """Storage answered with an error that retries did not mend; the message names the object."""


def read_bytes(url: str) -> bytes:
    """All bytes of an object. Raises FileNotFoundError when it is absent, StorageError otherwise."""
    with wrap_errors("read", url):
        if urls.is_local(url):
            with open(urls.to_local_path(url), "rb") as file:
                return file.read()
        return bytes(call_with_retries(lambda: _get_filesystem(url).cat_file(_strip_protocol(url))))


def read_json_or_empty(url: str) -> dict[str, Any]:
    """A JSON object; empty when there is none at `url`, or something else. Raises StorageError when nobody can tell."""
    try:
        return parse_object(read_bytes(url))
    except (FileNotFoundError, ValueError):
        return {}


def read_range(url: str, start: int, length: int) -> bytes:
    """Exactly `length` bytes from byte `start`. Raises StorageError when the object ends before that."""
    with wrap_errors("read", url):
        if urls.is_local(url):
            with open(urls.to_local_path(url), "rb") as file:
                data = os.pread(file.fileno(), length, start)
        else:
            data = _read_remote_range(url, start, length)
    if len(data) != length:
        raise StorageError(
            f"{redaction.redact(url)}: truncated: bytes {start} to {start + length} wanted, {len(data)} of "
            f"{length} there"
        )
    return data


def write_bytes(url: str, data: bytes) -> None:
    """Replace an object in one step: readers see the old bytes or the new ones, nothing between."""
    with wrap_errors("write", url):
        if urls.is_local(url):
            path = urls.to_local_path(url)
            temp = _write_temp(path, data)
            os.replace(temp, path)
        else:
            call_with_retries(lambda: _get_filesystem(url).pipe_file(_strip_protocol(url), data))


def create_bytes(url: str, data: bytes) -> bool:
    """Create an object only if there is none; False when there is one already (whoever made it).

    One creator wins, also between machines: link(2) locally, If-None-Match on S3.
    """
    with wrap_errors("create", url):
        if urls.is_local(url):
            path = urls.to_local_path(url)
            temp = _write_temp(path, data)
            try:
                os.link(temp, path)
            except FileExistsError:
                return False
            finally:
                os.unlink(temp)
            return True
        return _create_remote(url, data)


def exists(url: str) -> bool:
    """Whether an object or folder is there."""
    with wrap_errors("look for", url):
        if urls.is_local(url):
            return os.path.exists(urls.to_local_path(url))
        if urls.is_web(url):
            try:
                # Not strict, fsspec takes a server in trouble for one without the file.
                return bool(call_with_retries(lambda: _get_filesystem(url).exists(_strip_protocol(url), strict=True)))
            except Exception as error:
                if storage_errors.is_not_found(error):
                    return False
                raise
        return bool(call_with_retries(lambda: _get_uncached_filesystem(url).exists(_strip_protocol(url))))


def get_size(url: str) -> int:
    """Bytes of an object. Raises FileNotFoundError when it is absent."""
    with wrap_errors("measure", url):
        if urls.is_local(url):
            return os.path.getsize(urls.to_local_path(url))
        found = call_with_retries(lambda: _get_uncached_filesystem(url).size(_strip_protocol(url)))
        if found is None:
            raise StorageError(f"{redaction.redact(url)}: the server must send a Content-Length, got none")
        return int(found)


def list_sizes(url: str, names: Collection[str] | None = None) -> dict[str, int]:
    """Bytes of each object directly below a folder, by name; empty when there is no such folder.

    names: those that matter. A web server is then asked for each of them, since few can be listed.
    """
    if urls.is_web(url):
        return _list_web_sizes(url, list_names(url) if names is None else names)
    with wrap_errors("list", url):
        if urls.is_local(url):
            path = urls.to_local_path(url)
            if not os.path.isdir(path):
                return {}
            with os.scandir(path) as entries:
                kept = [entry for entry in entries if entry.is_file() and not entry.name.startswith(TEMP_PREFIX)]
            return {entry.name: entry.stat().st_size for entry in kept}
        try:
            found = call_with_retries(lambda: _get_uncached_filesystem(url).ls(_strip_protocol(url), detail=True))
        except FileNotFoundError:
            return {}
        return {urls.get_basename(entry["name"]): int(entry["size"]) for entry in found if entry["type"] == "file"}


def list_names(url: str) -> list[str]:
    """Sorted names directly below a folder; empty when there is no such folder."""
    with wrap_errors("list", url):
        if urls.is_local(url):
            path = urls.to_local_path(url)
            if not os.path.isdir(path):
                return []
            return sorted(name for name in os.listdir(path) if not name.startswith(TEMP_PREFIX))
        if urls.is_web(url):
            return _list_web_names(url)
        try:
            found = call_with_retries(lambda: _get_uncached_filesystem(url).ls(_strip_protocol(url), detail=False))
        except FileNotFoundError:
            return []
        # Some stores list the folder itself, others nothing but the object when `url` names one.
        own = _strip_protocol(url).strip("/")
        return sorted({urls.get_basename(str(entry)) for entry in found if str(entry).strip("/") != own})


def remove(url: str) -> None:
    """Remove an object or a whole folder; nothing happens when it is absent."""
    with wrap_errors("remove", url):
        if urls.is_local(url):
            path = urls.to_local_path(url)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=False)
            elif os.path.lexists(path):
                os.unlink(path)
            return
        if urls.get_scheme(url) in s3.SCHEMES:
            s3.remove(urls.normalize_scheme(url))
        else:
            _remove_with_fsspec(_get_uncached_filesystem(url), _strip_protocol(url))


# Of fsspec's filesystems: HTTP takes credentials from ~/.netrc and proxies from the environment, as others do.
FILESYSTEM_OPTIONS: dict[str, dict[str, Any]] = {
    name: {"client_kwargs": {"trust_env": True}} for name in ("http", "https")
}
_MAX_CONCURRENT_REQUESTS = 16
TEMP_PREFIX = ".tmp-"  # of files that are being written; what a killed writer left has it, too


def _remove_with_fsspec(filesystem: Any, path: str) -> None:
    """Remove by fsspec's calls for one file each; `rm` takes `*`, `?` and `[` in a path for patterns."""
    if not call_with_retries(lambda: filesystem.exists(path)):
        return
    found = call_with_retries(lambda: filesystem.find(path, withdirs=True, detail=True))
    for each, facts in sorted(found.items(), reverse=True):
        remove_one = filesystem.rmdir if facts["type"] == "directory" else filesystem.rm_file
        with suppress(FileNotFoundError):
            call_with_retries(partial(remove_one, each))
    filesystem.invalidate_cache()
    with suppress(FileNotFoundError):  # object stores have no folders
        if filesystem.isdir(path):
            call_with_retries(lambda: filesystem.rmdir(path))


def _list_web_names(url: str) -> list[str]:
    """Names that a web server's page about a folder links to. Raises StorageError where there are none."""
    below = f"{_strip_protocol(url).rstrip('/')}/"
    try:
        links = call_with_retries(lambda: _get_filesystem(url).ls(below, detail=False))
    except Exception as error:
        if not storage_errors.is_permanent(error):
            raise
        links = []  # no page about the folder; its files may be there all the same
    own = [str(link).removeprefix(below) for link in links if str(link).startswith(below)]
    names = sorted({urls.get_basename(f"{below}{name}") for name in own if name and not re.search(r"[?#]|/.", name)})
    if not names:
        raise StorageError(
            f"cannot list {redaction.redact(url)}: a web server has no list of files unless its page links "
            "to them; give "
            "names in full or with braces such as train-{000..099}.tar"
        )
    return names


def _list_web_sizes(url: str, names: Collection[str]) -> dict[str, int]:
    """Bytes of the files of these names that a web server has."""

    def ask(name: str) -> tuple[str, int | None]:
        try:
            return name, get_size(join(url, name))
        except FileNotFoundError:
            return name, None

    with ThreadPoolExecutor(_MAX_CONCURRENT_REQUESTS, thread_name_prefix="sizes") as pool:
        return {name: found for name, found in pool.map(ask, names) if found is not None}


def _create_remote(url: str, data: bytes) -> bool:
    """Create by If-None-Match. On S3 the object says whose it is, in its metadata.

    After a lost answer a second try finds our own object, and aiohttp makes that try whether we want it or not.
    """
    if urls.get_scheme(url) not in s3.SCHEMES:
        try:
            _get_filesystem(url).pipe_file(_strip_protocol(url), data, mode="create")
        except FileExistsError:
            return False
        return True
    creation = {"creation": uuid.uuid4().hex}
    try:
        call_with_retries(
            lambda: _get_filesystem(url).pipe_file(_strip_protocol(url), data, mode="create", Metadata=creation)
        )
    except OSError as error:
        # s3fs makes it a FileExistsError by a word in the answer that not every store says.
        if (
            not isinstance(error, FileExistsError)
            and storage_errors.get_http_status(error) != HTTPStatus.PRECONDITION_FAILED
        ):
            raise
        try:
            found = call_with_retries(
                lambda: _get_uncached_filesystem(url).metadata(_strip_protocol(url), refresh=True)
            )
        except FileNotFoundError:
            return False  # another's, and gone again
        return dict(found) == creation
    return True


def _read_remote_range(url: str, start: int, length: int) -> bytes:
    """What there is of a range: S3 answers with an error when the object ends before its first byte."""
    try:
        return bytes(
            call_with_retries(
                lambda: _get_filesystem(url).cat_file(_strip_protocol(url), start=start, end=start + length)
            )
        )
    except OSError as error:
        if storage_errors.get_http_status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return b""
        raise


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


def _get_filesystem(url: str) -> Any:
    scheme = urls.get_scheme(url)
    return (
        s3.get_filesystem() if scheme in s3.SCHEMES else fsspec.filesystem(scheme, **FILESYSTEM_OPTIONS.get(scheme, {}))
    )


def _get_uncached_filesystem(url: str) -> Any:
    """The filesystem without remembered listings: another machine may have written since."""
    filesystem = _get_filesystem(url)
    filesystem.invalidate_cache()
    return filesystem


def _strip_protocol(url: str) -> str:
    return str(_get_filesystem(url)._strip_protocol(urls.normalize_scheme(url)))


@contextmanager
def wrap_errors(verb: str, url: str) -> Iterator[None]:
    """Give every storage failure the object's name; FileNotFoundError stays what it is."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if storage_errors.is_not_found(error):
            if isinstance(error, FileNotFoundError) and (
                error.filename is not None or urls.get_basename(url) in str(error)
            ):
                raise
            # S3 says no more than "NoSuchKey".
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), redaction.redact(url)) from error
        raise StorageError(
            f"cannot {verb} {redaction.redact(url)}: {redaction.redact(storage_errors.describe_error(error))}"
        ) from error


def find_write_problem(url: str) -> str | None:
    """None when a small object could be written, read back and removed below `url`; else what went wrong."""
    probe = join(url, f"probe-{uuid.uuid4().hex}")
    data = uuid.uuid4().bytes
    try:
        write_bytes(probe, data)
        if read_bytes(probe) != data:
            return f"{redaction.redact(url)}: what was written is not what is read back"
        remove(probe)
    except (OSError, ValueError) as error:
        return f"{redaction.redact(url)}: not writable: {error}"
    return None


def predict_write_problem(url: str) -> str | None:
    """Return what speaks against writing below `url`, found without writing; None when nothing does."""
    if not urls.is_local(url):
        try:
            list_names(url)
        except (OSError, ValueError) as error:
            return f"{redaction.redact(url)}: {error}"
        return None
    path = Path(urls.to_local_path(url))
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    why = "this user may not write there" if there.is_dir() else "it is not a folder"
    return f"{path}: not writable: {there}: {why}"


def find_conditional_create_problem(url: str) -> str | None:
    """None when an object below `url` can be created once only, or it is not known; else what that means.

    Some servers take a conditional create (If-None-Match) for an ordinary one, and say nothing.
    """
    if urls.is_local(url):
        return None  # link(2) holds
    probe = join(url, f"probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"first")
        try:
            again = create_bytes(probe, b"second")
        finally:
            remove(probe)
    except (OSError, ValueError):
        return None  # `problem` tells what is wrong
    if not again:
        return None
    return (
        f"{redaction.redact(url)}: this store ignores conditional creates (If-None-Match), so it cannot keep a second "
        "driver from training the same run: never start a job twice at the same time"
    )
