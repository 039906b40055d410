"""URLs of places that hold bytes: local paths (absolute) and anything fsspec can open."""

from __future__ import annotations

import os
import re

from orchestrator.config.printable import redact

__all__ = ["absolute", "is_local", "join", "local_path", "name", "redact", "scheme"]

# A scheme has at least two letters, so that a Windows drive is no scheme.
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")


def scheme(url: str) -> str:
    """The scheme of a URL, "file" for plain paths."""
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else "file"


def is_local(url: str) -> bool:
    """True for plain paths and file:// URLs."""
    return scheme(url) == "file"


def local_path(url: str) -> str:
    """The path of a local URL. Raises ValueError for any other URL."""
    if not is_local(url):
        raise ValueError(f"{redact(url)} is no local path")
    return url.removeprefix("file://")


def join(url: str, *parts: str) -> str:
    """A URL below another one; parts are relative, joined by single slashes."""
    pieces = [_without_slash(url)]
    for part in parts:
        if part.startswith("/") or _SCHEME.match(part):
            raise ValueError(f"{part!r} cannot be joined to {redact(url)}: it is not relative")
        pieces.append(part.strip("/"))
    head, rest = pieces[0], "/".join(pieces[1:])
    if not rest:
        return head
    return head + rest if head.endswith("/") else f"{head}/{rest}"


def _without_slash(url: str) -> str:
    """The URL without slashes at its end, but for those that make it a root: "/", "memory://", "file:///"."""
    match = _SCHEME.match(url)
    prefix = match.group(0) if match else ""
    rest = url[len(prefix) :]
    return prefix + (rest.rstrip("/") or rest[:1])


def name(url: str) -> str:
    """The last component of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


# s3:/bucket, s3:bucket, S3//bucket, http:/host: a slash or the colon is missing.
_MISSPELT = re.compile(r"^(s3a?|gcs|gs|az|abfs|hdfs|https?)(:/?(?!/)|//)", re.IGNORECASE)


def absolute(url: str, field: str) -> str:
    """The URL with ~ expanded; ValueError when it is a relative path, whose meaning depends on the process.

    A submitted job runs in a temporary copy of its working directory: what it wrote to a relative
    path would vanish with it (design: where things land).
    """
    if not is_local(url):
        rest = url.partition("://")[2]
        if rest.startswith("/"):
            raise ValueError(f"{field}: {redact(url)!r} names no host or bucket; give {_meant(url)!r}")
        return _without_slash(url)
    if _MISSPELT.match(url):
        raise ValueError(f"{field}: {redact(url)!r} is neither a URL nor an absolute path; give {_meant(url)!r}")
    path = os.path.expanduser(local_path(url))
    if path.startswith("~"):
        raise ValueError(
            f"{field}: {url!r} begins with a home folder, and there is none: HOME is unset, or passwd lacks that user; "
            "give an absolute path or a URL"
        )
    if not os.path.isabs(path):
        raise ValueError(
            f"{field}: {url!r} is a relative path, which would vanish with the job's temporary working directory; "
            f"give {_elsewhere(path)} or a URL"
        )
    return os.path.normpath(path)


def is_in_submitted_job() -> bool:
    """Return whether this process was started by Ray's job server, in a temporary copy of the working directory."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _meant(url: str) -> str:
    """Return the URL that a misspelt one stands for: two slashes after the colon."""
    begin, rest = re.split(r"[:/]+", redact(url), maxsplit=1)
    return f"{begin.lower()}://{rest}"


def _elsewhere(path: str) -> str:
    """Return what to give instead of a relative path."""
    if is_in_submitted_job():  # the folder that this process sees goes with the job
        return "the absolute path of a folder on the cluster's nodes, not of this job's copy of the working directory,"
    return f"an absolute path such as {os.path.abspath(path)!r}"
