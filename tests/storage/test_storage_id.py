"""Storage ids: independent of the place and the spelling of the URL."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.storage import file_io, storage_id
from orchestrator.storage.file_io import StorageError


def never() -> str:
    raise AssertionError("there is an id already")


def test_an_id_is_given_once(place: str) -> None:
    assert storage_id.read_id(place) is None
    assert storage_id.ensure_id(place, lambda: "first") == "first"
    assert storage_id.ensure_id(place, never) == storage_id.read_id(place) == "first"


def test_it_moves_along_and_knows_no_spelling(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    storage_id.ensure_id(str(tmp_path / "a"), lambda: "it")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for spelling in (f"/{tmp_path}/a", f"{tmp_path}/a/", f"{tmp_path}/link", f"{tmp_path}/a/../a"):
        assert storage_id.ensure_id(spelling, never) == "it"
    os.rename(tmp_path / "a", tmp_path / "b")
    assert storage_id.ensure_id(str(tmp_path / "b"), never) == "it"


def test_drivers_that_begin_together_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda number: storage_id.ensure_id(str(tmp_path / "s"), lambda: f"id-{number}"), range(8)))
    assert ids == {storage_id.read_id(str(tmp_path / "s"))}


@pytest.mark.parametrize("content", ["", "null", '{"id": 3}', '{"id": "a\'b"}', '{"id": ""}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    file_io.write_bytes(str(tmp_path / storage_id.FILE_NAME), content.encode())
    with pytest.raises(StorageError, match=r"storage\.json: must be .*; restore it, or remove it"):
        storage_id.ensure_id(str(tmp_path), lambda: "new")
