"""Identity of a storage, independent of its URL: an id in a small file inside it."""

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
    """Return the id of a storage; None when it has none yet, or an invalid one."""
    value = file_io.read_json_or_empty(file_io.join(storage, FILE_NAME)).get("id")
    return value if isinstance(value, str) and _ID_PATTERN.fullmatch(value) else None


def ensure_id(storage: str, make_id: Callable[[], str]) -> str:
    """Return the id of a storage, which becomes `make_id()` when there is none; of several drivers one wins.

    Raises StorageError when it cannot be written, or is damaged.
    """
    if (known := read_id(storage)) is not None:
        return known
    url = file_io.join(storage, FILE_NAME)
    file_io.create_bytes(url, json.dumps({"id": make_id(), "about": _FILE_NOTE}, indent=1).encode())
    if (created := read_id(storage)) is None:
        raise StorageError(
            f"{redaction.redact(url)}: must be a JSON object with an id of letters and digits; restore it, or remove "
            "it and MLflow records every run of this storage anew"
        )
    return created
