"""What is odd about an encoded image, and whether it can be trained on; dimensions are looked at before pixels."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from orchestrator.data import decode
from orchestrator.data.errors import BadSampleError
from orchestrator.data.tars import MAX_PAYLOAD

# Kept as they are; the decoder copes with them.
Oddity = Literal[
    "cmyk", "ycck", "grey", "progressive", "png-named-jpeg", "jpeg-named-png", "exif-broken", "exif-rotated"
]
# Why an image is left out.
Defect = Literal["empty", "no-image", "too-large", "undecodable"]

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_GREY_PNG = (b"\0", b"\4")  # colour types, without and with alpha
_JPEG_NAMES = ("jpg", "jpeg", "jpe", "jfif")
_ORIENTATION = 0x0112
# Bytes of a value of each EXIF type.
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}


@dataclass(frozen=True)
class Finding:
    """What was found out about an image."""

    extension: str  # by content: "jpg" or "png"
    width: int = 0
    height: int = 0
    oddities: tuple[Oddity, ...] = ()
    defect: Defect | None = None
    reason: str = ""  # of the defect


@dataclass
class _Segments:
    """What the segments before a JPEG's first scan tell."""

    frame: int = 0  # marker
    components: int = 0
    adobe: int | None = None  # colour transform
    exif: bytes | None = None


def inspect(image: bytes, name: str) -> Finding:
    """What an image whose file is called `name` tells before a pixel is decoded."""
    is_png = image[:8] == _PNG
    if not image:
        return Finding("jpg", defect="empty", reason="0 bytes")
    if not is_png and image[:3] != _JPEG:
        begins = bytes(image[:8]).hex(" ")
        return Finding("jpg", defect="no-image", reason=f"no JPEG or PNG: it begins with {begins}")
    try:
        head = decode.header(image)
    except BadSampleError as error:
        defect: Defect = "too-large" if "is refused" in str(error) else "undecodable"
        return Finding("png" if is_png else "jpg", defect=defect, reason=str(error))
    found = _png_oddities(image) if is_png else _jpeg_oddities(_segments(image))
    named = name.rpartition(".")[2].lower()
    if is_png and named in _JPEG_NAMES:
        found.append("png-named-jpeg")
    elif not is_png and named == "png":
        found.append("jpeg-named-png")
    return Finding("png" if is_png else "jpg", head.width, head.height, tuple(found))


def too_many_bytes(length: int) -> Finding | None:
    """The finding about an image that is not even read."""
    if length <= MAX_PAYLOAD:
        return None
    return Finding("jpg", defect="too-large", reason=f"{length} bytes is refused: at most {MAX_PAYLOAD}")


def _png_oddities(image: bytes) -> list[Oddity]:
    return ["grey"] if image[25:26] in _GREY_PNG else []


def _jpeg_oddities(segments: _Segments) -> list[Oddity]:
    found: list[Oddity] = []
    if segments.components == 4:
        found.append("ycck" if segments.adobe == 2 else "cmyk")
    elif segments.components == 1:
        found.append("grey")
    if segments.frame in _PROGRESSIVE:
        found.append("progressive")
    if segments.exif is not None:
        orientation = _orientation(segments.exif)
        if orientation is None:
            found.append("exif-broken")
        elif orientation > 1:
            found.append("exif-rotated")
    return found


def _segments(image: bytes) -> _Segments:
    found, at = _Segments(), 2
    while at + 4 <= len(image) and image[at] == 0xFF:
        marker = image[at + 1]
        if marker == 0xFF or marker in _STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xDA, 0xD9):
            break
        length = int.from_bytes(image[at + 2 : at + 4], "big")
        body = bytes(image[at + 4 : at + 2 + length])
        if marker in _FRAMES and len(body) >= 6:
            found.frame, found.components = marker, body[5]
        elif marker == 0xE1 and body.startswith(b"Exif\0") and found.exif is None:
            found.exif = body[6:]
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            found.adobe = body[11]
        at += 2 + max(2, length)
    return found


def _orientation(exif: bytes) -> int | None:
    """The orientation that EXIF data tells, 1 (upright) when it tells none; None when the data is broken."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    try:
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, first)
        orientation = 1
        for number in range(count):
            tag, kind, values = struct.unpack_from(order + "HHI", exif, first + 2 + 12 * number)
            place = first + 2 + 12 * number + 8
            length = _TYPE_BYTES[kind] * values
            if length > 4:
                (place,) = struct.unpack_from(order + "I", exif, place)
            if place + length > len(exif):
                return None
            if tag == _ORIENTATION:
                (orientation,) = struct.unpack_from(order + "H", exif, place)
    except (struct.error, KeyError):
        return None
    # 0 is written by some cameras for "not known".
    return max(1, orientation) if orientation <= 8 else None
