"""Photometric distortions of training images (arXiv 1409.4842, section 6), a function of the image and keyed draws.

After Howard (arXiv 1312.5402): brightness, contrast and saturation are scaled by random factors in random order, as
PIL's ImageEnhance does; then lighting noise after Krizhevsky 2012 (section 4.1) shifts all pixels by one colour.

Each scaling is affine in a pixel and its gray: p -> scale * p + graying * gray(p) + shift. A factor of at most 1 leaves
nothing to clip to 0 .. 255, so only a larger one is applied immediately; the others are composed with what follows.
"""

from __future__ import annotations

from itertools import permutations
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.config import PhotometricConfig
from orchestrator.data.transforms.decode import Image

DRAWS = 7  # three factors, their order, three amounts of light
Draws = NDArray[np.float64]  # DRAWS numbers in [0, 1)

BRIGHTNESS, CONTRAST, SATURATION = range(3)
FACTOR_ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION)))
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # of R, G, B: ITU-R 601, as PIL's grey

# Principal components (columns) of R, G, B over ImageNet's training images, and their standard deviations in 0 .. 255:
# the figures in general use, as in fb.resnet.torch (there 0.2175, 0.0188, 0.0045 of 0 .. 1). Krizhevsky 2012 writes
# "eigenvalues"; those of the covariance would be the squares.
PCA_COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_DEVIATIONS = (55.46, 4.794, 1.148)

_NORMAL = NormalDist()
_MIN_DRAW = 2.0**-54  # half a step of the draws: the normal distribution has no value for 0


class _Affine(NamedTuple):
    """p -> scale * p + graying * gray(p) + shift, for each of R, G, B."""

    scale: float = 1.0
    graying: float = 0.0
    shift: float = 0.0

    def compose(self, kind: int, factor: float, mean_gray: float) -> _Affine:
        """Return this, then `factor` of the pixel and 1 - factor of black, of the mean gray, or of the pixel's gray."""
        scale, graying, shift = (factor * part for part in self)
        if kind == CONTRAST:
            shift += (1 - factor) * ((self.scale + self.graying) * mean_gray + self.shift)
        elif kind == SATURATION:
            graying += (1 - factor) * (self.scale + self.graying)
            shift = self.shift
        return _Affine(scale, graying, shift)


def draw_factors(config: PhotometricConfig, draws: Draws) -> tuple[tuple[int, float], ...]:
    """Return pairs of BRIGHTNESS, CONTRAST or SATURATION and its factor, in the order in which they are applied."""
    amounts = (config.brightness, config.contrast, config.saturation)
    drawn = [1 + amount * (2 * draw - 1) for amount, draw in zip(amounts, draws[:3].tolist(), strict=True)]
    return tuple((kind, drawn[kind]) for kind in FACTOR_ORDERS[int(draws[3] * len(FACTOR_ORDERS))])


def draw_lighting(config: PhotometricConfig, draws: Draws) -> tuple[float, ...]:
    """Return the lighting noise, added to R, G and B of every pixel (0 .. 255)."""
    normal = [_NORMAL.inv_cdf(max(draw, _MIN_DRAW)) for draw in draws[4:].tolist()]
    amounts = [config.lighting * deviation * draw for deviation, draw in zip(PCA_DEVIATIONS, normal, strict=True)]
    return tuple(sum(part * amount for part, amount in zip(row, amounts, strict=True)) for row in PCA_COMPONENTS)


def distort_image(image: Image, config: PhotometricConfig, draws: Draws) -> None:
    """Distort `image` (H x W x 3 uint8 RGB) in place."""
    pending = _Affine()
    for kind, factor in draw_factors(config, draws):
        if factor == 1:
            continue
        mean_gray = 0.0
        if kind == CONTRAST:
            red, green, blue, _ = cv2.mean(image)
            mean_gray = GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue
        pending = pending.compose(kind, factor, mean_gray)
        if factor > 1:
            _apply_affine(image, pending)
            pending = _Affine()
    if config.lighting or pending != _Affine():
        _apply_affine(image, pending, draw_lighting(config, draws))


def _apply_affine(image: Image, affine: _Affine, light: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
    """Apply to all pixels, rounded and clipped."""
    scale, graying, shift = affine
    red, green, blue = (graying * weight for weight in GRAY_WEIGHTS)
    matrix = (
        (red + scale, green, blue, shift + light[0]),
        (red, green + scale, blue, shift + light[1]),
        (red, green, blue + scale, shift + light[2]),
    )
    cv2.transform(image, np.array(matrix), dst=image)
