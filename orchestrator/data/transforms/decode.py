"""Decoder of images to RGB arrays, which bounds dimensions, scans and chunks before a pixel is decoded.

libjpeg's warnings about a JPEG's entire entropy stream say whether it is whole, after known harmless oddities were
removed. A training crop of an image that packing has already found whole needs neither the rows below it nor, when it
is much larger than the network's input, every pixel: `decode_top_rows` stops after the last row needed and decodes at
1/2, 1/4 or 1/8 size. Above and beside the crop libjpeg's entropy decoder has to pass every byte.
"""

from __future__ import annotations

import io
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import TiffImagePlugin

from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.transforms import image_format
from orchestrator.data.transforms.image_format import FORMAT_NAMES, DecodableFormat, EncodedImage, JpegSegments, PngInfo

Image = NDArray[np.uint8]

# A bomb of 65,535 x 65,535 would take 12 GB; ImageNet's largest training image has about 32 million pixels.
MAX_PIXELS = 100_000_000
# Test crops enlarge the shorter side: a strip of 1 x 60,000 would grow to 256 x 15 million pixels, 12 GB.
MAX_ASPECT = 100
# Every scan of a JPEG passes over all of its pixels, and one of a hundred bytes may: real files have 10 to 20 scans.
# libjpeg-turbo's own tools stop at 500; at the most pixels, 32 take a second or two.
MAX_SCANS = 500
MAX_SCANNED_PIXELS = 32 * MAX_PIXELS
# Background of transparent images: white, as on paper and in browsers, for which logos and drawings are made.
BACKGROUND_LEVEL = 255
BACKGROUND_NAME = "white"
# A thread keeps its pixel buffer up to this size; larger images get one of their own.
MAX_BUFFER_BYTES = 64 * 2**20
# The loader's threads decode samples in parallel; OpenCV's own would only compete with them.
cv2.setNumThreads(1)
# Pillow's default bound is lower and only warns.
Pillow.MAX_IMAGE_PIXELS = MAX_PIXELS

_MCU_ROWS = 16  # rows of the tallest unit that JPEG files in use are coded in
# Upsampling of chroma looks one row further down, unless it is the fast one.
_MARGIN_ROWS = 8
# libjpeg's warning about the rows that were left out: restart markers or the end of image follow.
_SKIPPED_ROWS_WARNING = re.compile(r"extraneous bytes before marker 0xd[0-79]$")
# Junk between the last row and the end: the image is whole, since libjpeg reports the first problem and this is it.
_TRAILING_JUNK_WARNING = re.compile(r"extraneous bytes before marker 0xd9$")
_MISSING_END_WARNING = "Premature end of JPEG file"
# simplejpeg knows the usual layouts of chroma only.
_UNKNOWN_SUBSAMPLING_ERROR = "Could not determine subsampling"
# Modes of Pillow whose conversion to RGB is the picture; numbers of 16 and more bits would be cut off.
_PLAIN_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_REDUCED_COPY = 1  # bit of TIFF's NewSubfileType


class ImageTooLargeError(BadSampleError):
    """An image of too many pixels or scans, or too long a strip."""


class ImageHeader(NamedTuple):
    """Facts that are known before decoding."""

    width: int
    height: int
    format: DecodableFormat
    segments: JpegSegments | None = None  # of a JPEG

    @property
    def is_jpeg(self) -> bool:
        """True for a JPEG that can be decoded at a reduced size."""
        return self.segments is not None and self.segments.components in (1, 3)


@contextmanager
def _wrap_errors() -> Iterator[None]:
    """Turn any exception of a decoder into BadSampleError: its callers know which sample it was."""
    try:
        yield
    except BadSampleError:
        raise
    except Exception as error:
        raise BadSampleError(f"broken image: {type(error).__name__}: {error}") from error


