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
from typing import Any

import fsspec

from orchestrator.config.json_text import parse_object
from orchestrator.storage import faults, s3, urls
from orchestrator.storage.retry import retrying

join = urls.join


class StorageError(OSError):
    """Storage answered with an error that retries did not mend; the message names the object."""


def read_bytes(url: str) -> bytes:
    """All bytes of an object. Raises FileNotFoundError when it is absent, StorageError otherwise."""
    with naming("read", url):
        if urls.is_local(url):
            with open(urls.local_path(url), "rb") as file:
                return file.read()
        return bytes(retrying(lambda: _filesystem(url).cat_file(_path(url))))


def read_record(url: str) -> dict[str, Any]:
    """A JSON object; empty when there is none at `url`, or something else. Raises StorageError when nobody can tell."""
    try:
        return parse_object(read_bytes(url))
    except (FileNotFoundError, ValueError):
        return {}


def read_range(url: str, start: int, length: int) -> bytes:
    """Exactly `length` bytes from byte `start`. Raises StorageError when the object ends before that."""
    with naming("read", url):
        if urls.is_local(url):
            with open(urls.local_path(url), "rb") as file:
                data = os.pread(file.fileno(), length, start)
        else:
            data = _remote_range(url, start, length)
    if len(data) != length:
        raise StorageError(
            f"{urls.redact(url)}: truncated: bytes {start} to {start + length} wanted, {len(data)} of {length} there"
        )
    return data


def write_bytes(url: str, data: bytes) -> None:
    """Replace an object in one step: readers see the old bytes or the new ones, nothing between."""
    with naming("write", url):
        if urls.is_local(url):
            path = urls.local_path(url)
            temp = _write_temp(path, data)
            os.replace(temp, path)
        else:
            retrying(lambda: _filesystem(url).pipe_file(_path(url), data))


def create_bytes(url: str, data: bytes) -> bool:
    """Create an object only if there is none; False when there is one already (whoever made it).

    One creator wins, also between machines: link(2) locally, If-None-Match on S3.
    """
    with naming("create", url):
        if urls.is_local(url):
            path = urls.local_path(url)
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
    with naming("look for", url):
        if urls.is_local(url):
            return os.path.exists(urls.local_path(url))
        if urls.is_web(url):
            try:
                # Not strict, fsspec takes a server in trouble for one without the file.
                return bool(retrying(lambda: _filesystem(url).exists(_path(url), strict=True)))
            except Exception as error:
                if faults.is_absent(error):
                    return False
                raise
        return bool(retrying(lambda: _fresh(url).exists(_path(url))))


def size(url: str) -> int:
    """Bytes of an object. Raises FileNotFoundError when it is absent."""
    with naming("measure", url):
        if urls.is_local(url):
            return os.path.getsize(urls.local_path(url))
        found = retrying(lambda: _fresh(url).size(_path(url)))
        if found is None:
            raise StorageError(f"{urls.redact(url)}: the server must send a Content-Length, got none")
        return int(found)


def sizes(url: str, names: Collection[str] | None = None) -> dict[str, int]:
    """Bytes of each object directly below a folder, by name; empty when there is no such folder.

    names: those that matter. A web server is then asked for each of them, since few can be listed.
    """
    if urls.is_web(url):
        return _web_sizes(url, list_names(url) if names is None else names)
    with naming("list", url):
        if urls.is_local(url):
            path = urls.local_path(url)
            if not os.path.isdir(path):
                return {}
            with os.scandir(path) as entries:
                kept = [entry for entry in entries if entry.is_file() and not entry.name.startswith(TEMP_PREFIX)]
            return {entry.name: entry.stat().st_size for entry in kept}
        try:
            found = retrying(lambda: _fresh(url).ls(_path(url), detail=True))
        except FileNotFoundError:
            return {}
        return {urls.name(entry["name"]): int(entry["size"]) for entry in found if entry["type"] == "file"}


def list_names(url: str) -> list[str]:
    """Sorted names directly below a folder; empty when there is no such folder."""
    with naming("list", url):
        if urls.is_local(url):
            path = urls.local_path(url)
            if not os.path.isdir(path):
                return []
            return sorted(name for name in os.listdir(path) if not name.startswith(TEMP_PREFIX))
        if urls.is_web(url):
            return _web_names(url)
        try:
            found = retrying(lambda: _fresh(url).ls(_path(url), detail=False))
        except FileNotFoundError:
            return []
        # Some stores list the folder itself, others nothing but the object when `url` names one.
        own = _path(url).strip("/")
        return sorted({urls.name(str(entry)) for entry in found if str(entry).strip("/") != own})


def remove(url: str) -> None:
    """Remove an object or a whole folder; nothing happens when it is absent."""
    with naming("remove", url):
        if urls.is_local(url):
            path = urls.local_path(url)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=False)
            elif os.path.lexists(path):
                os.unlink(path)
            return
        if urls.scheme(url) in s3.SCHEMES:
            s3.remove(urls.normalize(url))
        else:
            _remove_any(_fresh(url), _path(url))


