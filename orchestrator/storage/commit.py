"""Folders that are either complete or not there: payload first, then checksums, then a DONE file last.

A reader trusts a folder only when DONE is there and every payload file has the checksum that DONE names,
so a writer may die at any byte (pitfalls A2: what was reported is not what was committed).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from orchestrator.config.json_text import parse_object
from orchestrator.storage import files, urls

DONE = "DONE"


class CommitError(ValueError):
    """A committed folder does not hold what its DONE file says."""


def write(folder: str, payload: Mapping[str, bytes], about: Mapping[str, object]) -> None:
    """Write payload files and commit them by DONE, which carries sizes, sha256 sums and `about` (JSON)."""
    # What was committed there before is no longer: a writer that dies half-way must not leave its DONE standing.
    files.remove(files.join(folder, DONE))
    listed = {}
    for name, data in payload.items():
        files.write_bytes(files.join(folder, name), data)
        listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    done = json.dumps({"files": listed, "about": dict(about)}, sort_keys=True, indent=1)
    files.write_bytes(files.join(folder, DONE), done.encode())


def is_complete(folder: str) -> bool:
    """Whether the DONE file is there (the payload is verified when it is read)."""
    return files.exists(files.join(folder, DONE))


def about(folder: str) -> dict[str, object]:
    """What the writer said of the folder. Raises FileNotFoundError (not committed) or CommitError."""
    found = _done(folder)["about"]
    if not isinstance(found, dict):
        raise CommitError(f"{urls.redact(files.join(folder, DONE))}: 'about' is no object")
    return found


def read(folder: str) -> dict[str, bytes]:
    """The payload, verified. Raises FileNotFoundError (not committed) or CommitError (damaged)."""
    listed = _done(folder)["files"]
    if not isinstance(listed, dict):
        raise CommitError(f"{urls.redact(files.join(folder, DONE))}: 'files' is no object")
    payload = {}
    for name, facts in listed.items():
        if "/" in name or not isinstance(facts, dict) or "sha256" not in facts:
            raise CommitError(
                f"{urls.redact(files.join(folder, DONE))}: unreadable: its entry {name!r} is no file with a sha256"
            )
        url = files.join(folder, name)
        try:
            data = files.read_bytes(url)
        except FileNotFoundError:
            raise CommitError(f"{urls.redact(url)}: missing although {DONE} lists it") from None
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise CommitError(
                f"{urls.redact(url)}: damaged: {len(data)} bytes do not have the sha256 that {DONE} names"
            )
        payload[name] = data
    return payload


def _done(folder: str) -> dict[str, object]:
    url = files.join(folder, DONE)
    data = files.read_bytes(url)
    try:
        done = parse_object(data)
        done["files"], done["about"]
    except KeyError as error:
        raise CommitError(f"{urls.redact(url)}: unreadable: it must have the field {error}") from None
    except ValueError as error:
        raise CommitError(f"{urls.redact(url)}: unreadable: {error}") from None
    return done
