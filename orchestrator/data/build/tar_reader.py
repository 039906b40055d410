"""WebDataset tars from any URL: their members, their index, and every way in which they can be damaged.

Nothing is ever extracted: names of members become keys of samples, never paths. tarfile takes a header that is
truncated or damaged for the end of the archive without an error; here each byte of a tar is accounted for.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, Protocol

from orchestrator.config import redaction
from orchestrator.data.build import label_format
from orchestrator.data.build.member_fields import MemberFields, OtherMembers
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import ShardIndex, compute_checksum
from orchestrator.storage import file_io, urls
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


class Digest(Protocol):
    """Hash object as hashlib has it."""

    def update(self, data: Block, /) -> object:
        """Take these bytes in."""


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
def index_tar(data: bytes, name: str) -> ShardIndex:
    """Return the index of a WebDataset tar in memory: an image and a `cls` member (decimal label) for each key.

    Raises DataError when a sample lacks one of the two or has one twice, or the tar is truncated or damaged.
    """
    fields, others = MemberFields(), OtherMembers()
    members = iter_members([data], name, fields.extensions, others.add)
    return index_members(members, name, label_format.parse_decimal, fields, others)


def index_members(
    members: Iterable[TarMember],
    name: str,
    read_label: Callable[[memoryview], int],
    fields: MemberFields,
    others: OtherMembers,
) -> ShardIndex:
    """Return the index of a tar's members: an image and a label for each key, by the extensions of `fields`.

    `read_label` turns a label's payload into the label or raises ValueError with the reason. `others` has counted the
    members that are neither when this returns. Raises DataError when a sample lacks image or label, or has one twice.
    """
    ranks = {extension: rank for group in (fields.images, fields.labels) for rank, extension in enumerate(group)}
    labels: dict[str, tuple[int, int]] = {}  # rank and label
    images: dict[str, tuple[int, int, int, int]] = {}  # rank, offset, length, checksum
    for member in members:
        key, rank, is_label = member.key, ranks[member.extension], member.extension in fields.labels
        before = (labels if is_label else images).get(key)
        if before is not None and (before[0] == rank or not (is_label or fields.is_chosen)):
            first = fields.images[before[0]] if not is_label else ""
            fix = (
                "keys must be unique"
                if before[0] == rank
                else f".{first} and .{member.extension}; set --image-key {first} if that is the one to train on"
            )
            raise DataError(
                f"{name}: sample {key!r} has two {'labels' if is_label else 'images'}, the second at byte "
                f"{member.offset}: {fix}"
            )
        if before is not None and before[0] < rank:
            continue
        if not is_label:
            images[key] = (rank, member.offset, len(member.payload), compute_checksum(member.payload))
            continue
        try:
            labels[key] = (rank, read_label(member.payload))
        except ValueError as error:
            raise DataError(f"{name}: sample {key!r}: {error}") from None
    if odd := sorted(labels.keys() ^ images.keys()):
        has = "a label" if odd[0] in labels else "an image"
        hint = "" if labels else f"; no member ends in .{' or .'.join(fields.labels)}"
        raise DataError(
            f"{name}: sample {odd[0]!r} lacks an image or a label: it has {has} only ({len(odd)} such samples{hint})"
            f"{others.suggest_flags()}"
        )
    _, *columns = zip(*images.values(), strict=True) if images else ((), (), (), ())
    return ShardIndex.build(images, [labels[key][1] for key in images], *columns)


def read_blocks(
    url: str, ranges: RangeReader, digests: Collection[Digest], tick: Callable[[int], None]
) -> Iterator[bytearray]:
    """Yield the bytes of an object in large blocks; `digests` take them in, `tick` receives the size of each.

    Raises FileNotFoundError when the object is absent, StorageError when the storage fails.
    """
    size = file_io.get_size(url)
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
    """Yield the regular members that have one of `extensions` (lower case), in the tar's order.

    `pass_over` receives key and extension of each other file that belongs to a sample. Raises DataError, naming the
    tar by `name` and the byte, when it is truncated, damaged, compressed or followed by other data, or when a member's
    name is absolute or has a "..".
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
            following |= _parse_extended_header(info, _read_extended_header(stream, info, at, name), at, name)
            continue
        member_name = following.get("GNU.sparse.name") or following.get("path", info.name)
        sparse = any(keyword.startswith(_SPARSE_PREFIX) for keyword in following)
        size = _parse_size(following.get("size", info.size), at, name)
        following = {}
        key, extension = _split_member_name(member_name, at, name)
        is_wanted = extension in extensions and info.type not in _NON_FILE_TYPES
        if key and extension not in extensions and info.type not in _NON_FILE_TYPES:
            pass_over(key, extension)
        if is_wanted and (sparse or info.type not in _REGULAR_TYPES or size > MAX_MEMBER_BYTES):
            raise DataError(f"{name}: member {member_name!r} at byte {at} {_describe_unreadable(info, sparse, size)}")
        offset = stream.position
        if info.type in _BODILESS_TYPES:
            continue
        payload = stream.read(size) if is_wanted else memoryview(b"")
        # Also the zeros that fill the last record have to be there.
        end = offset + _pad(size)
        stream.skip(end - stream.position)
        if stream.position < end:
            raise DataError(
                f"{name}: truncated at byte {stream.position}: inside member {member_name!r}, {size} bytes at {offset}"
            )
        if is_wanted:
            yield TarMember(member_name, key, extension, offset, payload)


