"""The peer: the best straightforward webdataset pipeline over the same shards.

webdataset reads the tars and shuffles, simplejpeg decodes, cv2 crops, resizes and mirrors, a torch DataLoader brings
uint8 batches to this process: what one writes after reading webdataset's documentation, with the fastest decoder.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from benchmarks import photos
from orchestrator.data import manifest

SIZE = 224
SHUFFLE = 1000  # webdataset's usual buffer


@dataclass(frozen=True)
class Setting:
    """Processes of the DataLoader (0: this one), and who makes the batches of samples."""

    workers: int
    by_webdataset: bool

    def __str__(self) -> str:
        return f"{self.workers}_workers_batched_by_{'webdataset' if self.by_webdataset else 'torch'}"


SETTINGS = tuple(Setting(workers, by) for workers in (0, 1, 2) for by in (False, True))


def loader(url: str, batch_size: int, setting: Setting) -> Any:
    """A DataLoader of (N x 224 x 224 x 3 uint8, N int64) over the photos at `url`; its processes stay."""
    packed = manifest.load(url)
    tars = [packed.tar_url(url, shard) for shard in packed.shards(photos.SPLIT)]
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), workersplitter=webdataset.split_by_worker)
        .shuffle(SHUFFLE)
        .to_tuple("jpg", "cls")
        .map_tuple(crop, int)
    )
    processes: dict[str, Any] = {"num_workers": setting.workers}
    if setting.workers:
        # Spawned ones would only take longer to start; they live through all passes, so none pays for their start.
        processes |= {"persistent_workers": True, "multiprocessing_context": "fork"}
    if setting.by_webdataset:
        batches = samples.batched(batch_size, collation_fn=default_collate)
        return DataLoader(batches, batch_size=None, **processes)
    return DataLoader(samples, batch_size=batch_size, **processes)


def crop(data: bytes) -> Tensor:
    """224 x 224 x 3 uint8: decoded whole, a crop of 8 to 100 % of the area resized, mirrored every other time."""
    image = simplejpeg.decode_jpeg(data)
    height, width = image.shape[:2]
    x, y, w, h = _box(width, height)
    cut = cv2.resize(image[y : y + h, x : x + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(cv2.flip(cut, 1) if random.random() < 0.5 else cut)


def _box(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def delivered(batches: Iterator[Any]) -> int:
    """Samples of all batches, whose pixels must have arrived."""
    count = 0
    for images, labels in batches:
        assert images.dtype is torch.uint8 and images.shape[1:] == (SIZE, SIZE, 3), images.shape
        assert np.asarray(images[-1]).any() and len(labels) == len(images)
        count += len(images)
    return count
