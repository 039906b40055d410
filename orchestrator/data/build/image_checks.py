"""Checks of an encoded image: what is odd about it, and whether it can be trained on; a line about transparency."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from orchestrator.data.build.tar_reader import MAX_MEMBER_BYTES, TarMember
from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.transforms import decode
from orchestrator.data.transforms.image_format import (
    PROGRESSIVE_MARKERS,
    UNSUPPORTED_FORMATS,
    JpegSegments,
    identify_format,
    read_png,
)

# Met in images that are taken; those of another format are stored as PNG, the others are kept as they are.
Oddity = Literal[
    "cmyk", "ycck", "grey", "progressive", "transparent", "png-named-jpeg", "jpeg-named-png", "exif-broken",
    "exif-rotated", "webp", "gif", "bmp", "tiff",
]  # fmt: skip
# Why an image is left out; by its format when that is the reason.
Defect = Literal[
    "empty", "no-image", "too-large", "undecodable", "heic", "avif", "jpeg-xl", "jpeg-2000", "psd", "svg", "pdf"
]

_JPEG_NAMES = ("jpg", "jpeg", "jpe", "jfif")
_ORIENTATION = 0x0112
# Bytes of a value of each EXIF type.
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}


@dataclass(frozen=True)
class ImageFinding:
    """Result of the checks of an image."""

    extension: str  # of what is stored: "jpg" or "png"
    width: int = 0
    height: int = 0
    oddities: tuple[Oddity, ...] = ()
    defect: Defect | None = None
    reason: str = ""  # of the defect


def inspect_image(image: bytes, name: str) -> ImageFinding:
    """Return what is known of an image, whose file is called `name`, before a pixel is decoded."""
    if not image:
        return ImageFinding("jpg", defect="empty", reason="0 bytes")
    kind = identify_format(image)
    extension = "jpg" if kind == "jpeg" else "png"
    try:
        head = decode.read_header(image)
    except BadSampleError as error:
        return ImageFinding(extension, defect=_classify_defect(kind, error), reason=str(error))
    oddities: list[Oddity] = []
    if head.segments is not None:
        oddities += _find_jpeg_oddities(image, head.segments)
    elif head.format == "png":
        oddities += ["grey"] if read_png(image).is_gray else []
    elif head.format != "jpeg":
        oddities.append(head.format)
    named = name.rpartition(".")[2].lower()
    if kind == "png" and named in _JPEG_NAMES:
        oddities.append("png-named-jpeg")
    elif kind == "jpeg" and named == "png":
        oddities.append("jpeg-named-png")
    return ImageFinding(extension, head.width, head.height, tuple(oddities))


def _classify_defect(kind: str | None, error: BadSampleError) -> Defect:
    if kind is None:
        return "no-image"
    if isinstance(error, decode.ImageTooLargeError):
        return "too-large"
    return next((other for other in UNSUPPORTED_FORMATS if other == kind), "undecodable")


def check_byte_size(length: int) -> ImageFinding | None:
    """Return the finding about an image that is too large to be read, else None."""
    if length <= MAX_MEMBER_BYTES:
        return None
    return ImageFinding(
        "jpg", defect="too-large", reason=f"an image must have at most {MAX_MEMBER_BYTES} bytes, got {length}"
    )


def _find_jpeg_oddities(image: bytes, segments: JpegSegments) -> list[Oddity]:
    oddities: list[Oddity] = []
    if segments.components == 4:
        oddities.append("ycck" if segments.adobe_transform == 2 else "cmyk")
    elif segments.components == 1:
        oddities.append("grey")
    if segments.frame_marker in PROGRESSIVE_MARKERS:
        oddities.append("progressive")
    if segments.exif_span is not None:
        orientation = _read_orientation(image[slice(*segments.exif_span)])
        if orientation is None:
            oddities.append("exif-broken")
        elif orientation > 1:
            oddities.append("exif-rotated")
    return oddities


def _read_orientation(exif: bytes) -> int | None:
    """Return the orientation in EXIF data, 1 (upright) when there is none; None when the data is broken."""
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


def describe_transparent(counts: Mapping[str, int]) -> list[str]:
    """Return a line about the transparent images of each split that has some."""
    return [
        f"{split}: {count} images are transparent: they are laid on {decode.BACKGROUND_NAME}"
        for split, count in counts.items()
        if count
    ]


def record_transparent(members: Iterable[TarMember], images: Sequence[str], keys: list[str]) -> Iterator[TarMember]:
    """Yield the members, and append the key of each image that is not opaque to `keys`; ignore broken ones."""
    for member in members:
        if member.extension in images:
            with suppress(BadSampleError):
                if decode.is_transparent(member.payload):
                    keys.append(member.key)
        yield member
