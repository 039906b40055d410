"""Files by URL behave the same on local paths and on fsspec's filesystems."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader


def test_written_bytes_are_read(place: str) -> None:
    url = file_io.join(place, "folder", "object")
    assert not file_io.exists(url)
    for data in (b"", b"one", b"\x00\xff" * 1000):
        file_io.write_bytes(url, data)
        assert file_io.read_bytes(url) == data
        assert file_io.get_size(url) == len(data)
        assert file_io.exists(url)
    assert file_io.exists(file_io.join(place, "folder"))


def test_a_missing_object_is_file_not_found(place: str) -> None:
    url = file_io.join(place, "object")
    for call in (file_io.read_bytes, file_io.get_size):
        with pytest.raises(FileNotFoundError, match="object"):
            call(url)


def test_errors_name_the_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    below = str(tmp_path / "file" / "object")
    for call in (
        file_io.read_bytes,
        lambda url: file_io.write_bytes(url, b"x"),
        lambda url: file_io.create_bytes(url, b"x"),
    ):
        with pytest.raises(StorageError) as caught:
            call(below)
        assert below in str(caught.value)
        assert caught.value.__cause__ is not None


def test_unknown_schemes_are_storage_errors_without_secrets() -> None:
    with pytest.raises(StorageError, match="nonsense://host/x") as caught:
        file_io.read_bytes("nonsense://user:secret@host/x?key=secret")
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------ one step, one winner
def test_create_makes_and_never_replaces(place: str) -> None:
    url = file_io.join(place, "folder", "object")
    assert file_io.create_bytes(url, b"first")
    assert not file_io.create_bytes(url, b"second")
    assert file_io.read_bytes(url) == b"first"
    file_io.remove(url)
    assert file_io.create_bytes(url, b"third")
    assert file_io.list_names(file_io.join(place, "folder")) == ["object"]


def test_one_of_eight_creators_wins(tmp_path: Path) -> None:
    # Not on memory://, whose check and write are two steps.
    for attempt in range(25):
        url, ready = str(tmp_path / f"{attempt}" / "object"), threading.Barrier(8)

        def create(writer: int, url: str = url, ready: threading.Barrier = ready) -> bool:
            ready.wait(10)
            return file_io.create_bytes(url, f"writer {writer}".encode() * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert sum(won) == 1
        assert file_io.read_bytes(url) == f"writer {won.index(True)}".encode() * 1000
        assert file_io.list_names(str(tmp_path / f"{attempt}")) == ["object"], "no temporary file is left"


def test_a_reader_sees_the_old_bytes_or_the_new_ones(tmp_path: Path) -> None:
    url = str(tmp_path / "object")
    states = [bytes([letter]) * 200_000 for letter in b"ab"]
    file_io.write_bytes(url, states[0])
    ended, seen = threading.Event(), set()

    def read() -> None:
        while not ended.is_set():
            data = file_io.read_bytes(url)
            seen.add(data if data in states else b"torn")

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for turn in range(100):
            file_io.write_bytes(url, states[turn % 2])
        ended.set()
        for reader in readers:
            reader.result()
    assert seen <= set(states)
    assert file_io.list_names(str(tmp_path)) == ["object"]


def test_a_failed_write_leaves_the_old_object_and_no_temporary_file(tmp_path: Path) -> None:
    url = str(tmp_path / "object")
    file_io.write_bytes(url, b"old")
    with pytest.raises(StorageError):
        file_io.write_bytes(url, "no bytes")  # type: ignore[arg-type]
    assert file_io.read_bytes(url) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


# ------------------------------------------------------------------ folders
def test_listing(place: str) -> None:
    assert file_io.list_names(place) == []
    assert file_io.list_sizes(place) == {}
    for name, data in (("b", b"12"), ("a", b"1"), ("deep/c", b"123"), ("place", b"1234")):
        file_io.write_bytes(file_io.join(place, name), data)
    # A child may be called as its folder is.
    assert file_io.list_names(place) == ["a", "b", "deep", "place"]
    assert file_io.list_sizes(place) == {"a": 1, "b": 2, "place": 4}
    assert file_io.list_names(file_io.join(place, "a")) == [], "an object is no folder"


def test_writes_under_way_are_not_listed(tmp_path: Path) -> None:
    file_io.write_bytes(str(tmp_path / "a"), b"1")
    (tmp_path / ".tmp-half").write_bytes(b"1")
    assert file_io.list_names(str(tmp_path)) == ["a"]
    assert file_io.list_sizes(str(tmp_path)) == {"a": 1}


def test_remove(place: str) -> None:
    for name in ("a", "deep/b", "deep/deeper/c", "kept"):
        file_io.write_bytes(file_io.join(place, name), b"1")
    for gone in ("a", "deep", "never-there"):
        file_io.remove(file_io.join(place, gone))
        assert not file_io.exists(file_io.join(place, gone))
    assert file_io.list_names(place) == ["kept"]


def test_removing_a_link_leaves_what_it_points_at(tmp_path: Path) -> None:
    file_io.write_bytes(str(tmp_path / "folder" / "a"), b"1")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    file_io.remove(str(tmp_path / "link"))
    assert file_io.list_names(str(tmp_path)) == ["folder"]
    assert file_io.read_bytes(str(tmp_path / "folder" / "a")) == b"1"


# ------------------------------------------------------------------ names are literal
NAMES = ("[x]", "*", "?", "{a,b}", "[!a]", "**", "a b", "100%25", "a#b", "a?b", "r&d=1", "\u00fcber", "a+b")


def test_every_character_of_a_name_stands_for_itself(place: str) -> None:
    for name in (*NAMES, "x", "a", "b", "ab", "100%"):
        file_io.write_bytes(file_io.join(place, name, "kept"), name.encode())
    everything = sorted({*NAMES, "x", "a", "b", "ab", "100%"})
    assert file_io.list_names(place) == everything
    for name in NAMES:
        url = file_io.join(place, name, "kept")
        assert file_io.read_bytes(url) == name.encode()
        assert file_io.exists(url)
        assert file_io.get_size(url) == len(name.encode())
        assert file_io.list_sizes(file_io.join(place, name)) == {"kept": len(name.encode())}
        assert not file_io.create_bytes(url, b"other")
        with closing(RangeReader()) as ranges:
            assert bytes(ranges.read(url, 0, 1)) == name.encode()[:1]
        file_io.remove(file_io.join(place, name))
        everything.remove(name)
        assert file_io.list_names(place) == everything, f"{name!r} alone was to go"
