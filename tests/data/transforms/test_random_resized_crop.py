"""Training crops of section 6: area, aspect, interpolation and mirror."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import rng
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.transforms.random_resized_crop import (
    CROP_ATTEMPTS,
    DRAWS,
    INTERPOLATIONS,
    Draws,
    crop_image,
    draw_crop_box,
)
from tests.support.tiny_shards import picture

PAPER = AugmentationConfig()
sides = st.integers(1, 3000)


def draws_of(number: int) -> Draws:
    return np.asarray(rng.uniform(rng.derive_key(0, "test"), np.array([number]), DRAWS)[0])


@given(sides, sides, st.integers(0, 10**9), st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_boxes_lie_inside_with_the_wanted_aspect(
    width: int, height: int, number: int, area: tuple[float, float]
) -> None:
    config = AugmentationConfig(area=(min(area), max(area)))
    x, y, w, h = draw_crop_box(width, height, config, draws_of(number))
    assert 0 <= x < x + w <= width
    assert 0 <= y < y + h <= height
    # Sides are whole numbers: half a pixel on each is the tolerance.
    assert (w + 0.5) / max(h - 0.5, 0.5) >= 3 / 4 - 1e-9
    assert (w - 0.5) / (h + 0.5) <= 4 / 3 + 1e-9


@given(st.integers(40, 2000), st.floats(0.5, 2), st.integers(0, 10**9))
def test_areas_are_in_range_where_such_a_crop_fits(width: int, aspect: float, number: int) -> None:
    height = max(1, round(width / aspect))
    _, _, w, h = draw_crop_box(width, height, PAPER, draws_of(number))
    assert (w + 0.5) * (h + 0.5) >= 0.08 * width * height
    assert (w - 0.5) * (h - 0.5) <= width * height


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (2, 900)])
def test_where_no_wanted_crop_fits_it_is_the_largest_centred_one(width: int, height: int) -> None:
    x, y, w, h = draw_crop_box(width, height, AugmentationConfig(area=(0.9, 1.0)), draws_of(0))
    assert min(w, h) == min(width, height)
    assert (x, y) == ((width - w) // 2, (height - h) // 2)


def test_areas_and_aspects_are_spread_as_the_paper_says() -> None:
    # At most half of a square image with an aspect up to 4/3 always fits at the first try.
    config = AugmentationConfig(area=(0.08, 0.5))
    boxes = np.array([draw_crop_box(1000, 1000, config, draws_of(n)) for n in range(4000)])
    share = boxes[:, 2] * boxes[:, 3] / 1e6
    assert np.histogram(share, bins=6, range=(0.08, 0.5))[0] == pytest.approx(4000 / 6, rel=0.15)
    logs = np.log(boxes[:, 2] / boxes[:, 3])
    assert np.histogram(logs, bins=6, range=(-np.log(4 / 3), np.log(4 / 3)))[0] == pytest.approx(4000 / 6, rel=0.15)
    for axis in (0, 1):
        place = boxes[:, axis] / (1000 - boxes[:, 2 + axis])
        assert np.histogram(place, bins=4, range=(0, 1))[0] == pytest.approx(1000, rel=0.15)


def test_a_try_that_does_not_fit_is_followed_by_the_next_draws() -> None:
    draws = np.zeros(DRAWS)
    draws[0:4] = (0.999, 0.999, 0.5, 0.5)  # nearly the whole image at 4:3 does not fit a square
    draws[4:8] = (0.1, 0.5, 0.0, np.nextafter(1, 0))
    wanted = np.zeros(DRAWS)
    wanted[0:4] = draws[4:8]
    x, y, w, h = draw_crop_box(100, 100, PAPER, draws)
    assert (x, y, w, h) == draw_crop_box(100, 100, PAPER, wanted)
    assert (x, y + h) == (0, 100), "the lowest draw gives the first place, the highest the last"
    assert DRAWS == 4 * CROP_ATTEMPTS + 2


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("method", list(INTERPOLATIONS))
def test_crop_then_resize_then_mirror(method: str, mirrored: bool) -> None:
    image, draws = picture(3, 90, 70), draws_of(5)
    draws[-2] = (PAPER.interpolations.index(method) + 0.5) / 4
    draws[-1] = 0.4999 if mirrored else 0.5
    out = np.zeros((32, 32, 3), dtype=np.uint8)
    crop_image(image, PAPER, draws, out)
    x, y, w, h = draw_crop_box(90, 70, PAPER, draws)
    wanted = cv2.resize(image[y : y + h, x : x + w].copy(), (32, 32), interpolation=INTERPOLATIONS[method])
    assert np.array_equal(out, wanted[:, ::-1] if mirrored else wanted)
    others = [cv2.resize(image[y : y + h, x : x + w], (32, 32), interpolation=m) for m in INTERPOLATIONS.values()]
    assert sum(np.array_equal(other, wanted) for other in others) == 1, "the methods differ"


def test_the_last_draw_below_one_picks_the_last_method_and_no_mirror_means_none() -> None:
    image, draws = picture(3, 90, 70), draws_of(5)
    out, plain = (np.zeros((8, 8, 3), dtype=np.uint8) for _ in range(2))
    draws[-2:] = (np.nextafter(1, 0), 0.0)
    crop_image(image, PAPER, draws, out)
    crop_image(image, AugmentationConfig(mirror=False, interpolations=("cubic",)), draws, plain)
    assert np.array_equal(out, plain[:, ::-1])


def test_the_same_draws_give_the_same_pixels_and_others_others() -> None:
    image = picture(3, 90, 70)
    outs = [np.zeros((16, 16, 3), dtype=np.uint8) for _ in range(3)]
    for out, number in zip(outs, (1, 1, 2), strict=True):
        crop_image(image, PAPER, draws_of(number), out)
    assert np.array_equal(outs[0], outs[1])
    assert not np.array_equal(outs[0], outs[2])
