"""One pass over a tar: every member found where it lies, every cut noticed, nothing taken for a path."""

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.build import shard_scan, tar_reader
from orchestrator.data.build.tar_reader import MemberRange, TarMember, iter_member_ranges
from orchestrator.data.build.tar_writer import encode_tar
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io
from orchestrator.storage.ranged_reads import RangeReader
from tests.support import imagenet, tiny_shards

WANTED = ("jpg", "cls")
WHOLE = encode_tar(tiny_shards.samples(3))
LONG = "/".join(["a-folder-with-a-name"] * 9) + "/" + "x" * 150


def members(data: bytes, block: int | None = None) -> list[TarMember]:
    """The members, read from memory or, in blocks of this size, from an object that is hashed on the way."""
    if block is None:
        return list(
            tar_reader.iter_members(lambda start, length: data[start : start + length], len(data), "x.tar", WANTED)
        )
    file_io.write_bytes("memory://tars/x.tar", data)
    with closing(RangeReader()) as ranges, pytest.MonkeyPatch.context() as patched:
        patched.setattr(tar_reader, "BLOCK_BYTES", block)
        reader = tar_reader.ObjectReader(ranges, "memory://tars/x.tar", is_hashed=True)
        found = list(tar_reader.iter_members(reader.read, reader.size, "x.tar", WANTED))
        assert reader.compute_sha256() == hashlib.sha256(data).hexdigest()
    return found


