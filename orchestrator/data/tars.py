"""A WebDataset tar read once, from front to back, from any URL: its images and labels, and any way in which it is cut.

Nothing is ever extracted: names of members become keys of samples, never paths. tarfile would take a header that is cut
or broken for the end of the archive, and say nothing.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, Protocol

from orchestrator.data.errors import DataError
from orchestrator.storage.ranged import Ranges

Block = bytes | bytearray | memoryview

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
# One request each: large enough that a store's answer time does not matter.
BLOCK_BYTES = 8 * 2**20
# No image is that large; a broken size field easily is, and would be taken into memory.
MAX_PAYLOAD = 256 * 2**20
MAX_EXTENDED_HEADER = 2**20

_RECORD = 512
# As WebDataset splits names: at the first dot of the last path component.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NEXT_NAME = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_ABOUT_OTHERS = (*_NEXT_NAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
# Whatever their size field says, no bytes follow these.
_WITHOUT_BODY = (
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


class Member(NamedTuple):
    """One image or label of a tar."""

    name: str  # as the tar has it
    key: str  # of its sample: the name, without "./", up to the first dot of its last component
    extension: str  # what follows that dot, in lower case
    offset: int  # byte of the tar where the payload begins
    payload: memoryview


def blocks(url: str, ranges: Ranges, digests: Collection[Digest], tick: Callable[[int], None]) -> Iterator[bytearray]:
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


def members(source: Iterable[Block], name: str, extensions: Collection[str]) -> Iterator[Member]:
    """The regular members that end in one of `extensions` (lower case), in the tar's order.

    Raises DataError, naming the tar by `name` and the byte, when it is cut, damaged, compressed or followed by other
    data, or when a member's name is absolute or has a "..".
    """
    stream = _Stream(source)
    following: dict[str, str] = {}  # what extended headers say of the next member
    while True:
        at = stream.at
        header = bytes(stream.take(_RECORD))
        if header == bytes(_RECORD):
            _expect_zeros(stream, name)
            return
        info = _header(header, at, name)
        if info.type in _ABOUT_OTHERS:
            data = _extended(stream, info, at, name)
            if info.type in _NEXT_NAME:
                following |= _said(info, data, at, name)
            continue
        member_name = following.get("path", info.name)
        size = size_of(following.get("size", info.size), at, name)
        following = {}
        key, extension = _split(member_name, at, name)
        wanted = extension in extensions and info.type != tarfile.DIRTYPE
        if wanted and info.type not in _REGULAR:
            raise DataError(f"{name}: member {member_name!r} at byte {at} is a link or no plain file; pack it anew")
        offset = stream.at
        if info.type in _WITHOUT_BODY:
            continue
        if wanted and size > MAX_PAYLOAD:
            raise DataError(f"{name}: member {member_name!r} at byte {at} has {size} bytes: over {MAX_PAYLOAD}")
        payload = stream.take(size) if wanted else memoryview(b"")
        # Also the zeros that fill the last record have to be there.
        stream.skip(offset + -(-size // _RECORD) * _RECORD - stream.at)
        if stream.at < offset + -(-size // _RECORD) * _RECORD:
            raise DataError(f"{name}: cut at byte {stream.at}: inside member {member_name!r}, {size} bytes at {offset}")
        if wanted:
            yield Member(member_name, key, extension, offset, payload)


class _Stream:
    """Blocks as one stream of bytes; `at` is the byte that comes next."""

    def __init__(self, source: Iterable[Block]) -> None:
        self._source = iter(source)
        self._block = memoryview(b"")
        self.at = 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes; fewer only where the stream ends."""
        if count <= len(self._block):
            return self._cut(count)
        taken = bytearray()
        while len(taken) < count and self._more():
            taken += self._cut(min(count - len(taken), len(self._block)))
        return memoryview(taken)

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, or to the end."""
        while count > 0 and self._more():
            count -= len(self._cut(min(count, len(self._block))))

    def rest(self) -> Iterator[memoryview]:
        """What is left."""
        while self._more():
            yield self._cut(len(self._block))

    def _cut(self, count: int) -> memoryview:
        part, self._block = self._block[:count], self._block[count:]
        self.at += count
        return part

    def _more(self) -> bool:
        while not self._block:
            block = next(self._source, None)
            if block is None:
                return False
            self._block = memoryview(block)
        return True


def _header(data: bytes, at: int, name: str) -> tarfile.TarInfo:
    if not at:
        if not data:
            raise DataError(f"{name}: empty: 0 bytes are no tar")
        for magic, kind in _COMPRESSED.items():
            if data.startswith(magic):
                raise DataError(f"{name}: compressed ({kind}): decompress it, since samples are read by their offsets")
    if len(data) < _RECORD:
        where = "inside the header of a member" if data else "the end of the archive, a block of zeros, is missing"
        raise DataError(f"{name}: cut at byte {at + len(data)}: {where}")
    try:
        return tarfile.TarInfo.frombuf(data, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(
            f"{name}: cut or damaged at byte {at}: no member and no end of archive there ({error})"
        ) from None


def size_of(size: str | int, at: int, name: str) -> int:
    """The size that a header at byte `at` claims. Raises DataError when it is no whole number of bytes."""
    try:
        found = int(size)
    except ValueError:
        found = -1
    if found < 0:
        raise DataError(f"{name}: damaged: the member at byte {at} has the size {size!r}")
    return found


def _extended(stream: _Stream, info: tarfile.TarInfo, at: int, name: str) -> bytes:
    """The body of a header that tells more of another one."""
    if not 0 <= info.size <= MAX_EXTENDED_HEADER:
        raise DataError(f"{name}: damaged: the extended header at byte {at} claims {info.size} bytes")
    padded = -(-info.size // _RECORD) * _RECORD
    data = stream.take(padded)
    if len(data) < padded:
        raise DataError(f"{name}: cut at byte {stream.at}: inside the extended header at byte {at}")
    return bytes(data[: info.size])


def _said(info: tarfile.TarInfo, data: bytes, at: int, name: str) -> dict[str, str]:
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
    if any(keyword.startswith("GNU.sparse.") for keyword in said):
        raise DataError(f"{name}: the member after byte {at} is sparse: its bytes are not in one piece; pack it anew")
    return {keyword: said[keyword] for keyword in ("path", "size") if keyword in said}


def _split(member_name: str, at: int, name: str) -> tuple[str, str]:
    """Key and extension of a member; empty when its name has none. Names that point elsewhere are refused."""
    parts = member_name.split("/")
    if member_name.startswith("/") or ".." in parts or "\0" in member_name:
        raise DataError(
            f"{name}: member {member_name!r} at byte {at}: an absolute name or one with '..' is refused; pack it anew"
        )
    match = _NAME.fullmatch("/".join(part for part in parts if part not in ("", ".")))
    return (match[1], match[2].lower()) if match else ("", "")


def _expect_zeros(stream: _Stream, name: str) -> None:
    """Behind the end only zeros may come: readers would not see what stands there."""
    for part in stream.rest():
        data = bytes(part)
        if data.count(0) != len(data):
            at = stream.at - len(data.lstrip(b"\0"))
            raise DataError(
                f"{name}: data behind the end of the archive at byte {at}: damaged, or two tars in one; pack it anew"
            )
