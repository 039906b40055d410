"""Probes of a storage place, run before work starts: what can be written there, and who may write it once."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from orchestrator.storage import files, urls


def problem(url: str) -> str | None:
    """None when a small object could be written, read back and removed below `url`; else what went wrong."""
    probe = files.join(url, f"probe-{uuid.uuid4().hex}")
    data = uuid.uuid4().bytes
    try:
        files.write_bytes(probe, data)
        if files.read_bytes(probe) != data:
            return f"{urls.redact(url)}: what was written is not what is read back"
        files.remove(probe)
    except (OSError, ValueError) as error:
        return f"{urls.redact(url)}: not writable: {error}"
    return None


def outlook(url: str) -> str | None:
    """Return what speaks against writing below `url`, found without writing; None when nothing does."""
    if not urls.is_local(url):
        try:
            files.list_names(url)
        except (OSError, ValueError) as error:
            return f"{urls.redact(url)}: {error}"
        return None
    path = Path(urls.local_path(url))
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    why = "this user may not write there" if there.is_dir() else "it is not a folder"
    return f"{path}: not writable: {there}: {why}"


def unguarded(url: str) -> str | None:
    """None when an object below `url` can be created once only, or it is not known; else what that means.

    Some servers take a conditional create (If-None-Match) for an ordinary one, and say nothing.
    """
    if urls.is_local(url):
        return None  # link(2) holds
    probe = files.join(url, f"probe-{uuid.uuid4().hex}")
    try:
        files.write_bytes(probe, b"first")
        try:
            again = files.create_bytes(probe, b"second")
        finally:
            files.remove(probe)
    except (OSError, ValueError):
        return None  # `problem` tells what is wrong
    if not again:
        return None
    return (
        f"{urls.redact(url)}: this store ignores conditional creates (If-None-Match), so it cannot keep a second "
        "driver from training the same run: never start a job twice at the same time"
    )
