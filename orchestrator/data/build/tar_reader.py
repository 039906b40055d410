"""A WebDataset tar read once, from front to back, from any URL: its images and labels, and any way in which it is cut.

Nothing is ever extracted: names of members become keys of samples, never paths. tarfile would take a header that is cut
or broken for the end of the archive, and say nothing.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, Protocol

from orchestrator.data.data_errors import DataError
from orchestrator.storage.ranged_reads import RangeReader

Block = bytes | bytearray | memoryview

# One request each: large enough that a store's answer time does not matter.
BLOCK_BYTES = 8 * 2**20
# No image is that large; a broken size field easily is, and would be taken into memory.
MAX_MEMBER_BYTES = 256 * 2**20
MAX_EXTENDED_HEADER = 2**20

_RECORD_BYTES = 512
# As WebDataset splits names (base_plus_ext): at the first dot of the last path component.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NEXT_NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED_TYPES = (*_NEXT_NAME_TYPES, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
# Volume labels and lists of folders, which GNU tar adds: no files.
_NON_FILE_TYPES = (tarfile.DIRTYPE, b"V", b"D")
_POSIX_MAGIC = b"ustar\0"
# Whatever their size field says, no bytes follow these.
_BODILESS_TYPES = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
)


class Digest(Protocol):
    """What hashlib's objects can do."""

    def update(self, data: Block, /) -> object:
        """Take these bytes in."""


class TarMember(NamedTuple):
    """One image or label of a tar."""

    name: str  # as the tar has it
    key: str  # of its sample: the name, without "./", up to the first dot of its last component
    extension: str  # what follows that dot, in lower case
    offset: int  # byte of the tar where the payload begins
    payload: memoryview


def read_blocks(
    url: str, ranges: RangeReader, digests: Collection[Digest], tick: Callable[[int], None]
) -> Iterator[bytearray]:
    """The bytes of an object in turn, in large blocks; `digests` take them in, `tick` is told the size of each.

    Raises FileNotFoundError when the object is absent, StorageError when the storage fails.
    """
    size = ranges.size(url)
    for start in range(0, size, BLOCK_BYTES):
        block = bytearray(min(BLOCK_BYTES, size - start))
        ranges.read_into(url, start, memoryview(block))
        for digest in digests:
            digest.update(block)
        yield block
        tick(len(block))


