"""Folders that are either complete or not there: payload first, then checksums, then a DONE file last.

A reader trusts a folder only when DONE is there and every payload file has the checksum that DONE names,
so a writer may die at any byte (pitfalls A2: what was reported is not what was committed).
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_object
from orchestrator.storage import file_io

DONE = "DONE"


class CommitError(ValueError):
    """A committed folder does not hold what its DONE file says."""


def write_folder(folder: str, payload: Mapping[str, bytes], about: Mapping[str, object]) -> None:
    """Write payload files and commit them by DONE, which carries sizes, sha256 sums and `about` (JSON)."""
    # What was committed there before is no longer: a writer that dies half-way must not leave its DONE standing.
    file_io.remove(file_io.join(folder, DONE))
    listed = {}
    for name, data in payload.items():
        file_io.write_bytes(file_io.join(folder, name), data)
        listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    done = json.dumps({"files": listed, "about": dict(about)}, sort_keys=True, indent=1)
    file_io.write_bytes(file_io.join(folder, DONE), done.encode())


def is_complete(folder: str) -> bool:
    """Whether the DONE file is there (the payload is verified when it is read)."""
    return file_io.exists(file_io.join(folder, DONE))


def read_metadata(folder: str) -> dict[str, object]:
    """What the writer said of the folder. Raises FileNotFoundError (not committed) or CommitError."""
    found = _read_done_file(folder)["about"]
    if not isinstance(found, dict):
        raise CommitError(f"{redaction.redact(file_io.join(folder, DONE))}: 'about' is no object")
    return found


def read_folder(folder: str) -> dict[str, bytes]:
    """The payload, verified. Raises FileNotFoundError (not committed) or CommitError (damaged)."""
    listed = _read_done_file(folder)["files"]
    if not isinstance(listed, dict):
        raise CommitError(f"{redaction.redact(file_io.join(folder, DONE))}: 'files' is no object")
    payload = {}
    for name, facts in listed.items():
        if "/" in name or not isinstance(facts, dict) or "sha256" not in facts:
            raise CommitError(
                f"{redaction.redact(file_io.join(folder, DONE))}: unreadable: its entry {name!r} is no "
                "file with a sha256"
            )
        url = file_io.join(folder, name)
        try:
            data = file_io.read_bytes(url)
        except FileNotFoundError:
            raise CommitError(f"{redaction.redact(url)}: missing although {DONE} lists it") from None
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise CommitError(
                f"{redaction.redact(url)}: damaged: {len(data)} bytes do not have the sha256 that {DONE} names"
            )
        payload[name] = data
    return payload


def _read_done_file(folder: str) -> dict[str, object]:
    url = file_io.join(folder, DONE)
    data = file_io.read_bytes(url)
    try:
        done = parse_object(data)
        done["files"], done["about"]
    except KeyError as error:
        raise CommitError(f"{redaction.redact(url)}: unreadable: it must have the field {error}") from None
    except ValueError as error:
        raise CommitError(f"{redaction.redact(url)}: unreadable: {error}") from None
    return done


def check_zip_uncompressed(data: bytes) -> None:
    """Raise ValueError unless the bytes are a zip whose entries are stored as they are and no larger than the archive.

    torch.save and numpy.savez write nothing else; a compressed entry of a megabyte may unpack to gigabytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, UnicodeError) as error:
        raise ValueError(f"no zip archive ({error})") from None
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(f"its entry {packed!r} is compressed, which it never is")
    if (total := sum(entry.file_size for entry in entries)) > len(data):
        raise ValueError(f"its entries have {total} bytes by its directory, the archive {len(data)}")
