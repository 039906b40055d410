"""Training images as several epochs will show them: by the loader's own stages and draws, without running an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.data import crops, decode, stages
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.decode import Image
from orchestrator.data.errors import BadSampleError
from orchestrator.data.reader import SampleReader

ORIGINAL_SIDE = 512  # longer side to which an untouched image is reduced: a photo may have 100 million pixels


@dataclass(frozen=True)
class Shown:
    """A sample, untouched (H x W x 3 uint8) and as each epoch shows it (S x S x 3 uint8; black: left out there)."""

    key: str
    label: int
    original: Image
    epochs: tuple[Image, ...]


def shown(
    reader: SampleReader, counts: Sequence[int], config: AugmentationConfig, seed: int, size: int, samples: int,
    epochs: int,
) -> list[Shown]:  # fmt: skip
    """`samples` images evenly spread over a split, as epochs 0 .. `epochs` - 1 show them; undecodable ones left out.

    counts: samples of each shard. size: S. Raises DataError and StorageError as the loader does.
    """
    fills = [stages.filler(config, seed, epoch, reader.classes) for epoch in range(epochs)]
    found = []
    for id in spread(sum(counts), samples):
        shard, number = _place(counts, id)
        ids = np.array([id], dtype=np.int64)
        sample = reader.read(shard, number)
        try:
            original = _reduced(decode.decode(sample.image))
        except BadSampleError:
            continue
        images = []
        for epoch, fill in enumerate(fills):
            image = np.zeros((size, size, 3), dtype=np.uint8)
            try:
                fill(sample, id, stages.draws(seed, epoch, ids)[0], image)
            except BadSampleError:
                image[:] = 0
            images.append(image)
        found.append(Shown(sample.key, sample.label, original, tuple(images)))
    return found


def spread(total: int, samples: int) -> list[int]:
    """The ids in the middle of `samples` equal parts of 0 .. total - 1; all of them when there are fewer."""
    parts = min(total, samples)
    return [total * (2 * part + 1) // (2 * parts) for part in range(parts)]


def _place(counts: Sequence[int], id: int) -> tuple[int, int]:
    """Shard, and number in it, of a sample."""
    ends = np.cumsum(counts)
    shard = int(np.searchsorted(ends, id, side="right"))
    return shard, id - int(ends[shard] - counts[shard])


def _reduced(image: Image) -> Image:
    height, width = image.shape[:2]
    longer = max(height, width)
    if longer <= ORIGINAL_SIDE:
        return image.copy()
    share = ORIGINAL_SIDE / longer
    return crops.resize(image, (max(1, round(width * share)), max(1, round(height * share))))
