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

from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import Image
from orchestrator.data.transforms.multi_crop import SquareCrop


@dataclass(frozen=True)
class CropViews:
    """Those of an image's 72 unmirrored crops that differ: D of them."""

    pixels: Tensor  # D x 3 x S x S uint8 in channels_last memory
    view_indices: Tensor  # 144 int64: each crop's row among the D views and, from D on, their mirror images

    def pin_memory(self) -> CropViews:
        """The same in memory from which a GPU takes it while it is busy."""
        return CropViews(self.pixels.pin_memory(), self.view_indices)


def build_views(image: Image, size: int) -> CropViews:
    """The views of an image (H x W x 3 uint8) for networks of size x size input."""
    pixels = np.empty((multi_crop.NUM_UNMIRRORED, size, size, 3), dtype=np.uint8)
    multi_crop.cut_crops(image, size, pixels)
    kept, row_of = _find_distinct_crops(image.shape[1], image.shape[0], size)
    if len(kept) < len(pixels):
        pixels = pixels[kept]
    return CropViews(torch.from_numpy(pixels).permute(0, 3, 1, 2), row_of)


@lru_cache(maxsize=4096)
def _find_distinct_crops(width: int, height: int, size: int) -> tuple[NDArray[np.int64], Tensor]:
    """Numbers of the unmirrored crops that no earlier one equals, and `Views.row_of`."""
    first: dict[tuple[int, SquareCrop], int] = {}
    rows: list[int] = []
    kept: list[int] = []
    for shorter in multi_crop.compute_scale_sides(size):
        for box in multi_crop.compute_boxes(*multi_crop.compute_resized_size(width, height, shorter), size):
            if (shorter, box) not in first:
                first[shorter, box] = len(kept)
                kept.append(len(rows))
            rows.append(first[shorter, box])
    row_of = [*rows, *(len(kept) + row for row in rows)]
    return np.array(kept, dtype=np.int64), torch.tensor(row_of)


def _build_mean_weights() -> Tensor:
    """7 x 144: what each crop counts in each of the means, in the order of the stored rows."""
    scale_of = torch.arange(multi_crop.NUM_CROPS) % multi_crop.NUM_UNMIRRORED // multi_crop.CROPS_PER_SCALE
    rows = [
        torch.zeros(multi_crop.NUM_CROPS).index_fill(0, torch.tensor(chosen), 1)
        for chosen in multi_crop.CROP_SUBSETS.values()
    ]
    rows += [(scale_of == scale).float() for scale in range(len(multi_crop.PAPER_SCALES))]
    return torch.stack([row / row.sum() for row in rows])


_MEAN_WEIGHTS = _build_mean_weights()


def reduce_crops(probabilities: Tensor, row_of: Tensor) -> Tensor:
    """8 x C float32: means over 1, 10 and 144 crops and over each of the four scales, and the maximum over the 144.

    probabilities: 2D x C float32, those of an image's views and then of their mirror images.
    """
    device = probabilities.device
    counts = torch.zeros(len(_MEAN_WEIGHTS), len(probabilities)).index_add_(1, row_of, _MEAN_WEIGHTS)
    return torch.cat((counts.to(device) @ probabilities, probabilities.amax(dim=0, keepdim=True)))
