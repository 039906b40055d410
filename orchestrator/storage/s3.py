"""S3 clients with time-outs and without hidden retries, and single ranged reads through them.

Endpoint and credentials come from the usual environment and files (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE,
a role ...). botocore and s3fs would each retry by themselves, 25 times for one of ours: both are told not to. (aiohttp
sends a request again, once, when the connection closes before the answer.)
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

import fsspec

from orchestrator.config.redaction import find_credentials_problem, redact
from orchestrator.storage import storage_errors, urls
from orchestrator.storage.storage_errors import call_with_retries

SCHEMES = frozenset({"s3", "s3a"})
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without a byte
_CHUNK_BYTES = 2**20

# What a store answers that takes no bulk delete: without Content-MD5 (MinIO before 2025, older Ceph), or at all (GCS).
_BULK_UNSUPPORTED_STATUSES = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.LENGTH_REQUIRED,
    HTTPStatus.NOT_IMPLEMENTED,
}
_BULK_DELETE_LIMIT = 1000  # objects of one bulk delete, the protocol's limit
_MAX_CONCURRENT_DELETES = 8
# botocore's variables for the endpoint; the first one that is set counts.
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_bulk_unsupported: weakref.WeakSet[Any] = weakref.WeakSet()  # filesystems whose store refused a bulk delete

T = TypeVar("T")


class DeleteError(OSError):
    """The store kept an object that was to be removed; `response` is laid out as botocore's."""

    def __init__(self, key: str, code: str, message: str) -> None:
        super().__init__(f"{key}: {code}: {message}")
        denied = code in ("AccessDenied", "ObjectLocked", "InvalidObjectState")
        status = HTTPStatus.FORBIDDEN if denied else HTTPStatus.INTERNAL_SERVER_ERROR
        self.response = {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": int(status)},
        }


class TruncatedError(ValueError):
    """An object ends before the bytes that were asked for. A ValueError: trying again is of no use."""


class ObjectReplacedError(ValueError):
    """An object is not the one of which the first bytes were read."""


class IncompleteBodyError(OSError):
    """A body ended before its announced end; the rest can be asked for."""


@dataclass
class ReadProgress:
    """How far a read has come, over all its requests."""

    done: int = 0
    identity: tuple[object, ...] | None = None  # of the object that was read so far


def get_filesystem() -> Any:
    """The process's S3 filesystem for whole objects; fsspec keeps it, though not over a fork."""
    made = fsspec.filesystem("s3", config_kwargs=_make_client_config(CONNECT_SECONDS, READ_SECONDS, connections=10))
    made.retries = 1
    return made


def remove(url: str) -> None:
    """Remove an object and everything below it as a folder; every character of the key stands for itself.

    fsspec's own `rm` takes `*`, `?` and `[` in a path for patterns, and ignores objects that the store kept.
    """
    made = get_filesystem()
    made.invalidate_cache()
    bucket, key, _ = made.split_path(url)
    keys = list(_iter_keys(made, bucket, f"{key}/" if key else ""))
    if key and _is_object(made, bucket, key):
        keys.append(key)
    if len(keys) > 1 and made not in _bulk_unsupported:
        try:
            for start in range(0, len(keys), _BULK_DELETE_LIMIT):
                call_with_retries(partial(_delete_bulk, made, bucket, keys[start : start + _BULK_DELETE_LIMIT]))
        except OSError as error:
            if storage_errors.get_http_status(error) not in _BULK_UNSUPPORTED_STATUSES:
                raise
            _bulk_unsupported.add(made)
    if len(keys) == 1 or made in _bulk_unsupported:
        with ThreadPoolExecutor(_MAX_CONCURRENT_DELETES, thread_name_prefix="delete") as pool:
            list(
                pool.map(
                    lambda each: call_with_retries(lambda: made.call_s3("delete_object", Bucket=bucket, Key=each)), keys
                )
            )
    made.invalidate_cache()


def _is_object(made: Any, bucket: str, key: str) -> bool:
    try:
        call_with_retries(lambda: made.call_s3("head_object", Bucket=bucket, Key=key))
    except OSError as error:
        if storage_errors.is_not_found(error):
            return False
        raise
    return True


def _iter_keys(made: Any, bucket: str, prefix: str) -> Iterator[str]:
    """Yield all keys with a prefix, the markers of empty folders among them."""
    token: dict[str, str] = {}
    while True:
        page = call_with_retries(partial(made.call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, **token))
        yield from (str(entry["Key"]) for entry in page.get("Contents", ()))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _delete_bulk(made: Any, bucket: str, keys: Sequence[str]) -> None:
    listed = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    for kept in made.call_s3("delete_objects", Bucket=bucket, Delete=listed).get("Errors", ()):
        if kept.get("Code") != "NoSuchKey":
            raise DeleteError(str(kept.get("Key")), str(kept.get("Code")), str(kept.get("Message")))


class PendingCalls:
    """Coroutines that threads wait for, all of which can be cancelled at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: set[Future[Any]] = set()
        self._cancelled = False

    def run(self, loop: asyncio.AbstractEventLoop, call: Coroutine[Any, Any, T], seconds: float) -> T:
        """Return what a coroutine on another thread's loop does. Raises TimeoutError, or ValueError once cancelled."""
        with self._lock:
            if self._cancelled:
                call.close()
                raise ValueError("the reader is closed")
            future = asyncio.run_coroutine_threadsafe(call, loop)
            self._futures.add(future)
        try:
            return future.result(max(0.0, seconds))
        except CancelledError:
            raise ValueError("the reader is closed") from None
        except BaseException:
            # Out of time, or Ctrl-C: without this the request would go on.
            future.cancel()
            raise
        finally:
            with self._lock:
                self._futures.discard(future)

    def cancel(self) -> None:
        """Cancel what is under way and refuse what is to come."""
        with self._lock:
            self._cancelled, futures = True, list(self._futures)
        for future in futures:
            future.cancel()


