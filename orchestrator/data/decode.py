"""Encoded image to RGB array, with the dimensions bounded before a pixel is decoded.

A training crop needs neither the rows below it nor, when it is much larger than the network's input, every pixel:
`decode_part` stops after the last row that is asked for and decodes at 1/2, 1/4 or 1/8 size. libjpeg's entropy decoder
has to pass every byte above a row, so nothing is to be saved above or beside the crop.
"""

from __future__ import annotations

import re
import struct
import threading
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from orchestrator.data.errors import BadSampleError

Image = NDArray[np.uint8]
Encoded = bytes | bytearray | memoryview

# A bomb of 65,535 x 65,535 would take 12 GB; ImageNet's largest training image has about 32 million pixels.
MAX_PIXELS = 100_000_000
# Test crops enlarge the shorter side: a strip of 1 x 60,000 would grow to 256 x 15 million pixels, 12 GB.
MAX_ASPECT = 100
# A thread keeps its pixel buffer up to this size; larger images get one of their own.
KEPT_BYTES = 64 * 2**20
# Samples are decoded side by side by the loader's threads; OpenCV's own would only compete with them.
cv2.setNumThreads(1)

_PNG = b"\x89PNG\r\n\x1a\n"
_SOF_BASELINE = (0xC0, 0xC1)
_NO_BASELINE = (0xDA, *(marker for marker in range(0xC2, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)))
_SEGMENT = struct.Struct(">BBHBH")  # marker, length; of a frame: precision, rows
_MCU_ROWS = 16  # rows of the tallest unit that JPEG files in use are coded in
# Upsampling of chroma looks one row further down, unless it is the fast one.
_MARGIN_ROWS = 8
# What libjpeg says of the rows that were left out: restart markers or the end of image follow.
_LEFT_OUT = re.compile(r"extraneous bytes before marker 0xd[0-79]$")
# Junk between the last row and the end: the image is whole, as libjpeg tells of the first trouble and this is it.
_WHOLE = re.compile(r"extraneous bytes before marker 0xd9$")


class Header(NamedTuple):
    """What is known before decoding."""

    width: int
    height: int
    rows_at: int  # byte of the height field of a JPEG whose rows can be cut; 0 of any other image
    is_jpeg: bool  # one that simplejpeg turns into RGB


def header(data: Encoded) -> Header:
    """Dimensions and kind of a JPEG or PNG (whatever its name said).

    Raises BadSampleError for anything else and for images over MAX_PIXELS pixels or MAX_ASPECT : 1.
    """
    if data[:1] == b"\x89" and bytes(data[:8]) == _PNG:
        width, height = _png_size(data)
        found = Header(width, height, 0, False)
    else:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise BadSampleError(f"no JPEG or PNG: {error}") from None
        plain = colorspace not in ("CMYK", "YCCK")
        found = Header(width, height, _rows_field(data) if plain else 0, plain)
    _check_size(found.width, found.height)
    return found


def decode(data: Encoded) -> Image:
    """H x W x 3 uint8 RGB of a JPEG or PNG, grey ones spread over three channels.

    Raises BadSampleError for anything that is no whole image of at most MAX_PIXELS pixels and MAX_ASPECT : 1.
    """
    if not header(data).is_jpeg:
        return _decode_other(data)
    try:
        image: Image = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        if not _WHOLE.search(str(error)):
            raise BadSampleError(f"broken JPEG: {error}") from None
        image = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)
    return image


def decode_part(data: bytearray | memoryview, head: Header, rows: int, denominator: int, fast: bool = False) -> Image:
    """At least the first `rows` of the image, decoded at 1 / `denominator` (1, 2, 4, 8) of its size.

    The pixels are those of `decode`; with `fast`, whose DCT and chroma are rougher, about 40 dB from them.
    The result lies in the thread's buffer and is valid until its next call. Images that are no baseline JPEG come whole
    and in full size: look at the shape. `data` is altered while this runs. Raises BadSampleError when it is broken.
    """
    if not head.is_jpeg:
        return _decode_other(data)
    needed = rows if fast else rows + _MARGIN_ROWS
    kept = min(head.height, -(-needed // _MCU_ROWS) * _MCU_ROWS)
    if head.rows_at and kept < head.height:
        pixels = _thread.pixels(*_at(head.width, kept, denominator))
        struct.pack_into(">H", data, head.rows_at, kept)
        try:
            _decode_into(pixels, data, fast)
            return pixels
        except ValueError as error:
            if _LEFT_OUT.search(str(error)):
                return pixels
            # Something else is odd: the whole image tells what.
        finally:
            struct.pack_into(">H", data, head.rows_at, head.height)
    pixels = _thread.pixels(*_at(head.width, head.height, denominator))
    try:
        _decode_into(pixels, data, fast)
    except ValueError as error:
        if not _WHOLE.search(str(error)):
            raise BadSampleError(f"broken JPEG: {error}") from None
    return pixels


def _decode_into(pixels: Image, data: Encoded, fast: bool) -> None:
    """Decode at the size of `pixels`; they are filled before libjpeg's warnings are raised as ValueError."""
    rows, columns = pixels.shape[:2]
    simplejpeg.decode_jpeg(
        data, "RGB", fastdct=fast, fastupsample=fast, min_height=rows, min_width=columns, buffer=pixels, strict=True
    )


def _at(width: int, height: int, denominator: int) -> tuple[int, int]:
    """Rows and columns at 1 / denominator, as libjpeg rounds them."""
    return -(-height // denominator), -(-width // denominator)


class _Thread(threading.local):
    """A pixel buffer for each thread: fresh memory for every image would cost page faults."""

    def __init__(self) -> None:
        self._buffer: Image = np.empty(0, dtype=np.uint8)

    def pixels(self, rows: int, columns: int) -> Image:
        """Rows x columns x 3 of the thread's buffer; the same memory at each call."""
        needed = rows * columns * 3
        if needed > self._buffer.size:
            fresh = np.empty(needed, dtype=np.uint8)
            if needed > KEPT_BYTES:
                return fresh.reshape(rows, columns, 3)
            self._buffer = fresh
        return self._buffer[:needed].reshape(rows, columns, 3)


_thread = _Thread()


def _rows_field(data: Encoded) -> int:
    """Where a baseline JPEG keeps its height; 0 when there is no such place or the height is told later (DNL)."""
    at, end = 2, len(data) - 9
    while at < end:
        filler, marker, length, _, rows = _SEGMENT.unpack_from(data, at)
        if marker in _SOF_BASELINE:
            return at + 5 if rows else 0
        # The scan, another kind of frame (progressive, lossless ...), or no marker at all.
        if filler != 0xFF or marker in _NO_BASELINE:
            return 0
        at += 2 + int(length)
    return 0


def _png_size(data: Encoded) -> tuple[int, int]:
    if len(data) < 24:
        raise BadSampleError("broken PNG: it ends inside its header")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _decode_other(data: Encoded) -> Image:
    # EXIF orientation is ignored for every format alike: what the labels were made for is the stored raster.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    if image is None:
        raise BadSampleError("broken image: OpenCV cannot decode it")
    return np.asarray(image, dtype=np.uint8)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise BadSampleError(f"{width} x {height} pixels is refused: at most {MAX_PIXELS} in all")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSampleError(f"{width} x {height} pixels is refused: at most {MAX_ASPECT} times as long as wide")
