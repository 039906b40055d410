"""What a storage is, wherever it lies and however its place is spelt: an id in a small file inside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from orchestrator.config import redaction
from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError

FILE_NAME = "storage.json"
_ID_PATTERN = re.compile(r"[\w.-]{1,64}", re.ASCII)
_FILE_NOTE = (
    "The identity of this storage in MLflow; moves with the folder. Remove it from a copy that is to be a new storage."
)


def read_id(storage: str) -> str | None:
    """Return the id of a storage; None when it has none yet, or one that makes no sense."""
    found = file_io.read_json_or_empty(file_io.join(storage, FILE_NAME)).get("id")
    return found if isinstance(found, str) and _ID_PATTERN.fullmatch(found) else None


def ensure_id(storage: str, make: Callable[[], str]) -> str:
    """Return the id of a storage, which becomes `make()` when there is none; of several drivers one wins.

    Raises StorageError when it cannot be written, or is damaged.
    """
    if (found := read_id(storage)) is not None:
        return found
    where = file_io.join(storage, FILE_NAME)
    file_io.create_bytes(where, json.dumps({"id": make(), "about": _FILE_NOTE}, indent=1).encode())
    if (found := read_id(storage)) is None:
        raise StorageError(
            f"{redaction.redact(where)}: must be a JSON object with an id of letters and digits; restore "
            "it, or remove it "
            "and MLflow gets every run of this storage anew"
        )
    return found