def _make_client_config(connect_seconds: float, read_seconds: float, connections: int) -> dict[str, Any]:
    """Return what botocore needs beside what it finds in the environment. Raises SettingError for a bad endpoint."""
    for name in ENDPOINTS:
        if problem := _problem_of_endpoint(name, os.environ.get(name, "")):
            raise storage_errors.SettingError(problem)
    return {
        "connect_timeout": connect_seconds,
        "read_timeout": read_seconds,
        "max_pool_connections": connections,
        "retries": {"total_max_attempts": 1},
    }


def _problem_of_endpoint(name: str, value: str) -> str | None:
    """Return what is wrong with the endpoint in a variable, without credentials; None when nothing is."""
    if not value:
        return None
    if re.match(r"https?://[^/]", value, re.IGNORECASE):
        reason = find_credentials_problem(value, name)
        return reason and f"{reason.partition(';')[0]}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
    return f"{name}: must be a URL such as https://HOST:9000, got {redact(value)!r}"


class S3Reader:
    """Ranged reads on one client, for any thread of the process that makes it."""

    def __init__(self, connect_seconds: float, read_seconds: float, connections: int) -> None:
        # A checksum of the whole object says nothing of a range.
        config = {
            **_make_client_config(connect_seconds, read_seconds, connections),
            "response_checksum_validation": "when_required",
        }
        # An instance of its own, as closing it must not take the connections of others.
        self._filesystem = fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True)
        self._pending = PendingCalls()

    def fill(self, url: str, start: int, view: memoryview, progress: ReadProgress, seconds: float) -> None:
        """Ask once for the bytes from `start` on and put them into the view as they come; `progress` counts them.

        Raises what went wrong; what came before is in the view. Nothing writes into it afterwards.
        """
        # Released at the end of the block: a request that is given up can then not write into memory used anew.
        with view[:] as target:
            self._run(self._fill(url, start, target, progress), seconds)

    def size(self, url: str, seconds: float) -> int:
        """Bytes of an object, by one request."""
        return int(self._run(self._head(url), seconds)["ContentLength"])

    def close(self) -> None:
        """Give up the reads that are under way and close the connections."""
        self._pending.cancel()
        creator = getattr(self._filesystem, "_s3creator", None)
        if creator is not None:
            self._filesystem.close_session(self._filesystem.loop, creator)

    def _run(self, call: Coroutine[Any, Any, T], seconds: float) -> T:
        return self._pending.run(self._filesystem.loop, call, seconds)

    async def _call(self, method: str, url: str, **arguments: str) -> Any:
        client = await self._filesystem.set_session()
        bucket, key, version = self._filesystem.split_path(urls.normalize_scheme(url))
        wanted = {"Bucket": bucket, "Key": key, **arguments, **({"VersionId": version} if version else {})}
        # Adds what the user told s3fs to send along, such as "requester pays".
        call = getattr(client, method)
        return await call(**self._filesystem._get_s3_method_kwargs(call, **wanted))

    async def _head(self, url: str) -> Any:
        return await self._call("head_object", url)

    async def _fill(self, url: str, start: int, target: memoryview, progress: ReadProgress) -> None:
        wanted = len(target)
        answer = await self._call("get_object", url, Range=f"bytes={start}-{start + wanted - 1}")
        body = answer["Body"]
        try:
            _check_response_range(answer, start, wanted, progress)
            filled = 0
            while filled < wanted:
                piece = await body.read(min(_CHUNK_BYTES, wanted - filled))
                if not piece:
                    raise IncompleteBodyError(f"the body ended after {filled} of {wanted} bytes")
                target[filled : filled + len(piece)] = piece
                filled += len(piece)
                progress.done += len(piece)
        finally:
            # A connection whose body was read to its end is back in the pool already; any other is closed.
            body.close()


def _check_response_range(answer: Any, start: int, wanted: int, progress: ReadProgress) -> None:
    """Whether the answer is the range that was asked for, of the object that was read before."""
    told = str(answer.get("ContentRange") or "")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
    # Some servers send the whole object for a range that begins at 0.
    first, last, total = (
        map(int, match.groups()) if match else (0, answer["ContentLength"] - 1, answer["ContentLength"])
    )
    if first != start:
        raise ValueError(f"the store sent bytes from {first} on where bytes from {start} were asked for")
    identity = (answer.get("ETag"), answer.get("LastModified"), total)
    if progress.identity is None:
        progress.identity = identity
    elif identity != progress.identity:
        raise ObjectReplacedError(
            "the object was replaced while it was read: ETag, time and size were "
            f"{_format_identity(progress.identity)} "
            f"and are {_format_identity(identity)}"
        )
    if last - first + 1 < wanted:
        raise TruncatedError(f"bytes {start} to {start + wanted} wanted, the object has {total}")


def _format_identity(identity: tuple[object, ...]) -> str:
    return ", ".join(map(str, identity))
