"""The 144 crops of an image as the views that a network has to see, and from its answers the rows that are stored.

Squares of an image that is square itself (as all digits are) are the same three times over: such views go through the
networks once and count three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data import crops
from orchestrator.data.crops import Box
from orchestrator.data.decode import Image


@dataclass(frozen=True)
class Views:
    """Those of an image's 72 unmirrored crops that differ: D of them."""

    pixels: Tensor  # D x 3 x S x S uint8 in channels_last memory
    row_of: Tensor  # 144 int64: each crop's row among the D views and, from D on, their mirror images

    def pinned(self) -> Views:
        """The same in memory from which a GPU takes it while it is busy."""
        return Views(self.pixels.pin_memory(), self.row_of)


def cut(image: Image, size: int) -> Views:
    """The views of an image (H x W x 3 uint8) for networks of size x size input."""
    pixels = np.empty((crops.UNMIRRORED, size, size, 3), dtype=np.uint8)
    crops.cut(image, size, pixels)
    kept, row_of = _distinct(image.shape[1], image.shape[0], size)
    if len(kept) < len(pixels):
        pixels = pixels[kept]
    return Views(torch.from_numpy(pixels).permute(0, 3, 1, 2), row_of)


@lru_cache(maxsize=4096)
def _distinct(width: int, height: int, size: int) -> tuple[NDArray[np.int64], Tensor]:
    """Numbers of the unmirrored crops that no earlier one equals, and `Views.row_of`."""
    first: dict[tuple[int, Box], int] = {}
    rows: list[int] = []
    kept: list[int] = []
    for shorter in crops.scale_sides(size):
        for box in crops.boxes(*crops.resized(width, height, shorter), size):
            if (shorter, box) not in first:
                first[shorter, box] = len(kept)
                kept.append(len(rows))
            rows.append(first[shorter, box])
    row_of = [*rows, *(len(kept) + row for row in rows)]
    return np.array(kept, dtype=np.int64), torch.tensor(row_of)


def _means() -> Tensor:
    """7 x 144: what each crop counts in each of the means, in the order of the stored rows."""
    scale_of = torch.arange(crops.NUM_CROPS) % crops.UNMIRRORED // crops.PER_SCALE
    rows = [torch.zeros(crops.NUM_CROPS).index_fill(0, torch.tensor(chosen), 1) for chosen in crops.SUBSETS.values()]
    rows += [(scale_of == scale).float() for scale in range(len(crops.PAPER_SCALES))]
    return torch.stack([row / row.sum() for row in rows])


_MEANS = _means()


def reduced(probabilities: Tensor, row_of: Tensor) -> Tensor:
    """8 x C float32: means over 1, 10 and 144 crops and over each of the four scales, and the maximum over the 144.

    probabilities: 2D x C float32, those of an image's views and then of their mirror images.
    """
    device = probabilities.device
    counts = torch.zeros(len(_MEANS), len(probabilities)).index_add_(1, row_of, _MEANS)
    return torch.cat((counts.to(device) @ probabilities, probabilities.amax(dim=0, keepdim=True)))
