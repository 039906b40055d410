"""Members of WebDataset tars at any URL, and every way in which a tar can be damaged.

Nothing is ever extracted: names of members become keys of samples, never paths. tarfile takes a header that is
truncated or damaged for the end of the archive without an error; here each byte of a tar is accounted for.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, Protocol

from orchestrator.config import redaction
from orchestrator.data.data_errors import DataError
from orchestrator.storage import urls
from orchestrator.storage.ranged_reads import RangeReader

Block = bytes | bytearray | memoryview

# One request each: large enough that a store's latency does not matter.
BLOCK_BYTES = 8 * 2**20
# No image is that large; a damaged size field easily is, and would be read into memory.
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
_SPARSE_PREFIX = "GNU.sparse."
# Whatever their size field says, no bytes follow these.
_BODILESS_TYPES = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
)  # fmt: skip


class TarMember(NamedTuple):
    """One image or label of a tar."""

    name: str  # as the tar has it
    key: str  # of its sample: the name, without "./", up to the first dot of its last component
    extension: str  # what follows that dot, in lower case
    offset: int  # byte of the tar where the payload begins
    payload: memoryview


class MemberRange(NamedTuple):
    """One plain file of a tar, whose payload was not read."""

    name: str
    offset: int  # of its first byte, from the beginning of the object
    length: int  # bytes


# ------------------------------------------------------------------ whole tars, read once from front to back
def read_blocks(url: str, ranges: RangeReader) -> Iterator[bytearray]:
    """Yield the bytes of an object in large blocks.

    Raises FileNotFoundError when the object is absent, StorageError when the storage fails.
    """
    size = ranges.size(url)
    for start in range(0, size, BLOCK_BYTES):
        yield ranges.read(url, start, min(BLOCK_BYTES, size - start))


def iter_members(
    source: Iterable[Block],
    name: str,
    extensions: Collection[str],
    pass_over: Callable[[str, str], None] = lambda key, extension: None,
) -> Iterator[TarMember]:
    """Yield the regular members that have one of `extensions` (lower case), in the tar's order.

    `pass_over` receives key and extension of each other file that belongs to a sample. Raises DataError, naming the
    tar by `name` and the byte, when it is truncated, damaged, compressed or followed by other data, or when a member's
    name is absolute or has a "..".
    """
    stream = _BlockStream(source)
    for entry in _iter_entries(stream, name, 0):
        key, extension = _split_member_name(entry.name, entry.at, name)
        if extension not in extensions or entry.type in _NON_FILE_TYPES:
            if key and entry.type not in _NON_FILE_TYPES:
                pass_over(key, extension)
            continue
        if entry.is_sparse or entry.type not in _REGULAR_TYPES or entry.size > MAX_MEMBER_BYTES:
            problem = f"has {entry.size} bytes: over {MAX_MEMBER_BYTES}"
            if entry.is_sparse:
                problem = "is sparse: its bytes are not in one piece; pack it anew"
            elif entry.type not in _REGULAR_TYPES:
                problem = "is a link or no plain file; pack it anew"
            raise DataError(f"{name}: member {entry.name!r} at byte {entry.at} {problem}")
        payload = memoryview(stream.read(entry.offset, entry.size))
        if len(payload) == entry.size:  # else the end of the tar is found next
            yield TarMember(entry.name, key, extension, entry.offset, payload)
    for part in stream.iter_rest():
        data = bytes(part)
        if data.count(0) != len(data):
            at = stream.position - len(data.lstrip(b"\0"))
            raise DataError(
                f"{name}: data behind the end of the archive at byte {at}: damaged, or two tars in one; pack it anew"
            )


class _BlockStream:
    """Blocks as one stream of bytes, going forward; `position` is the byte that comes next."""

    def __init__(self, source: Iterable[Block]) -> None:
        self._source = iter(source)
        self._block = memoryview(b"")
        self.position = 0

    def read(self, start: int, length: int) -> Block:
        """Return bytes from `start` on; fewer than `length` only where the stream ends."""
        self.find_end(start)
        if length <= len(self._block):
            return self._consume(length)
        taken = bytearray()
        while len(taken) < length and self._fill():
            taken += self._consume(min(length - len(taken), len(self._block)))
        return taken

    def find_end(self, wanted: int) -> int:
        """Return `wanted`, or the byte where the stream ends before that; skip to it."""
        while self.position < wanted and self._fill():
            self._consume(min(wanted - self.position, len(self._block)))
        return self.position

    def iter_rest(self) -> Iterator[memoryview]:
        """Yield what is left."""
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


def _split_member_name(member_name: str, at: int, name: str) -> tuple[str, str]:
    """Return key and extension of a member; empty when its name has none. Raises for names that point elsewhere.

    Bytes of the name that are not UTF-8 stand in the key as escapes with a backslash, so that it can be kept anywhere.
    """
    parts = member_name.split("/")
    if member_name.startswith("/") or ".." in parts or "\0" in member_name:
        raise DataError(
            f"{name}: member {member_name!r} at byte {at}: a name must be relative and without '..'; pack it anew"
        )
    parts = escape_undecodable(member_name).split("/")
    match = _MEMBER_NAME.fullmatch("/".join(part for part in parts if part not in ("", ".")))
    return (match[1], match[2].lower()) if match else ("", "")


def escape_undecodable(name: str) -> str:
    """Return a name of a file or member with escapes for its bytes that are not UTF-8, which no JSON can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------ headers alone, payloads skipped
