"""Transforms of whole batches with soft labels: mixup, CutMix and one's own.

Each sample is mixed with a partner of the same lane of the global batch, which is on the same worker however many there
are, and random numbers depend on (seed, epoch, step) alone: any number of workers mixes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.config.plugins import register
from orchestrator.data import rng
from orchestrator.data.data_errors import DataError
from orchestrator.data.sampler import Int64Array

Images = NDArray[np.uint8]  # N x S x S x 3
Targets = NDArray[np.float32]  # N x classes, rows that sum to 1
# (images, targets, row of each sample's partner, generator that draws the same on every worker) -> images, targets
BatchTransform = Callable[[Images, Targets, Int64Array, np.random.Generator], tuple[Images, Targets]]


class BatchMixer:
    """Applies batch transforms to the parts of the global batches of an epoch."""

    def __init__(self, stages: Sequence[tuple[str, BatchTransform]], seed: int, epoch: int, classes: int) -> None:
        self._stages, self._seed, self._epoch, self._classes = stages, seed, epoch, classes

    def mix(
        self, images: Images, labels: NDArray[np.int64], is_good: NDArray[np.bool_], lanes: Int64Array, step: int
    ) -> Targets:
        """Mix images in place and return their soft labels. Raises DataError when a transform fails.

        lanes: the lane of each of the N samples. Samples that are not good neither mix nor are mixed in.
        """
        targets = np.eye(self._classes, dtype=np.float32)[labels]
        for number, (name, transform) in enumerate(self._stages):
            key = rng.derive_key(self._seed, "batch-stage", self._epoch, step, number)
            partners = find_partners(lanes, is_good, key)
            try:
                mixed, targets = transform(images.copy(), targets, partners, np.random.default_rng(key))
                images[:] = mixed
                targets = np.asarray(targets, dtype=np.float32).reshape(len(labels), self._classes)
            except Exception as error:  # the user's own code may raise anything
                raise DataError(
                    f"augmentation.batch_stages: {name!r} failed in step {step} of epoch {self._epoch}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return targets


def find_partners(lanes: Int64Array, is_good: NDArray[np.bool_], key: int) -> Int64Array:
    """Return the row of each sample's partner: another one of its lane, itself if it has none or one is broken."""
    partners = np.arange(len(lanes), dtype=np.int64)
    for lane in np.unique(lanes).tolist():
        rows = np.flatnonzero(lanes == lane)
        if len(rows) > 1:
            partners[rows] = np.roll(rows, 1 + key % (len(rows) - 1))
    return np.where(is_good & is_good[partners], partners, np.arange(len(lanes)))


class _Mixing:
    """Base of transforms that mix with a share drawn from Beta(alpha, alpha)."""

    def __init__(self, alpha: float, probability: float) -> None:
        if not alpha > 0 or not 0 <= probability <= 1:
            raise ValueError(f"alpha must be > 0 and probability in 0 .. 1, got {alpha} and {probability}")
        self._alpha, self._probability = alpha, probability

    def _draw_share(self, generator: np.random.Generator) -> float:
        """Return the share of a sample's own image; 1 when the batch is not mixed."""
        is_mixed, share = generator.random() < self._probability, generator.beta(self._alpha, self._alpha)
        return float(share) if is_mixed else 1.0

    def _blend_targets(self, targets: Targets, partners: Int64Array, share: float) -> Targets:
        return np.asarray(share * targets + (1 - share) * targets[partners], dtype=np.float32)


@register("transform", "mixup")
class Mixup(_Mixing):
    """Weighted mean of each image and its partner's (arXiv 1710.09412)."""

    def __init__(self, alpha: float = 0.2, probability: float = 1.0) -> None:
        super().__init__(alpha, probability)

    def __call__(
        self, images: Images, targets: Targets, partners: Int64Array, generator: np.random.Generator
    ) -> tuple[Images, Targets]:
        """Mix images and targets."""
        share = self._draw_share(generator)
        if share == 1:
            return images, targets
        mixed = np.empty_like(images)
        for row, partner in enumerate(partners.tolist()):
            cv2.addWeighted(images[row], share, images[partner], 1 - share, 0, dst=mixed[row])
        return mixed, self._blend_targets(targets, partners, share)


@register("transform", "cutmix")
class CutMix(_Mixing):
    """A box of each image replaced by the partner's (arXiv 1905.04899)."""

    def __init__(self, alpha: float = 1.0, probability: float = 1.0) -> None:
        super().__init__(alpha, probability)

    def __call__(
        self, images: Images, targets: Targets, partners: Int64Array, generator: np.random.Generator
    ) -> tuple[Images, Targets]:
        """Mix images and targets."""
        share, sides = self._draw_share(generator), images.shape[1:3]
        centre = [generator.integers(side) for side in sides]
        half = [round(side * math.sqrt(1 - share)) // 2 for side in sides]
        rows, columns = (
            slice(max(0, at - reach), min(side, at + reach))
            for at, reach, side in zip(centre, half, sides, strict=True)
        )
        mixed = images.copy()
        mixed[:, rows, columns] = images[partners][:, rows, columns]
        cut = (rows.stop - rows.start) * (columns.stop - columns.start) / (sides[0] * sides[1])
        return mixed, self._blend_targets(targets, partners, 1 - cut)
