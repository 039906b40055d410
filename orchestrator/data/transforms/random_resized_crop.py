"""Random resized crops for training (arXiv 1409.4842, section 6), a function of the image and keyed uniform draws."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.config import AugmentationConfig
from orchestrator.data.transforms.decode import Image, ThreadBuffer, decode_top_rows, read_header

INTERPOLATIONS = {
    "bilinear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST,
    "cubic": cv2.INTER_CUBIC,
}

# A crop of the wanted area and aspect may not fit; ten tries, then the largest centred crop of a legal aspect.
CROP_ATTEMPTS = 10
DRAWS = 4 * CROP_ATTEMPTS + 2  # 4 for each try, then interpolation and mirror

Draws = NDArray[np.float64]  # DRAWS numbers in [0, 1)
CropBox = tuple[int, int, int, int]  # x, y, width, height


def draw_crop_box(width: int, height: int, config: AugmentationConfig, draws: Draws) -> CropBox:
    """Return x, y, width, height of a crop: area uniform in its range, aspect log-uniform in its own."""
    log_low, log_high = math.log(config.aspect[0]), math.log(config.aspect[1])
    for attempt in range(CROP_ATTEMPTS):
        u_area, u_aspect, u_x, u_y = draws[4 * attempt : 4 * attempt + 4].tolist()
        area = width * height * (config.area[0] + u_area * (config.area[1] - config.area[0]))
        aspect = math.exp(log_low + u_aspect * (log_high - log_low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u_x * (width - w + 1)), int(u_y * (height - h + 1)), w, h
    aspect = min(max(width / height, config.aspect[0]), config.aspect[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, max(1, w), max(1, h)


def choose_denominator(box: CropBox, size: int) -> int:
    """Return how much decoding may reduce an image (1, 2, 4, 8) so that the crop still has the input's size."""
    shorter = min(box[2], box[3])
    return next((each for each in (8, 4, 2) if shorter // each >= size), 1)


def reduce_box(box: CropBox, by: int, size: int) -> CropBox:
    """Return the box in whole pixels of the reduced image, its edges moved by at most half of one."""
    x, y = round(box[0] / by), round(box[1] / by)
    w, h = round((box[0] + box[2]) / by) - x, round((box[1] + box[3]) / by) - y
    return (x, y, w, h) if by == 1 else (x, y, max(w, size), max(h, size))


def crop_image(image: Image, config: AugmentationConfig, draws: Draws, out: Image) -> None:
    """Crop, resize and perhaps mirror `image` (H x W x 3) into `out` (S x S x 3), both uint8."""
    height, width = image.shape[:2]
    _resize_crop(image, draw_crop_box(width, height, config, draws), config, draws, out)


def decode_and_crop(
    data: bytearray | memoryview, config: AugmentationConfig, draws: Draws, out: Image, is_whole: bool = False
) -> None:
    """Decode no more of an image than the crop needs, and crop it into `out` (S x S x 3). Raises BadSampleError.

    is_whole: whether the image was decoded before, so that rows below the crop need not be checked.
    """
    head = read_header(data)
    box = draw_crop_box(head.width, head.height, config, draws)
    fast = config.decoding == "fast"
    by = choose_denominator(box, out.shape[0]) if fast and head.is_jpeg else 1
    box = reduce_box(box, by, out.shape[0])
    image = decode_top_rows(data, head, (box[1] + box[3]) * by, by, fast, is_whole)
    _resize_crop(image, box, config, draws, out)


_thread_buffer = ThreadBuffer()  # for a crop that is then mirrored


def _resize_crop(image: Image, box: CropBox, config: AugmentationConfig, draws: Draws, out: Image) -> None:
    x, y, w, h = box
    method = INTERPOLATIONS[config.interpolations[int(draws[-2] * len(config.interpolations))]]
    crop, size = image[y : y + h, x : x + w], (out.shape[1], out.shape[0])
    if config.mirror and draws[-1] < 0.5:
        plain = _thread_buffer.get_pixels(*out.shape[:2])
        cv2.flip(cv2.resize(crop, size, dst=plain, interpolation=method), 1, dst=out)
    else:
        cv2.resize(crop, size, dst=out, interpolation=method)
