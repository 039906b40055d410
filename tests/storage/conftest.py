"""A place of each kind: a local folder and one of fsspec's filesystems."""

import uuid
from pathlib import Path

import pytest


@pytest.fixture(params=["local", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a folder that is not there yet."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/place"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/place"