class HeaderReader:
    """Small reads of bytes `start` to `end` of an object, going forward: a remote one is read in large blocks."""

    def __init__(self, ranges: RangeReader, url: str, end: int | None = None) -> None:
        self._ranges, self._url = ranges, url
        self._end = ranges.size(url) if end is None else end
        self._ahead = 0 if urls.is_local(url) else BLOCK_BYTES
        self._start, self._block = 0, bytearray()

    def read(self, start: int, length: int) -> Block:
        """Return bytes from `start` on; fewer than `length` only where the end comes before."""
        length = max(0, min(length, self._end - start))
        if not self._start <= start <= start + length <= self._start + len(self._block):
            self._start = start
            self._block = self._ranges.read(self._url, start, min(max(length, self._ahead), self._end - start))
        return self._block[start - self._start : start - self._start + length]

    def find_end(self, wanted: int) -> int:
        """Return `wanted`, or the end when it comes before."""
        return min(wanted, self._end)


def iter_member_ranges(ranges: RangeReader, url: str, inside: MemberRange | None = None) -> Iterator[MemberRange]:
    """Yield the plain files of the tar at `url`, or of the tar `inside` it.

    Raises DataError, naming object and byte, when it is missing, truncated or damaged; StorageError when the storage
    fails.
    """
    name, start, end = redaction.redact(url), 0, None
    if inside is not None:
        name, start, end = f"{name}: {inside.name}", inside.offset, inside.offset + inside.length
    try:
        headers = HeaderReader(ranges, url, end)
    except FileNotFoundError:
        raise DataError(f"source: {name}: missing") from None
    for entry in _iter_entries(headers, name, start):
        if entry.is_sparse:
            raise DataError(f"{name}: member {entry.name!r} at byte {entry.at} is sparse; pack it anew")
        if entry.type in _REGULAR_TYPES:
            yield MemberRange(entry.name, entry.offset, entry.size)


# ------------------------------------------------------------------ headers
class _ByteSource(Protocol):
    def read(self, start: int, length: int) -> Block: ...
    def find_end(self, wanted: int) -> int: ...


class _TarEntry(NamedTuple):
    at: int  # byte of the header
    name: str
    type: bytes
    offset: int  # byte of the body
    size: int  # bytes of the body
    is_sparse: bool


def _iter_entries(source: _ByteSource, name: str, at: int) -> Iterator[_TarEntry]:
    """Yield each member of the tar that begins at byte `at`. Raises DataError when it is truncated or damaged."""
    following: dict[str, str] = {}  # what extended headers say of the next member
    start = at
    while True:
        header = bytes(source.read(at, _RECORD_BYTES))
        if header == bytes(_RECORD_BYTES):
            return
        info = _read_header(header, at, at == start, name)
        body = at + _RECORD_BYTES
        has_more = info.type == tarfile.GNUTYPE_SPARSE and bool(header[482])
        while has_more:  # the rest of the list of an old GNU sparse file's holes
            has_more = bytes(source.read(body, _RECORD_BYTES))[504:505] == b"\1"
            body += _RECORD_BYTES
        if info.type in _EXTENDED_TYPES:
            if not 0 <= info.size <= MAX_EXTENDED_HEADER:
                raise DataError(f"{name}: damaged: the extended header at byte {at} claims {info.size} bytes")
            data, member_name, size = bytes(source.read(body, info.size)), "an extended header", info.size
            if len(data) == size:  # else the end of the tar is found below
                following |= _parse_extended_header(info, data, at, name)
        else:
            member_name = following.get("GNU.sparse.name") or following.get("path", info.name)
            size = _parse_size(following.get("size", info.size), at, name)
            is_sparse = any(keyword.startswith(_SPARSE_PREFIX) for keyword in following)
            following = {}
            yield _TarEntry(at, member_name, info.type, body, size, is_sparse)
        # Also the zeros that fill the last record have to be there.
        at = body if info.type in _BODILESS_TYPES else body + -(-size // _RECORD_BYTES) * _RECORD_BYTES
        if (end := source.find_end(at)) < at:
            raise DataError(f"{name}: truncated at byte {end}: inside member {member_name!r}, {size} bytes at {body}")


def _read_header(data: bytes, at: int, is_first: bool, name: str) -> tarfile.TarInfo:
    """Parse a member's header (512 bytes) at byte `at`. Raises DataError for bytes that are no header.

    Old GNU headers hold access and change times where POSIX ones hold the first part of a long name; tarfile takes
    the times for it.
    """
    if is_first and not data:
        raise DataError(f"{name}: empty: 0 bytes are no tar")
    if is_first and (kind := next((kind for magic, kind in _COMPRESSION_MAGIC.items() if data.startswith(magic)), "")):
        raise DataError(f"{name}: compressed ({kind}): decompress it, since samples are read by their offsets")
    if len(data) < _RECORD_BYTES:
        where = "inside the header of a member" if data else "the end of the archive, a block of zeros, is missing"
        raise DataError(f"{name}: truncated at byte {at + len(data)}: {where}")
    try:
        info = tarfile.TarInfo.frombuf(data, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(
            f"{name}: truncated or damaged at byte {at}: no member and no end of archive there ({error})"
        ) from None
    if not data[257:].startswith(_POSIX_MAGIC):
        info.name = data[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return info


def _parse_size(size: str | int, at: int, name: str) -> int:
    try:
        number = int(size)
    except ValueError:
        number = -1
    if number < 0:
        raise DataError(f"{name}: damaged: the member at byte {at} has the size {size!r}")
    return number


def _parse_extended_header(info: tarfile.TarInfo, data: bytes, at: int, name: str) -> dict[str, str]:
    """Return what an extended header says of the next member: `path`, `size` and `GNU.sparse.*` (PAX)."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    values: dict[str, str] = {}
    start = 0 if info.type in _NEXT_NAME_TYPES else len(data)
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
        values[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start = end
    return {
        word: value for word, value in values.items() if word in ("path", "size") or word.startswith(_SPARSE_PREFIX)
    }