@_wrap_errors()
def read_header(data: EncodedImage) -> ImageHeader:
    """Return dimensions and format (whatever the file's name says).

    Raises BadSampleError for data of no format that is decoded here, for images over MAX_PIXELS pixels or
    MAX_ASPECT : 1, and for JPEGs of more scans than MAX_SCANS and MAX_SCANNED_PIXELS allow.
    """
    kind = image_format.identify_format(data)
    if kind is None:
        raise BadSampleError(f"no JPEG or PNG: it begins with {bytes(data[:8]).hex(' ') or 'nothing'}")
    if kind not in image_format.DECODABLE_FORMATS:
        raise BadSampleError(f"{FORMAT_NAMES[kind]}: not a format that is decoded here; convert it to JPEG or PNG")
    segments: JpegSegments | None = None
    if kind == "jpeg":
        segments = image_format.read_segments(data)
        if not segments.frame_marker or not segments.scan_offset:
            raise BadSampleError("broken JPEG: no frame and scan in its first segments")
        size = segments.width, segments.height
    elif kind == "png":
        size = image_format.read_png(data)[:2]
    else:
        with _open_with_pillow(data, kind) as image:
            size = image.size
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise ImageTooLargeError(
            f"an image must have 1 to {MAX_PIXELS} pixels, got {size[0]} x {size[1]}; scale it down"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageTooLargeError(
            f"an image must be at most {MAX_ASPECT} times as long as wide, got {size[0]} x {size[1]} pixels; crop it"
        )
    if segments is not None and not segments.is_single_scan:
        most = min(MAX_SCANS, MAX_SCANNED_PIXELS // (size[0] * size[1]))
        if (scans := image_format.count_scans(data, segments)) > most:
            raise ImageTooLargeError(
                f"JPEG of {size[0]} x {size[1]} pixels in {scans} scans, each of which costs time: must have at most "
                f"{most} at that size; save it again as an ordinary JPEG"
            )
    return ImageHeader(*size, kind, segments)


@_wrap_errors()
def decode_image(data: EncodedImage) -> Image:
    """Return H x W x 3 uint8 RGB of an image: grey spread over three channels, transparency on BACKGROUND_LEVEL.

    EXIF orientation is ignored for every format alike: the labels were made for the stored raster. Of several frames or
    pages the first is taken. Raises BadSampleError for anything but a whole image that `read_header` accepts.
    """
    head = read_header(data)
    if head.segments is not None and head.segments.components in (1, 3, 4):
        channels = 4 if head.segments.components == 4 else 3
        pixels = np.empty((head.height, head.width, channels), dtype=np.uint8)
        if _decode_jpeg(data, head.segments, pixels):
            return pixels if channels == 3 else _convert_cmyk(pixels)
    rgb, alpha = _decode_layers(data, head)
    return rgb if alpha is None else _composite_on_background(rgb, alpha)


@_wrap_errors()
def decode_top_rows(
    data: bytearray | memoryview,
    head: ImageHeader,
    rows: int,
    denominator: int,
    fast: bool = False,
    is_whole: bool = False,
) -> Image:
    """Return at least the first `rows` of the image, decoded at 1 / `denominator` (1, 2, 4, 8) of its size.

    The pixels are those of `decode_image`; with `fast`, whose DCT and chroma are rougher, about 40 dB from them.
    is_whole: whether the image was decoded before, so that rows below `rows` need not be read; else they are, and the
    same damage is found as by `decode_image`. The result lies in the thread's buffer and is valid until its next call.
    Images that are no baseline JPEG come whole and in full size: look at the shape. `data` is altered while this runs.
    Raises BadSampleError when it is broken.
    """
    segments = head.segments
    if segments is None or not head.is_jpeg:
        return decode_image(data)
    needed = rows if fast else rows + _MARGIN_ROWS
    kept = min(head.height, -(-needed // _MCU_ROWS) * _MCU_ROWS)
    columns = -(-head.width // denominator)  # as libjpeg rounds
    if is_whole and segments.height_offset and not segments.harmless_spans and kept < head.height:
        pixels = _thread_buffer.get_pixels(-(-kept // denominator), columns)
        struct.pack_into(">H", data, segments.height_offset, kept)
        try:
            _decode_into(pixels, data, fast)
            return pixels
        except ValueError as error:
            if _SKIPPED_ROWS_WARNING.search(str(error)):
                return pixels
            # Something else is odd: decoding the whole image shows it.
        finally:
            struct.pack_into(">H", data, segments.height_offset, head.height)
    pixels = _thread_buffer.get_pixels(-(-head.height // denominator), columns)
    return pixels if _decode_jpeg(data, segments, pixels, fast) else decode_image(data)


@_wrap_errors()
def is_transparent(data: EncodedImage) -> bool:
    """Return whether a pixel of an image is not opaque. Raises BadSampleError as `decode_image` does."""
    head = read_header(data)
    if head.format == "jpeg" or (head.format == "png" and not image_format.read_png(data).has_alpha):
        return False
    if head.format != "png":
        with _open_with_pillow(data, head.format) as image:
            if not image.has_transparency_data:
                return False  # without decoding it: packing does that
    _, alpha = _decode_layers(data, head)
    return alpha is not None and bool((alpha < 255).any())


def _decode_jpeg(data: EncodedImage, segments: JpegSegments, pixels: Image, fast: bool = False) -> bool:
    """Decode a JPEG at the size of `pixels`, RGB or CMYK; False when simplejpeg does not know its layout of chroma.

    Raises BadSampleError unless the image is whole, which is decided here alone.
    """
    if segments.harmless_spans:
        data = image_format.remove_harmless(data, segments)
    try:
        _decode_into(pixels, data, fast)
        return True
    except ValueError as error:
        problem = str(error)
    if _UNKNOWN_SUBSAMPLING_ERROR in problem:
        return False
    is_whole = _TRAILING_JUNK_WARNING.search(problem) is not None
    if problem == _MISSING_END_WARNING and segments.is_single_scan:
        # Perhaps only the end mark is missing; decoding with one shows whether more is.
        with suppress(ValueError):
            _decode_into(pixels, b"".join((data, b"\xff\xd9")), fast)
            is_whole = True
    if not is_whole:
        raise BadSampleError(f"broken JPEG: {problem}")
    return True


def _decode_into(pixels: Image, data: EncodedImage, fast: bool) -> None:
    """Decode at the size of `pixels`; they are filled before libjpeg's warnings are raised as ValueError."""
    rows, columns, channels = pixels.shape
    simplejpeg.decode_jpeg(
        data, "RGB" if channels == 3 else "CMYK", fastdct=fast, fastupsample=fast, min_height=rows, min_width=columns,
        buffer=pixels, strict=True,
    )  # fmt: skip


class ThreadBuffer(threading.local):
    """A pixel buffer for each thread: fresh memory for every image would cost page faults."""

    _buffer: Image = np.empty(0, dtype=np.uint8)

    def get_pixels(self, rows: int, columns: int) -> Image:
        """Return rows x columns x 3 of the thread's buffer; the same memory at each call."""
        needed = rows * columns * 3
        if needed > MAX_BUFFER_BYTES:
            return np.empty((rows, columns, 3), dtype=np.uint8)
        if needed > self._buffer.size:
            self._buffer = np.empty(needed, dtype=np.uint8)
        return self._buffer[:needed].reshape(rows, columns, 3)


_thread_buffer = ThreadBuffer()


def _convert_cmyk(pixels: Image) -> Image:
    """Return RGB of CMYK as JPEGs hold it, inverted, by the formula of OpenCV."""
    rgb = np.empty((*pixels.shape[:2], 3), dtype=np.uint8)
    for rows in _split_rows(len(pixels)):
        inks = pixels[rows].astype(np.int32)
        black = inks[:, :, 3:]
        rgb[rows] = black - ((255 - inks[:, :, :3]) * black >> 8)
    return rgb


def _decode_layers(data: EncodedImage, head: ImageHeader) -> tuple[Image, Image | None]:
    if head.format == "png":
        png = image_format.read_png(data)
        image_format.check_surplus(png)
        if not png.has_alpha:
            return _decode_with_opencv(png, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION), None
        bgra = _decode_bgra(png)
        return bgra[:, :, 2::-1], bgra[:, :, 3]
    with _open_with_pillow(data, head.format) as image:
        if image.size != (head.width, head.height):
            raise BadSampleError(
                f"broken image: {head.width} x {head.height} pixels by its header, {image.size} in all"
            )
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB")), None
        rgba = np.asarray(image.convert("RGBA"))
    return rgba[:, :, :3], rgba[:, :, 3]


def _open_with_pillow(data: EncodedImage, kind: str) -> Pillow.Image:
    """Open an image, undecoded. Raises BadSampleError for one that Pillow would change or decode very slowly."""
    name = FORMAT_NAMES[kind]
    try:
        image = Pillow.open(io.BytesIO(data), formats=(name.upper(),))
    except OSError:
        raise BadSampleError(f"broken {name}: its header cannot be read") from None
    problem = ""
    if image.mode not in _PLAIN_MODES:
        problem = f"of kind {image.mode!r}, not of 8 bits a channel"
    elif kind == "bmp" and image.info.get("compression") not in (0, 3):  # others are unpacked in Python
        problem = "with compression"
    elif isinstance(image, TiffImagePlugin.TiffImageFile) and int(image.tag_v2.get(254, 0)) & _REDUCED_COPY:
        problem = "that begins with a reduced copy, as cameras' raw files do"
    if problem:
        raise BadSampleError(f"{name} {problem}: convert it to JPEG or PNG")
    return image


def _decode_with_opencv(png: PngInfo, flags: int) -> NDArray[Any]:
    image = cv2.imdecode(np.frombuffer(png.pixels, dtype=np.uint8), flags)
    if image is None:
        raise BadSampleError("broken image: OpenCV cannot decode it")
    return np.asarray(image)


def _decode_bgra(png: PngInfo) -> Image:
    """Return H x W x 4 of a PNG that has alpha, 8 bits a channel."""
    image = _decode_with_opencv(png, cv2.IMREAD_UNCHANGED)
    if image.ndim == 2:  # grey of which one level is transparent: OpenCV leaves that out
        (level,) = struct.unpack(">H", (png.trns or b"")[:2])
        level = level * 255 // (2**png.bit_depth - 1) if png.bit_depth < 8 else level
        alpha = np.where(image == level, 0, np.iinfo(image.dtype).max).astype(image.dtype)
        image = np.dstack((image, image, image, alpha))
    return image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)


def _composite_on_background(rgb: Image, alpha: Image) -> Image:
    """Return RGB on BACKGROUND_LEVEL, rounded to the nearest level."""
    image = np.empty(rgb.shape, dtype=np.uint8)
    for rows in _split_rows(len(rgb)):
        opacity = alpha[rows, :, None].astype(np.uint16)
        image[rows] = (rgb[rows] * opacity + np.uint16(BACKGROUND_LEVEL) * (255 - opacity) + 127) // 255
    return image


def _split_rows(rows: int) -> list[slice]:
    # In pieces, so that numbers of more bits take little memory.
    return [slice(first, first + 64) for first in range(0, rows, 64)]
