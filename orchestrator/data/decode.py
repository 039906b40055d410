"""Encoded image to RGB array, with the dimensions bounded before a pixel is decoded."""

from __future__ import annotations

import struct

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from orchestrator.data.errors import BadSampleError

Image = NDArray[np.uint8]

# A bomb of 65,535 x 65,535 would take 12 GB; ImageNet's largest training image has about 32 million pixels.
MAX_PIXELS = 100_000_000
# Test crops enlarge the shorter side: a strip of 1 x 60,000 would grow to 256 x 15 million pixels, 12 GB.
MAX_ASPECT = 100
# Samples are decoded side by side by the loader's threads; OpenCV's own would only compete with them.
cv2.setNumThreads(1)

_PNG = b"\x89PNG\r\n\x1a\n"


def decode(data: bytes) -> Image:
    """H x W x 3 uint8 RGB of a JPEG or PNG (whatever its name said), grey ones spread over three channels.

    Raises BadSampleError for anything that is no whole image of at most MAX_PIXELS pixels and MAX_ASPECT : 1.
    """
    if data.startswith(_PNG):
        return _decode_other(data, *_png_size(data))
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadSampleError(f"no JPEG or PNG: {error}") from None
    if colorspace in ("CMYK", "YCCK"):
        return _decode_other(data, width, height)
    _check_size(width, height)
    try:
        image: Image = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        raise BadSampleError(f"broken JPEG: {error}") from None
    return image


def _png_size(data: bytes) -> tuple[int, int]:
    if len(data) < 24:
        raise BadSampleError("broken PNG: it ends inside its header")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _decode_other(data: bytes, width: int, height: int) -> Image:
    _check_size(width, height)
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
