"""Headers of a tar, each with its payload's place, without reading the payloads.

A local tar is read by seeking from header to header, a remote one in large blocks. tarfile would take a header that is
cut or broken for the end of the archive and say nothing; here each byte of the tar is accounted for.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from orchestrator.config import redaction
from orchestrator.data.build.tar_reader import parse_header, parse_size
from orchestrator.data.data_errors import DataError
from orchestrator.storage import urls
from orchestrator.storage.ranged_reads import RangeReader

BLOCK_BYTES = 8 * 2**20
MAX_EXTENDED_HEADER = 2**20

_RECORD_BYTES = 512
_REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED_TYPES = (*_PAX_TYPES, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# Whatever their size field says, no bytes follow these.
_BODILESS_TYPES = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
)  # fmt: skip


class MemberRange(NamedTuple):
    """One plain file of a tar."""

    name: str
    offset: int  # of its first byte, from the beginning of the object
    length: int  # bytes


class HeaderReader:
    """Small reads of one object, going forward."""

    def __init__(self, ranges: RangeReader, url: str) -> None:
        self._ranges, self._url = ranges, url
        self.size = ranges.size(url)
        self.redacted_url = redaction.redact(url)
        self._ahead = 0 if urls.is_local(url) else BLOCK_BYTES
        self._start, self._block = 0, bytearray()

    def read(self, start: int, length: int, end: int) -> bytes:
        """Bytes from `start` on; fewer than `length` only when `end` comes before."""
        length = min(length, end - start)
        if not self._start <= start <= start + length <= self._start + len(self._block):
            self._start, wanted = start, min(max(length, self._ahead), end - start)
            self._block = self._ranges.read(self._url, start, max(0, wanted))
        return bytes(self._block[start - self._start : start - self._start + length])


def iter_member_ranges(
    headers: HeaderReader, start: int = 0, end: int | None = None, inside: str = ""
) -> Iterator[MemberRange]:
    """The plain files of the tar that lies in bytes `start` to `end` of an object; `inside` names it in errors.

    Raises DataError, naming object and byte, when it is cut or damaged; StorageError when the storage fails.
    """
    end = headers.size if end is None else end
    name = f"{headers.redacted_url}: {inside}" if inside else headers.redacted_url
    at, said = start, dict[str, str]()
    while True:
        block = headers.read(at, _RECORD_BYTES, end)
        if len(block) < _RECORD_BYTES:
            what = "inside the header of a member" if block else "the end of the archive, a block of zeros, is missing"
            raise DataError(f"{name}: truncated at byte {at + len(block)}: {what}")
        if not any(block):
            return
        info = parse_header(block, at, f"{name}: damaged")
        body, size = at + _RECORD_BYTES, parse_size(said.get("size", info.size), at, name)
        padded = 0 if info.type in _BODILESS_TYPES else -(-size // _RECORD_BYTES) * _RECORD_BYTES
        if body + padded > end:
            raise DataError(
                f"{name}: truncated at byte {end}: inside member {said.get('path', info.name)!r}, whose {size} bytes "
                f"begin at byte {body}"
            )
        if info.type in _EXTENDED_TYPES:
            said |= _parse_extended_header(
                info, headers.read(body, _check_extended_size(size, at, name), end), at, name
            )
        else:
            if info.type in _REGULAR_TYPES:
                yield MemberRange(said.get("path", info.name), body, size)
            said = {}
        at = body + padded


def _check_extended_size(size: int, at: int, name: str) -> int:
    if size > MAX_EXTENDED_HEADER:
        raise DataError(f"{name}: damaged at byte {at}: the extended header there claims {size} bytes")
    return size


def _parse_extended_header(info: tarfile.TarInfo, data: bytes, at: int, name: str) -> dict[str, str]:
    """What an extended header says of the next member: its `path`, its `size` (PAX)."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    said: dict[str, str] = {}
    while info.type in _PAX_TYPES and data:
        digits, _, rest = data.partition(b" ")  # "LENGTH KEYWORD=VALUE\n", the length that of the whole
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        record, data = rest[: max(0, length - len(digits) - 1)], data[length:]
        keyword, equals, value = record.partition(b"=")
        if not length or not equals or not value.endswith(b"\n"):
            raise DataError(f"{name}: damaged at byte {at}: the extended header there is no list of PAX records")
        if keyword.startswith(b"GNU.sparse."):
            raise DataError(f"{name}: the member after byte {at} is sparse: its bytes are not in one piece")
        if keyword in (b"path", b"size"):
            said[keyword.decode()] = value[:-1].decode("utf-8", "surrogateescape")
    return said