def _skip_holes(stream: _BlockStream, info: tarfile.TarInfo, header: bytes) -> None:
    """Skip the blocks that hold the rest of the list of an old GNU sparse file's holes."""
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
    """Blocks as one stream of bytes; `position` is the byte that comes next."""

    def __init__(self, source: Iterable[Block]) -> None:
        self._source = iter(source)
        self._block = memoryview(b"")
        self.position = 0

    def read(self, count: int) -> memoryview:
        """Return the next `count` bytes; fewer only where the stream ends."""
        if count <= len(self._block):
            return self._consume(count)
        taken = bytearray()
        while len(taken) < count and self._fill():
            taken += self._consume(min(count - len(taken), len(self._block)))
        return memoryview(taken)

    def skip(self, count: int) -> None:
        """Skip `count` bytes, or to the end."""
        while count > 0 and self._fill():
            count -= len(self._consume(min(count, len(self._block))))

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


def _read_extended_header(stream: _BlockStream, info: tarfile.TarInfo, at: int, name: str) -> bytes:
    """Return the body of a header that describes the member after it."""
    _check_extended_size(info, at, name)
    data = stream.read(_pad(info.size))
    if len(data) < _pad(info.size):
        raise DataError(f"{name}: truncated at byte {stream.position}: inside the extended header at byte {at}")
    return bytes(data[: info.size])


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


def _expect_zeros(stream: _BlockStream, name: str) -> None:
    """Raise DataError unless only zeros follow the end: readers would not see what stands there."""
    for part in stream.iter_rest():
        data = bytes(part)
        if data.count(0) != len(data):
            at = stream.position - len(data.lstrip(b"\0"))
            raise DataError(
                f"{name}: data behind the end of the archive at byte {at}: damaged, or two tars in one; pack it anew"
            )


# ------------------------------------------------------------------ headers alone, payloads skipped
class HeaderReader:
    """Small reads of one object, going forward: of a local one by seeking, of a remote one in large blocks."""

    def __init__(self, ranges: RangeReader, url: str) -> None:
        self._ranges, self._url = ranges, url
        self.size = file_io.get_size(url)
        self.redacted_url = redaction.redact(url)
        self._ahead = 0 if urls.is_local(url) else BLOCK_BYTES
        self._start, self._block = 0, bytearray()

    def read(self, start: int, length: int, end: int) -> bytes:
        """Return bytes from `start` on; fewer than `length` only when `end` comes before."""
        length = min(length, end - start)
        if not self._start <= start <= start + length <= self._start + len(self._block):
            self._start = start
            self._block = self._ranges.read(self._url, start, max(0, min(max(length, self._ahead), end - start)))
        return bytes(self._block[start - self._start : start - self._start + length])


def iter_member_ranges(
    headers: HeaderReader, start: int = 0, end: int | None = None, inside: str = ""
) -> Iterator[MemberRange]:
    """Yield the plain files of the tar in bytes `start` to `end` of an object; `inside` names it in errors.

    Raises DataError, naming object and byte, when it is truncated or damaged; StorageError when the storage fails.
    """
    end = headers.size if end is None else end
    name = f"{headers.redacted_url}: {inside}" if inside else headers.redacted_url
    at, following = start, dict[str, str]()
    while True:
        block = headers.read(at, _RECORD_BYTES, end)
        if len(block) == _RECORD_BYTES and not any(block):
            return
        info = _read_header(block, at, name)
        is_extended, body = info.type in _EXTENDED_TYPES, at + _RECORD_BYTES
        size = _parse_size(info.size if is_extended else following.get("size", info.size), at, name)
        padded = 0 if info.type in _BODILESS_TYPES else _pad(size)
        member_name = following.get("path", info.name)
        if body + padded > end:
            raise DataError(f"{name}: truncated at byte {end}: inside member {member_name!r}, {size} bytes at {body}")
        if is_extended:
            _check_extended_size(info, at, name)
            following |= _parse_extended_header(info, headers.read(body, size, end), at, name)
            if any(keyword.startswith(_SPARSE_PREFIX) for keyword in following):
                raise DataError(f"{name}: the member after byte {at} is sparse: its bytes are not in one piece")
        else:
            if info.type in _REGULAR_TYPES:
                yield MemberRange(member_name, body, size)
            following = {}
        at = body + padded


# ------------------------------------------------------------------ headers
def _read_header(data: bytes, at: int, name: str) -> tarfile.TarInfo:
    """Parse a member's header (512 bytes) at byte `at`. Raises DataError for bytes that are no header.

    Old GNU headers hold access and change times where POSIX ones hold the first part of a long name; tarfile takes
    the times for it.
    """
    if not at and not data:
        raise DataError(f"{name}: empty: 0 bytes are no tar")
    if not at and (kind := next((kind for magic, kind in _COMPRESSION_MAGIC.items() if data.startswith(magic)), "")):
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
    """Return the size that a header at byte `at` claims. Raises DataError when it is no whole number of bytes."""
    try:
        number = int(size)
    except ValueError:
        number = -1
    if number < 0:
        raise DataError(f"{name}: damaged: the member at byte {at} has the size {size!r}")
    return number


def _pad(size: int) -> int:
    return -(-size // _RECORD_BYTES) * _RECORD_BYTES


def _check_extended_size(info: tarfile.TarInfo, at: int, name: str) -> None:
    if not 0 <= info.size <= MAX_EXTENDED_HEADER:
        raise DataError(f"{name}: damaged: the extended header at byte {at} claims {info.size} bytes")


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