# Of fsspec's filesystems: HTTP takes credentials from ~/.netrc and proxies from the environment, as others do.
OPTIONS: dict[str, dict[str, Any]] = {name: {"client_kwargs": {"trust_env": True}} for name in ("http", "https")}
_ASKED_AT_ONCE = 16
TEMP_PREFIX = ".tmp-"  # of files that are being written; what a killed writer left has it, too


def _remove_any(filesystem: Any, path: str) -> None:
    """Remove by fsspec's calls for one file each; `rm` takes `*`, `?` and `[` in a path for patterns."""
    if not retrying(lambda: filesystem.exists(path)):
        return
    found = retrying(lambda: filesystem.find(path, withdirs=True, detail=True))
    for each, facts in sorted(found.items(), reverse=True):
        remove_one = filesystem.rmdir if facts["type"] == "directory" else filesystem.rm_file
        with suppress(FileNotFoundError):
            retrying(partial(remove_one, each))
    filesystem.invalidate_cache()
    with suppress(FileNotFoundError):  # object stores have no folders
        if filesystem.isdir(path):
            retrying(lambda: filesystem.rmdir(path))


def _web_names(url: str) -> list[str]:
    """Names that a web server's page about a folder links to. Raises StorageError where there are none."""
    below = f"{_path(url).rstrip('/')}/"
    try:
        links = retrying(lambda: _filesystem(url).ls(below, detail=False))
    except Exception as error:
        if not faults.is_final(error):
            raise
        links = []  # no page about the folder; its files may be there all the same
    own = [str(link).removeprefix(below) for link in links if str(link).startswith(below)]
    names = sorted({urls.name(f"{below}{name}") for name in own if name and not re.search(r"[?#]|/.", name)})
    if not names:
        raise StorageError(
            f"cannot list {urls.redact(url)}: a web server has no list of files unless its page links to them; give "
            "names in full or with braces such as train-{000..099}.tar"
        )
    return names


def _web_sizes(url: str, names: Collection[str]) -> dict[str, int]:
    """Bytes of the files of these names that a web server has."""

    def ask(name: str) -> tuple[str, int | None]:
        try:
            return name, size(join(url, name))
        except FileNotFoundError:
            return name, None

    with ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="sizes") as pool:
        return {name: found for name, found in pool.map(ask, names) if found is not None}


def _create_remote(url: str, data: bytes) -> bool:
    """Create by If-None-Match. On S3 the object says whose it is, in its metadata.

    After a lost answer a second try finds our own object, and aiohttp makes that try whether we want it or not.
    """
    if urls.scheme(url) not in s3.SCHEMES:
        try:
            _filesystem(url).pipe_file(_path(url), data, mode="create")
        except FileExistsError:
            return False
        return True
    creation = {"creation": uuid.uuid4().hex}
    try:
        retrying(lambda: _filesystem(url).pipe_file(_path(url), data, mode="create", Metadata=creation))
    except OSError as error:
        # s3fs makes it a FileExistsError by a word in the answer that not every store says.
        if not isinstance(error, FileExistsError) and faults.status(error) != HTTPStatus.PRECONDITION_FAILED:
            raise
        try:
            found = retrying(lambda: _fresh(url).metadata(_path(url), refresh=True))
        except FileNotFoundError:
            return False  # another's, and gone again
        return dict(found) == creation
    return True


def _remote_range(url: str, start: int, length: int) -> bytes:
    """What there is of a range: S3 answers with an error when the object ends before its first byte."""
    try:
        return bytes(retrying(lambda: _filesystem(url).cat_file(_path(url), start=start, end=start + length)))
    except OSError as error:
        if faults.status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
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


def _filesystem(url: str) -> Any:
    scheme = urls.scheme(url)
    return s3.filesystem() if scheme in s3.SCHEMES else fsspec.filesystem(scheme, **OPTIONS.get(scheme, {}))


def _fresh(url: str) -> Any:
    """The filesystem without remembered listings: another machine may have written since."""
    filesystem = _filesystem(url)
    filesystem.invalidate_cache()
    return filesystem


def _path(url: str) -> str:
    return str(_filesystem(url)._strip_protocol(urls.normalize(url)))


@contextmanager
def naming(verb: str, url: str) -> Iterator[None]:
    """Give every storage failure the object's name; FileNotFoundError stays what it is."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if faults.is_absent(error):
            if isinstance(error, FileNotFoundError) and (error.filename is not None or urls.name(url) in str(error)):
                raise
            # S3 says no more than "NoSuchKey".
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), urls.redact(url)) from error
        raise StorageError(f"cannot {verb} {urls.redact(url)}: {urls.redact(faults.told(error))}") from error
