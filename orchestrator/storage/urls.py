"""URLs of places that hold bytes: local paths (absolute) and anything fsspec can open."""

from __future__ import annotations

import os
import re

from orchestrator.config.printable import redact, refusal_of_credentials

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


def absolute(url: str, field: str) -> str:
    """The URL with ~ expanded; ValueError when it is a relative path, whose meaning depends on the process, or holds
    a user name or password.

    A submitted job runs in a temporary copy of its working directory: what it wrote to a relative
    path would vanish with it (design: where things land).
    """
    if (reason := refusal_of_credentials(url, field)) is not None:
        raise ValueError(reason)
    if not is_local(url):
        return _without_slash(url)
    path = os.path.expanduser(local_path(url))
    if not os.path.isabs(path):
        raise ValueError(
            f"{field}: {url!r} is a relative path, which would vanish with the job's temporary working directory; "
            f"give an absolute path such as {os.path.abspath(path)!r} or a URL"
        )
    return os.path.normpath(path)
