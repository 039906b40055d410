"""Test crops of an image as the distinct views that a network has to see, and the rows that are stored of its answers.

Squares of an image that is square itself (as all digits are) are equal: such views go through the networks once and
count three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import Image


@dataclass(frozen=True)
class CropViews:
    """The D distinct ones of an image's unmirrored crops."""

    pixels: Tensor  # D x 3 x S x S uint8 in channels_last memory
    view_indices: Tensor  # int64: each crop's row among the D views and, from D on, their mirror images

    def pin_memory(self) -> CropViews:
        """Return the same in pinned memory, from which a GPU copies asynchronously."""
        return CropViews(self.pixels.pin_memory(), self.view_indices)


def build_views(image: Image, size: int, count: int = multi_crop.NUM_CROPS) -> CropViews:
    """Cut the views of an image (H x W x 3 uint8) for networks of size x size input.

    count: of crops, 1, 10 or 144. A single crop has no mirror image.
    """
    crops, view_indices = _find_distinct_crops(image.shape[1], image.shape[0], size, count)
    pixels = np.empty((len(crops), size, size, 3), dtype=np.uint8)
    multi_crop.cut_crops(image, size, crops, pixels)
    return CropViews(torch.from_numpy(pixels).permute(0, 3, 1, 2), view_indices)


@lru_cache(maxsize=4096)
def _find_distinct_crops(width: int, height: int, size: int, count: int) -> tuple[tuple[int, ...], Tensor]:
    """Return the numbers of the unmirrored crops that equal no earlier one, and `CropViews.view_indices`."""
    boxes = [
        (side, box)
        for side in multi_crop.compute_scale_sides(size)
        for box in multi_crop.compute_boxes(*multi_crop.compute_resized_size(width, height, side), size)
    ]
    subset = multi_crop.CROP_SUBSETS[count]
    first = {boxes[crop]: crop for crop in reversed(subset) if crop < len(boxes)}
    crops = sorted(first.values())
    rows = {boxes[crop]: row for row, crop in enumerate(crops)}
    mirrored = [crop >= len(boxes) for crop in subset]
    indices = [rows[boxes[crop % len(boxes)]] + len(crops) * flip for crop, flip in zip(subset, mirrored, strict=True)]
    return tuple(crops), torch.tensor(indices)


def _build_mean_weights() -> Tensor:
    """Return 7 x 144 weights of the crops in the means, in the order of the stored rows."""
    scale_of = torch.arange(multi_crop.NUM_CROPS) % multi_crop.NUM_UNMIRRORED // multi_crop.CROPS_PER_SCALE
    rows = [
        torch.zeros(multi_crop.NUM_CROPS).index_fill(0, torch.tensor(chosen), 1)
        for chosen in multi_crop.CROP_SUBSETS.values()
    ]
    rows += [(scale_of == scale).float() for scale in range(len(multi_crop.PAPER_SCALES))]
    return torch.stack([row / row.sum() for row in rows])


_MEAN_WEIGHTS = _build_mean_weights()


def reduce_crops(probabilities: Tensor, view_indices: Tensor) -> Tensor:
    """Return 8 x C float32: means over 1, 10 and 144 crops and over each of the four scales, and the maximum of all.

    probabilities: 2D x C float32 of an image's views, then of their mirror images.
    """
    device = probabilities.device
    counts = torch.zeros(len(_MEAN_WEIGHTS), len(probabilities)).index_add_(1, view_indices, _MEAN_WEIGHTS)
    return torch.cat((counts.to(device) @ probabilities, probabilities.amax(dim=0, keepdim=True)))
