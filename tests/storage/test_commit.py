"""Committed folders: complete or absent, wherever the writer died."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.storage import commit, file_io
from orchestrator.storage.commit import DONE, CommitError
from orchestrator.storage.file_io import StorageError
from tests.support.tiny_shards import flip_byte

PAYLOAD = {"a": b"first file", "b": b"", "c": b"third file"}
ABOUT: dict[str, object] = {"samples": 3, "by": "a test"}


def test_a_committed_folder_is_read(place: str) -> None:
    folder = file_io.join(place, "one")
    commit.write_folder(folder, PAYLOAD, ABOUT)
    assert commit.is_complete(folder)
    assert commit.read_folder(folder) == PAYLOAD
    assert commit.read_metadata(folder) == ABOUT


def test_an_empty_folder_is_not_complete(place: str) -> None:
    assert not commit.is_complete(place)
    for call in (commit.read_folder, commit.read_metadata):
        with pytest.raises(FileNotFoundError):
            call(place)


class _KilledError(BaseException):
    """The writer's process ends here."""


class _Dying(dict[str, bytes]):
    """A payload whose writer is killed before file number `after`."""

    def __init__(self, payload: dict[str, bytes], after: int) -> None:
        super().__init__(payload)
        self._after = after

    def items(self) -> Iterator[tuple[str, bytes]]:  # type: ignore[override]
        for number, item in enumerate(super().items()):
            if number == self._after:
                raise _KilledError
            yield item
        if self._after == len(self):
            raise _KilledError


@pytest.mark.parametrize("after", range(len(PAYLOAD) + 1))
@pytest.mark.parametrize("rewritten", [False, True], ids=["new", "rewritten"])
def test_a_writer_killed_at_any_file_leaves_nothing_complete(place: str, after: int, rewritten: bool) -> None:
    if rewritten:
        commit.write_folder(place, {name: b"older" for name in PAYLOAD}, ABOUT)
    with pytest.raises(_KilledError):
        commit.write_folder(place, _Dying(PAYLOAD, after), ABOUT)
    assert not commit.is_complete(place)
    with pytest.raises(FileNotFoundError):
        commit.read_folder(place)
    commit.write_folder(place, PAYLOAD, ABOUT)
    assert commit.read_folder(place) == PAYLOAD


def test_a_missing_file_is_named(place: str) -> None:
    commit.write_folder(place, PAYLOAD, ABOUT)
    file_io.remove(file_io.join(place, "c"))
    with pytest.raises(CommitError, match=f"{file_io.join(place, 'c')}: missing"):
        commit.read_folder(place)


@pytest.mark.parametrize("byte", range(len(PAYLOAD["a"])))
def test_a_flipped_byte_of_the_payload_is_found(tmp_path: Path, byte: int) -> None:
    commit.write_folder(str(tmp_path), PAYLOAD, ABOUT)
    flip_byte(tmp_path / "a", byte)
    with pytest.raises(CommitError, match=r"/a: damaged"):
        commit.read_folder(str(tmp_path))


def test_truncation_and_growth_are_found(tmp_path: Path) -> None:
    for damaged in (PAYLOAD["a"][:-1], PAYLOAD["a"] + b"x"):
        commit.write_folder(str(tmp_path), PAYLOAD, ABOUT)
        file_io.write_bytes(str(tmp_path / "a"), damaged)
        with pytest.raises(CommitError, match="damaged"):
            commit.read_folder(str(tmp_path))


@pytest.mark.parametrize("bit", [0x01, 0x02, 0x80, 0xFF])
def test_a_damaged_done_file_never_gives_another_payload(tmp_path: Path, bit: int) -> None:
    commit.write_folder(str(tmp_path), {"a": b"data"}, {"n": 1})
    done = (tmp_path / DONE).read_bytes()
    for where in range(len(done)):
        (tmp_path / DONE).write_bytes(done[:where] + bytes([done[where] ^ bit]) + done[where + 1 :])
        try:
            found = commit.read_folder(str(tmp_path))
        except CommitError:
            continue
        assert found == {"a": b"data"}


@pytest.mark.parametrize(
    "done",
    [b"", b"[]", b"7", b'{"files": {}}', b'{"files": [], "about": {}}', b'{"files": {"a": 1}, "about": {}}',
     b'{"files": {"/etc/hosts": {"sha256": ""}}, "about": {}}', b"\xff"],
)  # fmt: skip
def test_a_done_file_of_another_shape_is_an_error(tmp_path: Path, done: bytes) -> None:
    (tmp_path / DONE).write_bytes(done)
    with pytest.raises(CommitError, match=DONE):
        commit.read_folder(str(tmp_path))


def test_metadata_must_be_an_object(tmp_path: Path) -> None:
    (tmp_path / DONE).write_text(json.dumps({"files": {}, "about": [1]}))
    with pytest.raises(CommitError, match="about"):
        commit.read_metadata(str(tmp_path))


# ------------------------------------------------------------------ the id of a storage
def never() -> str:
    raise AssertionError("there is an id already")


def test_an_id_is_given_once(place: str) -> None:
    assert commit.ensure_storage_id(place, lambda: "first") == "first"
    assert commit.ensure_storage_id(place, never) == "first"


def test_an_id_moves_with_its_folder_and_ignores_the_spelling(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    commit.ensure_storage_id(str(tmp_path / "a"), lambda: "it")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for spelling in (f"/{tmp_path}/a", f"{tmp_path}/a/", f"{tmp_path}/link", f"{tmp_path}/a/../a"):
        assert commit.ensure_storage_id(spelling, never) == "it"
    os.rename(tmp_path / "a", tmp_path / "b")
    assert commit.ensure_storage_id(str(tmp_path / "b"), never) == "it"


def test_drivers_that_start_together_agree_on_an_id(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(
            pool.map(lambda number: commit.ensure_storage_id(str(tmp_path / "s"), lambda: f"id-{number}"), range(8))
        )
    assert ids == {commit.ensure_storage_id(str(tmp_path / "s"), never)}


@pytest.mark.parametrize("content", ["", "null", '{"id": 3}', '{"id": "a\'b"}', '{"id": ""}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    file_io.write_bytes(str(tmp_path / commit.STORAGE_ID_FILE), content.encode())
    with pytest.raises(StorageError, match=r"storage\.json: must be .*; restore it, or remove it"):
        commit.ensure_storage_id(str(tmp_path), lambda: "new")
