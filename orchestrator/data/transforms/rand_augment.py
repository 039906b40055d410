"""RandAugment (arXiv 1909.13719): a few operations, chosen at random from 14, at one magnitude."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

# (image, strength in 0 .. 1, sign) -> image, with the ranges that torchvision has.
Operation = Callable[[Image.Image, float, int], Image.Image]


def require_rgb(image: object) -> NDArray[np.uint8]:
    """Return an H x W x 3 uint8 RGB image. Raises TypeError for anything else."""
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise TypeError("it needs an H x W x 3 uint8 RGB array, as it is after 'decode'")
    return image


def _shift(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, sign: image,
    "shear_x": lambda image, strength, sign: _shift(image, (1, sign * 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": lambda image, strength, sign: _shift(image, (1, 0, 0, sign * 0.3 * strength, 1, 0)),
    "translate_x": lambda image, strength, sign: _shift(image, (1, 0, sign * 0.45 * strength * image.width, 0, 1, 0)),
    "translate_y": lambda image, strength, sign: _shift(image, (1, 0, 0, 0, 1, sign * 0.45 * strength * image.height)),
    "rotate": lambda image, strength, sign: image.rotate(sign * 30 * strength),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, round(255 * (1 - strength))),
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
}


class RandAugment:
    """Applies `num_ops` operations of OPERATIONS at `magnitude` of `num_magnitudes`."""

    def __init__(
        self, num_ops: int = 2, magnitude: int = 9, num_magnitudes: int = 31, operations: list[str] | None = None
    ) -> None:
        self._operations = [*OPERATIONS] if operations is None else operations
        if unknown := [name for name in self._operations if name not in OPERATIONS]:
            raise ValueError(f"operations must be of {', '.join(OPERATIONS)}, got {unknown[0]!r}")
        if num_ops < 1 or not self._operations or not 0 <= magnitude < num_magnitudes or num_magnitudes < 2:
            raise ValueError(
                f"num_ops must be >= 1 and magnitude in 0 .. num_magnitudes - 1, got {num_ops}, {magnitude} of "
                f"{num_magnitudes}"
            )
        self._num_ops, self._strength = num_ops, magnitude / (num_magnitudes - 1)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Distort the image, H x W x 3 uint8."""
        generator = np.random.default_rng(sample["__seed__"])
        image = Image.fromarray(require_rgb(sample["image"]))
        for _ in range(self._num_ops):
            name = self._operations[generator.integers(len(self._operations))]
            sign = 1 if generator.random() < 0.5 else -1
            image = OPERATIONS[name](image, self._strength, sign)
        return sample | {"image": np.array(image, dtype=np.uint8)}
