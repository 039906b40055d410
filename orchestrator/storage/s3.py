"""S3 clients with time-outs and without hidden retries, and single ranged reads through them.

Endpoint and credentials come from the usual environment and files (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE,
a role ...). botocore and s3fs would each retry by themselves, 25 times for each retry here: both are switched off.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import fsspec

from orchestrator.config.redaction import find_credentials_problem, redact
from orchestrator.storage import urls
from orchestrator.storage.storage_errors import SettingError, call_with_retries

SCHEMES = frozenset({"s3", "s3a"})
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without a byte
_CHUNK_BYTES = 2**20
_MAX_CONCURRENT_DELETES = 8
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # botocore's variables; the first that is set counts

T = TypeVar("T")


class TruncatedError(ValueError):
    """Error of an object that ends before the requested bytes. A ValueError, since a retry cannot help."""


@dataclass
class ReadProgress:
    """Bytes read so far, over all requests of one read."""

    done: int = 0
    identity: tuple[object, ...] | None = None  # of the object that is being read


def get_filesystem() -> Any:
    """Return the process's S3 filesystem for whole objects; fsspec caches it, though not over a fork."""
    filesystem = fsspec.filesystem("s3", config_kwargs=_make_client_config(CONNECT_SECONDS, READ_SECONDS, 10))
    filesystem.retries = 1
    return filesystem


def remove(url: str) -> None:
    """Remove an object and everything below it as a folder; every character of the key stands for itself.

    Unlike fsspec's `rm`, which reads patterns, and by single deletes, since some stores reject bulk deletes.
    """
    filesystem = get_filesystem()
    filesystem.invalidate_cache()
    bucket, key, _ = filesystem.split_path(url)

    def delete(name: str) -> None:
        with suppress(FileNotFoundError):  # most stores answer 204, GCS 404
            call_with_retries(partial(filesystem.call_s3, "delete_object", Bucket=bucket, Key=name))

    keys = list(_iter_keys(filesystem, bucket, f"{key}/" if key else ""))
    with ThreadPoolExecutor(_MAX_CONCURRENT_DELETES, thread_name_prefix="delete") as pool:
        list(pool.map(delete, [*keys, key] if key else keys))
    filesystem.invalidate_cache()


def _iter_keys(filesystem: Any, bucket: str, prefix: str) -> Iterator[str]:
    """Yield all keys with a prefix, the markers of empty folders among them."""
    token: dict[str, str] = {}
    while True:
        page = call_with_retries(partial(filesystem.call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, **token))
        yield from (str(entry["Key"]) for entry in page.get("Contents", ()))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


class PendingCalls:
    """Coroutines that threads wait for; `cancel` ends all of them."""

    def __init__(self) -> None:
        self._futures: set[Future[Any]] = set()
        self._cancelled = False

    def run(self, loop: asyncio.AbstractEventLoop, call: Coroutine[Any, Any, T], seconds: float) -> T:
        """Return the result of a coroutine on another thread's loop. Raises TimeoutError; ValueError once cancelled."""
        future = asyncio.run_coroutine_threadsafe(call, loop)
        self._futures.add(future)
        try:
            if self._cancelled:
                raise CancelledError
            return future.result(max(0.0, seconds))
        except CancelledError:
            raise ValueError("the reader is closed") from None
        finally:
            future.cancel()  # Out of time, or Ctrl-C: without this the request would continue.
            self._futures.discard(future)

    def cancel(self) -> None:
        """Cancel all running calls and reject later ones."""
        self._cancelled = True
        for future in list(self._futures):
            future.cancel()


def _make_client_config(connect_seconds: float, read_seconds: float, connections: int) -> dict[str, Any]:
    """Return botocore's settings beside those of the environment. Raises SettingError for a bad endpoint."""
    for name in ENDPOINTS:
        if value := os.environ.get(name):
            if not re.match(r"https?://[^/]", value, re.IGNORECASE):
                raise SettingError(f"{name}: must be a URL such as https://HOST:9000, got {redact(value)!r}")
            if problem := find_credentials_problem(value, name):
                what = problem.partition(";")[0]
                raise SettingError(f"{what}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    return {
        "connect_timeout": connect_seconds,
        "read_timeout": read_seconds,
        "max_pool_connections": connections,
        "retries": {"total_max_attempts": 1},
    }


class S3Reader:
    """Ranged reads on one client, for any thread of the process that makes it."""

    def __init__(self, connect_seconds: float, read_seconds: float, connections: int) -> None:
        config = _make_client_config(connect_seconds, read_seconds, connections)
        # The checksum of a whole object does not match a range of it.
        config["response_checksum_validation"] = "when_required"
        # An instance of its own: closing it must not close the connections of others.
        self._filesystem = fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True)
        self._pending = PendingCalls()

    def fill(self, url: str, start: int, view: memoryview, progress: ReadProgress, seconds: float) -> None:
        """Request the bytes of the view once; `progress` counts those that came. Raises the client's own errors."""
        # Released at the end of the block: an abandoned request cannot write into reused memory.
        with view[:] as target:
            self._pending.run(self._filesystem.loop, self._fill(url, start, target, progress), seconds)

    def close(self) -> None:
        """Cancel the running reads and close the connections."""
        self._pending.cancel()
        # Private to s3fs. Without it the connections close with the process.
        creator = getattr(self._filesystem, "_s3creator", None)
        if creator is not None:
            self._filesystem.close_session(self._filesystem.loop, creator)

    async def _fill(self, url: str, start: int, target: memoryview, progress: ReadProgress) -> None:
        length, client = len(target), await self._filesystem.set_session()
        bucket, key, version = self._filesystem.split_path(urls.normalize_scheme(url))
        request = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{start + length - 1}"}
        request |= {"VersionId": version} if version else {}
        # Private to s3fs: adds the user's options, such as "requester pays", that the method knows.
        add_options = getattr(self._filesystem, "_get_s3_method_kwargs", None)
        options = add_options(client.get_object, **request) if add_options else {**self._filesystem.req_kw, **request}
        answer = await client.get_object(**options)
        body = answer["Body"]
        try:
            _check_response_range(answer, start, length, progress)
            filled = 0
            while filled < length:
                piece = await body.read(min(_CHUNK_BYTES, length - filled))
                if not piece:
                    raise OSError(f"the body ended after {filled} of {length} bytes")
                target[filled : filled + len(piece)] = piece
                filled += len(piece)
                progress.done += len(piece)
        finally:
            # A connection whose body was read to its end is in the pool already; any other is closed.
            body.close()


def _check_response_range(answer: Any, start: int, length: int, progress: ReadProgress) -> None:
    """Raise ValueError unless the answer is the requested range of the object that was read before."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", str(answer.get("ContentRange") or ""))
    length_sent = answer.get("ContentLength", 0)  # chunked answers have none
    # Some servers send the whole object for a range that begins at 0.
    first, last, total = map(int, match.groups()) if match else (0, length_sent - 1, length_sent)
    if first != start:
        raise ValueError(f"the store sent bytes from {first} on, not from {start}")
    identity = (answer.get("ETag"), answer.get("LastModified"), total)
    if progress.identity is None:
        progress.identity = identity
    elif identity != progress.identity:
        before, now = (", ".join(map(str, facts)) for facts in (progress.identity, identity))
        raise ValueError(f"the object was replaced while it was read: ETag, time and size were {before} and are {now}")
    if last - first + 1 < length:
        raise TruncatedError(f"bytes {start} to {start + length} wanted, the object has {total}")