def tar(entries: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def with_link(kind: bytes, name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "elsewhere"
        archive.addfile(info)
    return buffer.getvalue()


# ------------------------------------------------------------------ what is there
@pytest.mark.parametrize("block", [None, 1, 100, 512, 1000, 4096])
def test_members_lie_where_they_are_stated_to(block: int | None) -> None:
    found = members(WHOLE, block)
    assert [f"{member.key}.{member.extension}" for member in found] == [
        f"sample-{n:03d}.{e}" for n in range(3) for e in ("cls", "jpg")
    ]
    for member in found:
        assert WHOLE[member.offset : member.offset + len(member.payload)] == member.payload
    assert [bytes(m.payload) for m in found if m.extension == "jpg"] == [s.image for s in tiny_shards.samples(3)]


SHORT = ("a.jpg", "d/é.jpg", "/".join(["y" * 60] * 3) + ".jpg")  # ustar has no room for LONG


@pytest.mark.parametrize(
    ("form", "name"),
    [*((tarfile.USTAR_FORMAT, name) for name in SHORT),
     *((form, name) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for name in (*SHORT, LONG + ".jpg"))],
)  # fmt: skip
def test_names_of_all_formats(form: int, name: str) -> None:
    data = tar([("b.cls", b"1"), (name, b"pixels" * 200), ("c.cls", b"2")], form)
    found = members(data, 700)
    assert [(member.key, member.extension) for member in found] == [
        ("b", "cls"), (name.removesuffix(".jpg"), "jpg"), ("c", "cls")
    ]  # fmt: skip
    assert data[found[1].offset :].startswith(found[1].payload)
    assert bytes(found[1].payload) == b"pixels" * 200


def test_what_is_no_sample_is_skipped() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made here"}) as out:
        for kind, name in ((tarfile.DIRTYPE, "./"), (tarfile.DIRTYPE, "d.jpg/"), (tarfile.SYMTYPE, "link.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "a", 0
            out.addfile(info)
        for name in ("README", ".hidden.jpg", "._a.jpg", "a.seg.png", "big.bin"):
            info = tarfile.TarInfo(name)
            info.size = 3000
            out.addfile(info, io.BytesIO(bytes(3000)))
        info = tarfile.TarInfo("./d//./a.JPG")
        info.size = 3
        out.addfile(info, io.BytesIO(b"abc"))
    (found,) = members(buffer.getvalue(), 999)
    assert (found.key, found.extension, found.payload) == ("d/a", "jpg", b"abc")


def test_a_size_in_a_pax_header_counts() -> None:
    """Sizes over 8 GiB stand there, and some writers put every size there."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 3, {"size": "3"}
        out.addfile(info, io.BytesIO(b"abc"))
    data = bytearray(buffer.getvalue())
    header = data.index(b"a.jpg\0")
    data[header + 124 : header + 136] = b"%011o\0" % 0
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    (found,) = members(bytes(data))
    assert bytes(found.payload) == b"abc"


@pytest.mark.parametrize("is_hashed", [True, False])
def test_of_any_url_in_bounded_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_hashed: bool) -> None:
    monkeypatch.setattr(tar_reader, "BLOCK_BYTES", 1000)
    for url in (str(tmp_path / "x.tar"), "memory://tars/x.tar"):
        file_io.write_bytes(url, WHOLE)
        with closing(RangeReader()) as ranges:
            reader = tar_reader.ObjectReader(ranges, url, is_hashed)
            found = list(tar_reader.iter_members(reader.read, reader.size, url, WANTED))
            assert [member.payload for member in found] == [member.payload for member in members(WHOLE)]
            if is_hashed:
                assert ranges.transfer.bytes == len(WHOLE), "each byte is read once"
                assert reader.compute_sha256() == hashlib.sha256(WHOLE).hexdigest()


# ------------------------------------------------------------------ what is cut or damaged
@given(st.integers(0, len(WHOLE)))
def test_any_cut_is_found_or_harmless(cut: int) -> None:
    try:
        found = shard_scan.index_tar(WHOLE[:cut], "x.tar")
    except DataError as error:
        assert "x.tar: " in str(error)
        return
    assert found.to_bytes() == shard_scan.index_tar(WHOLE, "x.tar").to_bytes()
    assert WHOLE[:cut].endswith(bytes(512))


def test_cuts_are_named_by_byte() -> None:
    found = members(WHOLE)
    last = found[-1]
    header = last.offset - 512
    for cut, said in (
        (0, "empty: 0 bytes are no tar"),
        (header, f"truncated at byte {header}: the end of the archive, a block of zeros, is missing"),
        (header + 7, f"truncated at byte {header + 7}: inside the header of a member"),
        (last.offset, f"truncated at byte {last.offset}: inside member 'sample-002.jpg'"),
        (
            last.offset + 9,
            f"truncated at byte {last.offset + 9}: inside member 'sample-002.jpg', {len(last.payload)} bytes",
        ),
        (len(WHOLE.rstrip(b"\0")), f"truncated at byte {len(WHOLE.rstrip(bytes(1)))}: inside"),
    ):
        for block in (None, 700):
            with pytest.raises(DataError, match=f"x.tar: {said}"):
                members(WHOLE[:cut], block)


@given(st.binary(min_size=1, max_size=2000))
def test_garbage_is_an_error(data: bytes) -> None:
    if not data[:512].strip(b"\0"):
        return
    with pytest.raises(DataError, match=r"x\.tar"):
        members(data)


@given(st.integers(0, 511), st.integers(0, 5), st.integers(1, 255))
def test_a_flipped_byte_in_a_header_hides_nothing(byte: int, number: int, change: int) -> None:
    """The header's checksum finds it: an error, or, where it covers nothing, the same members."""
    at = members(WHOLE)[number].offset - 512 + byte
    data = bytearray(WHOLE)
    data[at] ^= change
    try:
        found = members(bytes(data))
    except DataError:
        return
    assert [(m.key, m.offset, m.payload) for m in found] == [(m.key, m.offset, m.payload) for m in members(WHOLE)]


def test_data_behind_the_end_is_found() -> None:
    """`cat a.tar b.tar` looks like a tar to every reader, and the second half is never seen."""
    with pytest.raises(DataError, match=f"x.tar: data behind the end of the archive at byte {len(WHOLE)}"):
        members(WHOLE + WHOLE)


def test_more_zeros_are_harmless() -> None:
    assert len(members(WHOLE + bytes(5000))) == 6


@pytest.mark.parametrize(
    ("packed", "kind"),
    [(gzip.compress(WHOLE), "gzip"), (bz2.compress(WHOLE), "bzip2"), (lzma.compress(WHOLE), "xz"),
     (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd")],
)  # fmt: skip
def test_compressed_tars_are_errors(packed: bytes, kind: str) -> None:
    with pytest.raises(DataError, match=rf"x.tar: compressed \({kind}\): decompress it"):
        members(packed)


# ------------------------------------------------------------------ what points elsewhere
@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "d/../../a.jpg", "..", "/a.txt", "d/.."])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_point_elsewhere_are_errors(name: str, form: int) -> None:
    data = tar([("b.cls", b"1"), (name, b"x")], form)
    with pytest.raises(DataError, match=rf"x.tar: member '{name}' at byte 1024 must be relative and without '\.\.'"):
        members(data)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_place_of_images_are_errors(kind: bytes) -> None:
    """They would be lost silently: a deduplicated sample has link members only."""
    assert members(with_link(kind, "a.txt")) == []
    with pytest.raises(DataError, match=r"x.tar: member 'a.jpg' at byte 0 is sparse, a link or no plain file"):
        members(with_link(kind, "a.jpg"))


def test_sparse_members_are_errors() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 3, {"GNU.sparse.major": "1"}
        out.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match=r"x.tar: member .a.jpg. at byte 1024 is sparse"):
        members(buffer.getvalue())


def test_absurd_sizes_take_no_memory() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 2**40
    with pytest.raises(DataError, match=rf"x.tar: member 'a.jpg' at byte 0 has {2**40} bytes: over"):
        members(info.tobuf(tarfile.GNU_FORMAT) + bytes(5000))
    info.type, info.name = tarfile.XHDTYPE, "pax"
    with pytest.raises(DataError, match=rf"x.tar: damaged: the extended header at byte 0 claims {2**40} bytes"):
        members(info.tobuf(tarfile.GNU_FORMAT) + bytes(5000))


@pytest.mark.parametrize(
    "body", [b"12 path=a.jp\n"[:-1], b"99 path=a\n", b"path=a\n", b"-5 path=a\n", b"0 \n", b"9 path a\n"]
)
def test_damaged_extended_headers_are_errors(body: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    data = info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(512, b"\0") + tar([("b.jpg", b"1")])
    with pytest.raises(DataError, match=r"x.tar: damaged: the extended header at byte 0 is no list of PAX records"):
        members(data)


# ------------------------------------------------------------------ headers alone
LONG_NAME = "folder/" * 30 + "name.JPEG"


def listed(url: str, inside: MemberRange | None = None) -> list[MemberRange]:
    with closing(RangeReader(2)) as ranges:
        return list(iter_member_ranges(ranges, url, inside))


def rich_tar(form: int) -> bytes:
    """Long and foreign names, folders, links, an empty file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, size in (
            ("a.JPEG", 700),
            (LONG_NAME, 512),
            ("é/ü.JPEG", 3),
            ("empty.JPEG", 0),
            ("../../etc/x.JPEG", 9),
        ):
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
    assert LONG_NAME in {member.name for member in theirs}


def test_a_tar_in_a_tar_is_walked_in_place(tmp_path: Path) -> None:
    inner = imagenet.tar([("a.JPEG", b"first"), ("b.JPEG", b"second")])
    data = imagenet.tar([("one.tar", inner), ("two.tar", inner)])
    (tmp_path / "x.tar").write_bytes(data)
    outer = listed(str(tmp_path / "x.tar"))
    assert [member.name for member in outer] == ["one.tar", "two.tar"]
    for tar in outer:
        found = listed(str(tmp_path / "x.tar"), tar)
        assert [data[m.offset : m.offset + m.length] for m in found] == [b"first", b"second"]


def test_a_remote_tar_is_read_in_blocks_and_large_bodies_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_reader, "BLOCK_BYTES", 8192)
    url = "memory://members/large.tar"
    sizes = [1000] * 60 + [200_000] * 3
    file_io.write_bytes(url, imagenet.tar((f"{n}.JPEG", bytes(size)) for n, size in enumerate(sizes)))
    with closing(RangeReader(2)) as ranges:
        assert [m.length for m in iter_member_ranges(ranges, url)] == sizes
        assert ranges.transfer.requests < 25
        assert ranges.transfer.bytes < 200_000


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_cut_anywhere_is_reported_with_object_and_byte(tmp_path: Path, place: str) -> None:
    data = imagenet.tar([("a.JPEG", b"x" * 700), ("b.JPEG", b"y" * 100)])
    end = 512 + 1024 + 512 + 512
    for cut in (*range(128, end, 128), end, end + 100, end + 511):
        url = str(tmp_path / f"{cut}.tar") if place == "local" else f"memory://members/{cut}.tar"
        file_io.write_bytes(url, data[:cut])
        with pytest.raises(DataError, match=rf"{cut}\.tar: truncated at byte {cut}"):
            listed(url)
    (tmp_path / "whole.tar").write_bytes(data[: end + 512])
    assert len(listed(str(tmp_path / "whole.tar"))) == 2


def test_damage_is_reported_with_the_byte(tmp_path: Path) -> None:
    data = bytearray(imagenet.tar([("a.JPEG", b"x" * 700), ("b.JPEG", b"y" * 100)]))
    data[1536 + 20] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar: truncated or damaged at byte 1536"):
        listed(str(tmp_path / "x.tar"))


def test_an_inner_tar_that_is_cut_is_reported_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(imagenet.tar([("n01.tar", imagenet.tar([("a.JPEG", b"x")])[:1100])]))
    (tar,) = listed(str(tmp_path / "x.tar"))
    with pytest.raises(DataError, match=r"x\.tar: n01\.tar: truncated at byte 1612"):
        listed(str(tmp_path / "x.tar"), tar)


def test_a_header_that_claims_too_much_is_an_error(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**30 + 4096)
    with pytest.raises(DataError, match="extended header at byte 0 claims 1073741824 bytes"):
        listed(str(tmp_path / "x.tar"))
