"""Views that differ, and the rows made of what networks say of them, against all 144 crops."""

import numpy as np
import pytest
import torch

from orchestrator.data.transforms import multi_crop
from orchestrator.evaluation import inference, shard_scorer
from tests.support.tiny_shards import picture


def all_crops(number: int, width: int, height: int, size: int) -> torch.Tensor:
    """144 x 3 x size x size."""
    out = np.empty((72, size, size, 3), dtype=np.uint8)
    multi_crop.cut_crops(picture(number, width, height), size, range(multi_crop.NUM_UNMIRRORED), out)
    return torch.from_numpy(np.concatenate((out, out[:, :, ::-1]))).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("width", "height", "size", "differ"),
    # Three equal squares in a square; four scales of six views. Photos have 72, but for squares that touch.
    [
        (48, 48, 32, 24),
        (500, 500, 224, 24),
        (500, 375, 224, 72),
        (375, 500, 224, 72),
        (40, 28, 16, 70),
        (9, 300, 16, 72),
    ],
)
def test_views_are_the_crops_without_repetition(width: int, height: int, size: int, differ: int) -> None:
    found = inference.build_views(picture(2, width, height), size)
    assert found.pixels.shape == (differ, 3, size, size)
    assert found.pixels.dtype == torch.uint8
    assert found.pixels.is_contiguous(memory_format=torch.channels_last)
    both = torch.cat((found.pixels, found.pixels.flip(3)))
    assert torch.equal(both[found.view_indices], all_crops(2, width, height, size))


@pytest.mark.parametrize(("width", "height"), [(48, 48), (60, 40), (40, 28)])
def test_rows_are_means_over_the_crops_and_their_maximum(width: int, height: int) -> None:
    found = inference.build_views(picture(1, width, height), 16)
    said = torch.rand(2 * len(found.pixels), 5)
    each = said[found.view_indices]  # of the 144 crops, in the order of crops.cut and then mirrored
    scales = each.reshape(2, 4, 18, 5)
    centre = each.reshape(2, 4, 3, 6, 5)[:, 0, 1]
    wanted = [
        centre[0, 4],
        centre[:, :5].mean(dim=(0, 1)),
        each.mean(dim=0),
        *scales.mean(dim=(0, 2)),
        each.amax(dim=0),
    ]
    rows = shard_scorer.reduce_crops(said, found.view_indices)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.stack(wanted), rtol=1e-6, atol=1e-7)