def iter_members(
    source: Iterable[Block],
    name: str,
    extensions: Collection[str],
    pass_over: Callable[[str, str], None] = lambda key, extension: None,
) -> Iterator[TarMember]:
    """The regular members that have one of `extensions` (lower case), in the tar's order.

    `pass_over` is given key and extension of each other file that belongs to a sample. Raises DataError, naming the tar
    by `name` and the byte, when it is cut, damaged, compressed or followed by other data, or when a member's name is
    absolute or has a "..".
    """
    stream = _BlockStream(source)
    following: dict[str, str] = {}  # what extended headers say of the next member
    while True:
        at = stream.position
        header = bytes(stream.read(_RECORD_BYTES))
        if header == bytes(_RECORD_BYTES):
            _expect_zeros(stream, name)
            return
        info = _read_header(header, at, name)
        _skip_holes(stream, info, header)
        if info.type in _EXTENDED_TYPES:
            data = _read_extended_header(stream, info, at, name)
            if info.type in _NEXT_NAME_TYPES:
                following |= _parse_extended_header(info, data, at, name)
            continue
        member_name = following.get("GNU.sparse.name") or following.get("path", info.name)
        sparse = any(keyword.startswith("GNU.sparse.") for keyword in following)
        size = parse_size(following.get("size", info.size), at, name)
        following = {}
        key, extension = _split_member_name(member_name, at, name)
        wanted = extension in extensions and info.type not in _NON_FILE_TYPES
        if key and extension not in extensions and info.type not in _NON_FILE_TYPES:
            pass_over(key, extension)
        if wanted and (sparse or info.type not in _REGULAR_TYPES or size > MAX_MEMBER_BYTES):
            raise DataError(f"{name}: member {member_name!r} at byte {at} {_describe_unreadable(info, sparse, size)}")
        offset = stream.position
        if info.type in _BODILESS_TYPES:
            continue
        payload = stream.read(size) if wanted else memoryview(b"")
        # Also the zeros that fill the last record have to be there.
        stream.skip(offset + -(-size // _RECORD_BYTES) * _RECORD_BYTES - stream.position)
        if stream.position < offset + -(-size // _RECORD_BYTES) * _RECORD_BYTES:
            raise DataError(
                f"{name}: cut at byte {stream.position}: inside member {member_name!r}, {size} bytes at {offset}"
            )
        if wanted:
            yield TarMember(member_name, key, extension, offset, payload)


def _skip_holes(stream: _BlockStream, info: tarfile.TarInfo, header: bytes) -> None:
    """Pass over the blocks that hold the rest of the list of an old GNU sparse file's holes."""
    has_more = info.type == tarfile.GNUTYPE_SPARSE and bool(header[482])
    while has_more:
        has_more = bytes(stream.read(_RECORD_BYTES))[504:505] == b"\1"


def _describe_unreadable(info: tarfile.TarInfo, sparse: bool, size: int) -> str:
    """Say why an image or label cannot be read by its offset."""
    if sparse:
        return "is sparse: its bytes are not in one piece; pack it anew"
    if info.type not in _REGULAR_TYPES:
        return "is a link or no plain file; pack it anew"
    return f"has {size} bytes: over {MAX_MEMBER_BYTES}"


class _BlockStream:
    """Blocks as one stream of bytes; `at` is the byte that comes next."""

    def __init__(self, source: Iterable[Block]) -> None:
        self._source = iter(source)
        self._block = memoryview(b"")
        self.position = 0

    def read(self, count: int) -> memoryview:
        """The next `count` bytes; fewer only where the stream ends."""
        if count <= len(self._block):
            return self._consume(count)
        taken = bytearray()
        while len(taken) < count and self._fill():
            taken += self._consume(min(count - len(taken), len(self._block)))
        return memoryview(taken)

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, or to the end."""
        while count > 0 and self._fill():
            count -= len(self._consume(min(count, len(self._block))))

    def iter_rest(self) -> Iterator[memoryview]:
        """What is left."""
        while self._fill():
            yield self._consume(len(self._block))

    def _consume(self, count: int) -> memoryview:
        part, self._block = self._block[:count], self._block[count:]
        self.position += count
        return part

    def _fill(self) -> bool:
        while not self._block:
            block = next(self._source, None)
            if block is None:
                return False
            self._block = memoryview(block)
        return True


def _read_header(data: bytes, at: int, name: str) -> tarfile.TarInfo:
    if not at:
        if not data:
            raise DataError(f"{name}: empty: 0 bytes are no tar")
        for magic, kind in _COMPRESSION_MAGIC.items():
            if data.startswith(magic):
                raise DataError(f"{name}: compressed ({kind}): decompress it, since samples are read by their offsets")
    if len(data) < _RECORD_BYTES:
        where = "inside the header of a member" if data else "the end of the archive, a block of zeros, is missing"
        raise DataError(f"{name}: cut at byte {at + len(data)}: {where}")
    return parse_header(data, at, f"{name}: cut or damaged")


def parse_header(data: bytes, at: int, problem: str) -> tarfile.TarInfo:
    """Parse the 512 bytes of a member's header at byte `at`; an error begins with `problem`.

    Old GNU headers hold access and change times where POSIX ones hold the first part of a long name; tarfile takes
    the times for it. Raises DataError for bytes that are no header.
    """
    try:
        info = tarfile.TarInfo.frombuf(data, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"{problem} at byte {at}: no member and no end of archive there ({error})") from None
    if not data[257:].startswith(_POSIX_MAGIC):
        info.name = data[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return info


def parse_size(size: str | int, at: int, name: str) -> int:
    """The size that a header at byte `at` claims. Raises DataError when it is no whole number of bytes."""
    try:
        found = int(size)
    except ValueError:
        found = -1
    if found < 0:
        raise DataError(f"{name}: damaged: the member at byte {at} has the size {size!r}")
    return found


def _read_extended_header(stream: _BlockStream, info: tarfile.TarInfo, at: int, name: str) -> bytes:
    """The body of a header that tells more of another one."""
    if not 0 <= info.size <= MAX_EXTENDED_HEADER:
        raise DataError(f"{name}: damaged: the extended header at byte {at} claims {info.size} bytes")
    padded = -(-info.size // _RECORD_BYTES) * _RECORD_BYTES
    data = stream.read(padded)
    if len(data) < padded:
        raise DataError(f"{name}: cut at byte {stream.position}: inside the extended header at byte {at}")
    return bytes(data[: info.size])


def _parse_extended_header(info: tarfile.TarInfo, data: bytes, at: int, name: str) -> dict[str, str]:
    """What an extended header says of the next member: its `path`, its `size` (PAX)."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    said, start = {}, 0
    while start < len(data):
        try:  # "LENGTH KEYWORD=VALUE\n", the length that of the whole
            digits = data[start : data.index(b" ", start)]
            end = start + int(digits)
        except ValueError:
            end = start
        record = data[start:end]
        if end > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise DataError(f"{name}: damaged: the extended header at byte {at} is no list of PAX records")
        keyword, _, value = record[len(digits) + 1 : -1].partition(b"=")
        said[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start = end
    return {word: value for word, value in said.items() if word in ("path", "size") or word.startswith("GNU.sparse.")}


def _split_member_name(member_name: str, at: int, name: str) -> tuple[str, str]:
    """Key and extension of a member; empty when its name has none. Names that point elsewhere are refused.

    Bytes of the name that are not UTF-8 stand in the key as escapes with a backslash, so that it can be kept anywhere.
    """
    parts = member_name.split("/")
    if member_name.startswith("/") or ".." in parts or "\0" in member_name:
        raise DataError(
            f"{name}: member {member_name!r} at byte {at}: an absolute name or one with '..' is refused; pack it anew"
        )
    parts = escape_undecodable(member_name).split("/")
    match = _MEMBER_NAME.fullmatch("/".join(part for part in parts if part not in ("", ".")))
    return (match[1], match[2].lower()) if match else ("", "")


def escape_undecodable(name: str) -> str:
    """Return a name of a file or member with escapes for its bytes that are not UTF-8, which no JSON can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _expect_zeros(stream: _BlockStream, name: str) -> None:
    """Behind the end only zeros may come: readers would not see what stands there."""
    for part in stream.iter_rest():
        data = bytes(part)
        if data.count(0) != len(data):
            at = stream.position - len(data.lstrip(b"\0"))
            raise DataError(
                f"{name}: data behind the end of the archive at byte {at}: damaged, or two tars in one; pack it anew"
            )
