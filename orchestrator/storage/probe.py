"""A write-and-read probe of a storage place, run before work starts and on the nodes that will do it."""

from __future__ import annotations

import uuid

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
