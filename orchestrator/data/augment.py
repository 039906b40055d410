"""Training-time crops (arXiv 1409.4842, section 6), each a function of the image and of keyed uniform draws."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.config import AugmentationConfig
from orchestrator.data.decode import Image

INTERPOLATIONS = {
    "bilinear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST,
    "cubic": cv2.INTER_CUBIC,
}

# A crop of the wanted area and aspect may not fit; ten tries, then the largest centred crop of a legal aspect.
ATTEMPTS = 10
# Draws: 4 for each try, then interpolation and mirror.
DRAWS = 4 * ATTEMPTS + 2

Draws = NDArray[np.float64]  # DRAWS numbers in [0, 1)


def crop_box(width: int, height: int, config: AugmentationConfig, draws: Draws) -> tuple[int, int, int, int]:
    """x, y, width, height of a crop: area uniform in its range, aspect log-uniform in its own."""
    log_low, log_high = math.log(config.aspect[0]), math.log(config.aspect[1])
    for attempt in range(ATTEMPTS):
        u_area, u_aspect, u_x, u_y = draws[4 * attempt : 4 * attempt + 4].tolist()
        area = width * height * (config.area[0] + u_area * (config.area[1] - config.area[0]))
        aspect = math.exp(log_low + u_aspect * (log_high - log_low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u_x * (width - w + 1)), int(u_y * (height - h + 1)), w, h
    aspect = min(max(width / height, config.aspect[0]), config.aspect[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, max(1, w), max(1, h)


def augment(image: Image, config: AugmentationConfig, draws: Draws, out: Image) -> None:
    """Crop, resize and perhaps mirror `image` (H x W x 3) into `out` (S x S x 3), both uint8."""
    height, width = image.shape[:2]
    x, y, w, h = crop_box(width, height, config, draws)
    method = config.interpolations[int(draws[-2] * len(config.interpolations))]
    size = (out.shape[1], out.shape[0])
    crop = cv2.resize(image[y : y + h, x : x + w], size, interpolation=INTERPOLATIONS[method])
    out[:] = crop[:, ::-1] if config.mirror and draws[-1] < 0.5 else crop
