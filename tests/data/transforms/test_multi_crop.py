"""The 144 crops of section 7 against literals, and their subsets against crops cut independently."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import Image
from orchestrator.data.transforms.multi_crop import Box, compute_boxes, compute_resized_size, compute_scale_sides
from tests.support.tiny_shards import picture


def views(left: int, top: int, side: int, size: int = 224) -> list[Box]:
    """Four corners, centre and whole of a square, spelled out."""
    far, mid = side - size, (side - size) // 2
    return [
        (left, top, size),
        (left + far, top, size),
        (left, top + far, size),
        (left + far, top + far, size),
        (left + mid, top + mid, size),
        (left, top, side),
    ]


# Resized width x height, then the corners of the three squares: at the paper's four scales.
GEOMETRY = {
    (500, 375): [
        ((341, 256), [(0, 0), (42, 0), (85, 0)]),
        ((384, 288), [(0, 0), (48, 0), (96, 0)]),
        ((427, 320), [(0, 0), (53, 0), (107, 0)]),
        ((469, 352), [(0, 0), (58, 0), (117, 0)]),
    ],
    (375, 500): [
        ((256, 341), [(0, 0), (0, 42), (0, 85)]),
        ((288, 384), [(0, 0), (0, 48), (0, 96)]),
        ((320, 427), [(0, 0), (0, 53), (0, 107)]),
        ((352, 469), [(0, 0), (0, 58), (0, 117)]),
    ],
    (100, 100): [((side, side), [(0, 0)] * 3) for side in (256, 288, 320, 352)],
}


def test_counts_of_the_paper() -> None:
    assert multi_crop.NUM_CROPS == 4 * 3 * 6 * 2 == 144
    assert {count: len(set(subset)) for count, subset in multi_crop.CROP_SUBSETS.items()} == {1: 1, 10: 10, 144: 144}
    assert set(multi_crop.ONE_CROP) < set(multi_crop.TEN_CROPS) < set(multi_crop.ALL_CROPS)


@pytest.mark.parametrize("image", list(GEOMETRY))
def test_geometry_at_224(image: tuple[int, int]) -> None:
    assert compute_scale_sides(224) == (256, 288, 320, 352)
    for shorter, (size, corners) in zip(compute_scale_sides(224), GEOMETRY[image], strict=True):
        assert compute_resized_size(*image, shorter) == size
        assert compute_boxes(*size, 224) == [box for corner in corners for box in views(*corner, shorter)]


def test_the_first_views_as_plain_numbers() -> None:
    assert compute_boxes(341, 256, 224)[6:12] == [
        (42, 0, 224),
        (74, 0, 224),
        (42, 32, 224),
        (74, 32, 224),
        (58, 16, 224),
        (42, 0, 256),
    ]


def test_geometry_scaled_to_32() -> None:
    assert compute_scale_sides(32) == (37, 41, 46, 50)
    assert compute_resized_size(48, 48, 37) == (37, 37)
    assert compute_resized_size(60, 40, 50) == (75, 50)
    assert compute_boxes(75, 50, 32) == [box for left in (0, 12, 25) for box in views(left, 0, 50, 32)]


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(8, 512))
def test_boxes_lie_inside_whatever_the_image(width: int, height: int, size: int) -> None:
    for shorter in compute_scale_sides(size):
        w, h = compute_resized_size(width, height, shorter)
        assert min(w, h) == shorter >= size
        assert (w >= h) == (width >= height) or w == h
        found = compute_boxes(w, h, size)
        assert len(found) == 18
        assert all(0 <= x <= w - side and 0 <= y <= h - side for x, y, side in found)
        assert [side for _, _, side in found] == [size, size, size, size, size, shorter] * 3
        assert max(x + side for x, _, side in found) == w, "the last square reaches the edge"
        assert max(y + side for _, y, side in found) == h


def square_at(image: Image, shorter: int, which: int) -> Image:
    """The image with its shorter side resized, then its left, centre or right square: written anew."""
    height, width = image.shape[:2]
    ratio = shorter / min(height, width)
    size = (shorter if width <= height else round(width * ratio), shorter if height <= width else round(height * ratio))
    method = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
    large = cv2.resize(image, size, interpolation=method)
    room = max(size) - shorter
    start = (0, room // 2, room)[which]
    cut = large[:, start : start + shorter] if width >= height else large[start : start + shorter]
    return np.asarray(cut, dtype=np.uint8)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (60, 90), (128, 128), (37, 300)])
@pytest.mark.parametrize("size", [32, 224])
def test_crops_equal_independently_cut_ones(width: int, height: int, size: int) -> None:
    image = picture(2, width, height)
    out = np.empty((72, size, size, 3), dtype=np.uint8)
    multi_crop.cut_crops(image, size, range(multi_crop.NUM_UNMIRRORED), out)
    both = np.concatenate((out, out[:, :, ::-1]))
    shorter = compute_scale_sides(size)[0]
    square = square_at(image, shorter, 1)
    far, mid = shorter - size, (shorter - size) // 2
    corners = [(0, 0), (0, far), (far, 0), (far, far), (mid, mid)]
    ten = [square[y : y + size, x : x + size] for y, x in corners]
    assert np.array_equal(both[list(multi_crop.TEN_CROPS)], np.stack([*ten, *(view[:, ::-1] for view in ten)]))
    assert np.array_equal(both[list(multi_crop.ONE_CROP)], ten[4][None])
    one = np.empty((size, size, 3), dtype=np.uint8)
    multi_crop.cut_crops(image, size, multi_crop.ONE_CROP, one[None])
    assert np.array_equal(one, ten[4])
    # And one far from these: the last scale's last square, whole.
    last = square_at(image, compute_scale_sides(size)[3], 2)
    assert np.array_equal(out[71], cv2.resize(last, (size, size), interpolation=cv2.INTER_AREA))


def test_shrinking_averages_areas() -> None:
    checker = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = multi_crop.resize_image(np.ascontiguousarray(np.repeat(checker[:, :, None], 3, axis=2)), (16, 16))
    assert np.abs(small.astype(int) - 127).max() <= 1, "no aliasing"
