"""Places of tar members by headers alone: the same as tarfile's, and no cut is taken for the end."""

import io
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.data.build import tar_reader
from orchestrator.data.build.tar_reader import MemberRange, iter_member_ranges
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io
from orchestrator.storage.ranged_reads import RangeReader
from tests.support import imagenet

LONG = "folder/" * 30 + "name.JPEG"


def listed(url: str, inside: MemberRange | None = None) -> list[MemberRange]:
    with closing(RangeReader(2)) as ranges:
        return list(iter_member_ranges(ranges, url, inside))


def rich_tar(form: int) -> bytes:
    """Long and foreign names, folders, links, an empty file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, size in (("a.JPEG", 700), (LONG, 512), ("é/ü.JPEG", 3), ("empty.JPEG", 0), ("../../etc/x.JPEG", 9)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, 1.5
            archive.addfile(info, io.BytesIO(b"x" * size))
        folder, link = tarfile.TarInfo("folder"), tarfile.TarInfo("link.JPEG")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "a.JPEG"
        link.size = 700  # of what it points at; no bytes follow
        archive.addfile(folder)
        archive.addfile(link)
        last = tarfile.TarInfo("z.JPEG")
        last.size = 1
        archive.addfile(last, io.BytesIO(b"z"))
    return buffer.getvalue()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("place", ["local", "memory"])
def test_members_are_those_of_tarfile(tmp_path: Path, form: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_reader, "BLOCK_BYTES", 1300)  # headers that lie across blocks
    url = str(tmp_path / "x.tar") if place == "local" else "memory://members/x.tar"
    data = rich_tar(form)
    file_io.write_bytes(url, data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        theirs = [MemberRange(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert listed(url) == theirs
    assert LONG in {member.name for member in theirs}


def test_a_tar_in_a_tar_is_walked_in_place(tmp_path: Path) -> None:
    inner = imagenet.tar([("a.JPEG", b"first"), ("b.JPEG", b"second")])
    data = imagenet.tar([("one.tar", inner), ("two.tar", inner)])
    (tmp_path / "x.tar").write_bytes(data)
    outer = listed(str(tmp_path / "x.tar"))
    assert [member.name for member in outer] == ["one.tar", "two.tar"]
    for tar in outer:
        found = listed(str(tmp_path / "x.tar"), tar)
        assert [data[m.offset : m.offset + m.length] for m in found] == [b"first", b"second"]


def test_a_remote_tar_is_read_in_blocks_and_large_bodies_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_reader, "BLOCK_BYTES", 8192)
    url = "memory://members/large.tar"
    sizes = [1000] * 60 + [200_000] * 3
    file_io.write_bytes(url, imagenet.tar((f"{n}.JPEG", bytes(size)) for n, size in enumerate(sizes)))
    with closing(RangeReader(2)) as ranges:
        assert [m.length for m in iter_member_ranges(ranges, url)] == sizes
        assert ranges.transfer.requests < 25
        assert ranges.transfer.bytes < 200_000


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_cut_anywhere_is_told_with_object_and_byte(tmp_path: Path, place: str) -> None:
    data = imagenet.tar([("a.JPEG", b"x" * 700), ("b.JPEG", b"y" * 100)])
    end = 512 + 1024 + 512 + 512
    for cut in (*range(128, end, 128), end, end + 100, end + 511):
        url = str(tmp_path / f"{cut}.tar") if place == "local" else f"memory://members/{cut}.tar"
        file_io.write_bytes(url, data[:cut])
        with pytest.raises(DataError, match=rf"{cut}\.tar: truncated at byte {cut}"):
            listed(url)
    (tmp_path / "whole.tar").write_bytes(data[: end + 512])
    assert len(listed(str(tmp_path / "whole.tar"))) == 2


def test_damage_is_told_with_the_byte(tmp_path: Path) -> None:
    data = bytearray(imagenet.tar([("a.JPEG", b"x" * 700), ("b.JPEG", b"y" * 100)]))
    data[1536 + 20] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar: truncated or damaged at byte 1536"):
        listed(str(tmp_path / "x.tar"))


def test_an_inner_tar_that_is_cut_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(imagenet.tar([("n01.tar", imagenet.tar([("a.JPEG", b"x")])[:1100])]))
    (tar,) = listed(str(tmp_path / "x.tar"))
    with pytest.raises(DataError, match=r"x\.tar: n01\.tar: truncated at byte 1612"):
        listed(str(tmp_path / "x.tar"), tar)


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**30 + 4096)
    with pytest.raises(DataError, match="extended header at byte 0 claims 1073741824 bytes"):
        listed(str(tmp_path / "x.tar"))
