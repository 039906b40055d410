"""Committed folders: complete or absent. The payload is written first, a DONE file with its checksums last.

A reader trusts a folder only when DONE is there and every payload file has the checksum that DONE names, so a writer
may die at any byte. A storage as a whole has an id in a small file, which moves with the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_object
from orchestrator.storage import file_io

DONE = "DONE"
STORAGE_ID_FILE = "storage.json"
_ID_PATTERN = re.compile(r"[\w.-]{1,64}", re.ASCII)
_ID_FILE_NOTE = (
    "The identity of this storage in MLflow; moves with the folder. Remove it from a copy that is to be a new storage."
)


class CommitError(ValueError):
    """A committed folder whose content does not match its DONE file."""


def write_folder(folder: str, payload: Mapping[str, bytes], metadata: Mapping[str, object]) -> None:
    """Write payload files and commit them by DONE, which holds sizes, sha256 sums and `metadata` (JSON)."""
    # An older DONE goes first: a writer that dies half-way must not leave it standing.
    file_io.remove(file_io.join(folder, DONE))
    files = {}
    for name, data in payload.items():
        file_io.write_bytes(file_io.join(folder, name), data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    done = json.dumps({"files": files, "about": dict(metadata)}, sort_keys=True, indent=1)
    file_io.write_bytes(file_io.join(folder, DONE), done.encode())


def is_complete(folder: str) -> bool:
    """Return whether the DONE file is there (the payload is verified when it is read)."""
    return file_io.exists(file_io.join(folder, DONE))


def read_metadata(folder: str) -> dict[str, object]:
    """Return the metadata of a folder. Raises FileNotFoundError (not committed) or CommitError."""
    return _read_done_file(folder)["about"]


def read_folder(folder: str) -> dict[str, bytes]:
    """Return the payload, verified. Raises FileNotFoundError (not committed) or CommitError (damaged)."""
    payload = {}
    for name, facts in _read_done_file(folder)["files"].items():
        if "/" in name or not isinstance(facts, dict) or "sha256" not in facts:
            done = redaction.redact(file_io.join(folder, DONE))
            raise CommitError(f"{done}: unreadable: its entry {name!r} must be a file with a sha256")
        url = file_io.join(folder, name)
        try:
            data = file_io.read_bytes(url)
        except FileNotFoundError:
            raise CommitError(f"{redaction.redact(url)}: missing although {DONE} lists it") from None
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            what = f"{len(data)} bytes do not have the sha256 that {DONE} names"
            raise CommitError(f"{redaction.redact(url)}: damaged: {what}")
        payload[name] = data
    return payload


def _read_done_file(folder: str) -> dict[str, dict[str, Any]]:
    url = file_io.join(folder, DONE)
    data = file_io.read_bytes(url)
    try:
        done = parse_object(data)
        for name in ("files", "about"):
            if not isinstance(done.get(name), dict):
                raise ValueError(f"{name!r} must be an object, got {done.get(name)!r}")
    except ValueError as error:
        raise CommitError(f"{redaction.redact(url)}: unreadable: {error}") from None
    return done


def check_zip_uncompressed(data: bytes) -> None:
    """Raise ValueError unless the bytes are a zip of uncompressed entries, together no larger than the archive.

    torch.save and numpy.savez write nothing else; a compressed entry of a megabyte may unpack to gigabytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, UnicodeError) as error:
        raise ValueError(f"must be a zip archive: {error}") from None
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(f"its entry {packed!r} is compressed; entries must be stored as they are")
    if (total := sum(entry.file_size for entry in entries)) > len(data):
        raise ValueError(f"its entries must fit in its {len(data)} bytes, got {total} by its directory")


def ensure_storage_id(storage: str, make_id: Callable[[], str]) -> str:
    """Return the id of a storage, which becomes `make_id()` when there is none; of several drivers one wins.

    Raises StorageError when it cannot be written, or is damaged.
    """
    url = file_io.join(storage, STORAGE_ID_FILE)
    if not file_io.exists(url):
        file_io.create_bytes(url, json.dumps({"id": make_id(), "about": _ID_FILE_NOTE}, indent=1).encode())
    known = file_io.read_json_or_empty(url).get("id")
    if not isinstance(known, str) or not _ID_PATTERN.fullmatch(known):
        raise file_io.StorageError(
            f"{redaction.redact(url)}: must be a JSON object with an id of letters and digits; restore it, or remove "
            "it and MLflow records every run of this storage anew"
        )
    return known
