"""A storage is the same wherever it lies and however it is spelt."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.storage import files, identity
from orchestrator.storage.files import StorageError


def never() -> str:
    raise AssertionError("there is an id already")


def test_an_id_is_given_once(place: str) -> None:
    assert identity.read_id(place) is None
    assert identity.ensure_id(place, lambda: "first") == "first"
    assert identity.ensure_id(place, never) == identity.read_id(place) == "first"


def test_it_moves_along_and_knows_no_spelling(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    identity.ensure_id(str(tmp_path / "a"), lambda: "it")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for spelling in (f"/{tmp_path}/a", f"{tmp_path}/a/", f"{tmp_path}/link", f"{tmp_path}/a/../a"):
        assert identity.ensure_id(spelling, never) == "it"
    os.rename(tmp_path / "a", tmp_path / "b")
    assert identity.ensure_id(str(tmp_path / "b"), never) == "it"


def test_drivers_that_begin_together_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda number: identity.ensure_id(str(tmp_path / "s"), lambda: f"id-{number}"), range(8)))
    assert ids == {identity.read_id(str(tmp_path / "s"))}


@pytest.mark.parametrize("content", ["", "null", '{"id": 3}', '{"id": "a\'b"}', '{"id": ""}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    files.write_bytes(str(tmp_path / identity.NAME), content.encode())
    with pytest.raises(StorageError, match=r"storage\.json: must be .*; restore it, or remove it"):
        identity.ensure_id(str(tmp_path), lambda: "new")
