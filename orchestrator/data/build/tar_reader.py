"""Members of WebDataset tars at any URL, and every way in which a tar can be damaged.

Nothing is ever extracted: names of members become keys of samples, never paths. tarfile takes a header that is
truncated or damaged for the end of the archive without an error; here each byte of a tar is accounted for.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from orchestrator.config import redaction
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io, urls
from orchestrator.storage.ranged_reads import RangeReader

Read = Callable[[int, int], bytes]  # from start and length; fewer bytes only at the end

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
_MAX_DIGITS = 20  # of a length or size in an extended header
# Whatever their size field says, no bytes follow these.
_BODILESS_TYPES = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
)  # fmt: skip


class TarMember(NamedTuple):
    """One image or label of a tar."""

    key: str  # of its sample: the name, without "./", up to the first dot of its last component
    extension: str  # what follows that dot, in lower case
    offset: int  # byte of the tar where the payload begins
    payload: bytes


class MemberRange(NamedTuple):
    """One plain file of a tar, whose payload was not read."""

    name: str
    offset: int  # of its first byte, from the beginning of the object
    length: int  # bytes


class ObjectReader:
    """Reads of an object's bytes, going forward; a remote one, or one that is hashed, is read in large blocks."""

    def __init__(self, ranges: RangeReader, url: str, is_hashed: bool = False) -> None:
        """Raise FileNotFoundError when the object is absent, StorageError when the storage fails."""
        self._ranges, self._url, self._is_hashed = ranges, url, is_hashed
        self._sha256 = hashlib.sha256()
        self.size = file_io.get_size(url)
        self._ahead = 0 if not is_hashed and urls.is_local(url) else BLOCK_BYTES
        self._start, self._block = 0, bytearray()

    def compute_sha256(self) -> str:
        """Read what was not read, and return the checksum of a hashed object, in hex."""
        self.read(self.size, 0)
        return self._sha256.hexdigest()

    def read(self, start: int, length: int) -> bytes:
        """Return bytes from `start` on; fewer than `length` only where the object ends."""
        end = min(start + length, self.size)
        while (loaded := self._start + len(self._block)) < end:
            if not self._is_hashed and loaded < start:
                loaded, self._block = start, bytearray()
            del self._block[: max(0, start - self._start)]
            more = self._ranges.read(self._url, loaded, min(self._ahead or end - loaded, self.size - loaded))
            if self._is_hashed:
                self._sha256.update(more)
            self._block += more
            self._start = loaded + len(more) - len(self._block)
        return bytes(self._block[start - self._start : end - self._start])


# ------------------------------------------------------------------ images and labels, and plain files
def iter_members(
    read: Read, size: int, name: str, extensions: Collection[str], others: dict[str, list[str]] | None = None
) -> Iterator[TarMember]:
    """Yield the regular members of a tar of `size` bytes that have one of `extensions` (lower case), in its order.

    `others` receives the extension of each other file of a sample, by key. Raises DataError, naming tar and byte, for a
    tar that is damaged, compressed or followed by other data, and for names that are absolute or have a "..".
    """
    at = 0
    for entry in _iter_entries(read, name, 0, size):
        at = entry.end
        key, extension = _split_member_name(entry.name, entry.at, name)
        if extension not in extensions or entry.type in _NON_FILE_TYPES:
            if key and others is not None and entry.type not in _NON_FILE_TYPES:
                others.setdefault(key, []).append(extension)
            continue
        if entry.is_sparse or entry.type not in _REGULAR_TYPES or entry.size > MAX_MEMBER_BYTES:
            problem = "is sparse, a link or no plain file; pack it anew"
            if entry.size > MAX_MEMBER_BYTES:
                problem = f"has {entry.size} bytes: over {MAX_MEMBER_BYTES}"
            raise DataError(f"{name}: member {entry.name!r} at byte {entry.at} {problem}")
        payload = read(entry.offset, entry.size)
        if len(payload) == entry.size:  # else the end of the tar is found next
            yield TarMember(key, extension, entry.offset, payload)
    while at < size:
        part = read(at, BLOCK_BYTES)
        at += len(part)
        if rest := part.lstrip(b"\0"):
            where = f"{name}: data behind the end of the archive at byte {at - len(rest)}"
            raise DataError(f"{where}: damaged, or two tars in one; pack it anew")


def iter_member_ranges(ranges: RangeReader, url: str, inside: MemberRange | None = None) -> Iterator[MemberRange]:
    """Yield the plain files of the tar at `url`, or of the tar `inside` it, by their headers. Raises DataError."""
    name = redaction.redact(url)
    try:
        reader = ObjectReader(ranges, url)
    except FileNotFoundError:
        raise DataError(f"source: {name}: missing") from None
    start, end = 0, reader.size
    if inside is not None:
        name, start, end = f"{name}: {inside.name}", inside.offset, inside.offset + inside.length
    for entry in _iter_entries(reader.read, name, start, end):
        if entry.is_sparse:
            raise DataError(f"{name}: member {entry.name!r} at byte {entry.at} is sparse; pack it anew")
        if entry.type in _REGULAR_TYPES:
            yield MemberRange(entry.name, entry.offset, entry.size)


def _split_member_name(member_name: str, at: int, name: str) -> tuple[str, str]:
    """Return key, with escapes for bytes that are not UTF-8, and extension, or neither. Raises for unsafe names."""
    parts = member_name.split("/")
    if member_name.startswith("/") or ".." in parts or "\0" in member_name:
        raise DataError(f"{name}: member {member_name!r} at byte {at} must be relative and without '..'; pack it anew")
    parts = escape_undecodable(member_name).split("/")
    match = _MEMBER_NAME.fullmatch("/".join(part for part in parts if part not in ("", ".")))
    return (match[1], match[2].lower()) if match else ("", "")


def escape_undecodable(name: str) -> str:
    """Return a name of a file or member with escapes for its bytes that are not UTF-8, which no JSON can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------ headers
class _TarEntry(NamedTuple):
    at: int  # byte of the header
    name: str
    type: bytes
    offset: int  # byte of the body
    size: int  # bytes of the body
    end: int  # byte after its last record
    is_sparse: bool


def _iter_entries(read: Read, name: str, start: int, end: int) -> Iterator[_TarEntry]:
    """Yield each member of the tar in bytes `start` to `end`. Raises DataError when it is truncated or damaged."""
    at, following = start, dict[str, str]()  # what extended headers say of the next member
    while True:
        header = read(at, min(_RECORD_BYTES, end - at))
        if header == bytes(_RECORD_BYTES):
            return
        info = _read_header(header, at, at == start, name)
        body, has_more = at + _RECORD_BYTES, info.type == tarfile.GNUTYPE_SPARSE and bool(header[482])
        while has_more:  # the rest of the list of an old GNU sparse file's holes
            has_more = read(body, min(_RECORD_BYTES, end - body))[504:505] == b"\1"
            body += _RECORD_BYTES
        is_extended = info.type in _EXTENDED_TYPES
        size = info.size if is_extended else int(following.get("size", info.size))
        if size < 0 or (is_extended and size > MAX_EXTENDED_HEADER):
            kind = "extended header" if is_extended else "member"
            raise DataError(f"{name}: damaged: the {kind} at byte {at} claims {size} bytes")
        # Also the zeros that fill the last record have to be there.
        after = body if info.type in _BODILESS_TYPES else body + -(-size // _RECORD_BYTES) * _RECORD_BYTES
        member_name = following.get("GNU.sparse.name") or following.get("path", info.name)
        if not is_extended:
            is_sparse = any(keyword.startswith(_SPARSE_PREFIX) for keyword in following)
            following = {}
            yield _TarEntry(at, member_name, info.type, body, size, after, is_sparse)
        elif after <= end:
            following |= _parse_extended_header(info, read(body, size), at, name)
        if after > end:
            raise DataError(f"{name}: truncated at byte {end}: inside member {member_name!r}, {size} bytes at {body}")
        at = after


def _read_header(data: bytes, at: int, is_first: bool, name: str) -> tarfile.TarInfo:
    """Parse a member's header. Old GNU ones have times where tarfile expects the first part of a long name."""
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
        raise DataError(f"{name}: truncated or damaged at byte {at}: no member and no end there ({error})") from None
    if not data[257:].startswith(_POSIX_MAGIC):
        info.name = data[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return info


def _parse_extended_header(info: tarfile.TarInfo, data: bytes, at: int, name: str) -> dict[str, str]:
    """Return what an extended header says of the next member: `path`, `size` and `GNU.sparse.*` (PAX)."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    values: dict[str, str] = {}
    start = 0 if info.type in _NEXT_NAME_TYPES else len(data)
    while start < len(data):
        # "LENGTH KEYWORD=VALUE\n", the length that of the whole
        digits = data[start : start + _MAX_DIGITS].partition(b" ")[0]
        end = start + int(digits) if digits.isdigit() else start
        record = data[start:end]
        keyword, separator, value = record[len(digits) + 1 : -1].partition(b"=")
        is_number = keyword != b"size" or (value.isdigit() and len(value) <= _MAX_DIGITS)
        if end > len(data) or not record.endswith(b"\n") or not separator or not is_number:
            raise DataError(f"{name}: damaged: the extended header at byte {at} is no list of PAX records")
        values[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start = end
    return {key: value for key, value in values.items() if key in ("path", "size") or key.startswith(_SPARSE_PREFIX)}
