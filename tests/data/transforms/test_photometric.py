"""Photometric distortions against each step in turn on floats, and against PIL."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageEnhance
from pydantic import ValidationError

from orchestrator.data import rng
from orchestrator.data.config import NO_PHOTOMETRIC, PhotometricConfig
from orchestrator.data.transforms import photometric
from orchestrator.data.transforms.photometric import (
    BRIGHTNESS,
    CONTRAST,
    DRAWS,
    FACTOR_ORDERS,
    SATURATION,
    distort_image,
    draw_factors,
    draw_lighting,
)
from tests.support.tiny_shards import picture

HOWARD = PhotometricConfig()
UNLIT = PhotometricConfig(lighting=0.0)
ENHANCERS = {BRIGHTNESS: ImageEnhance.Brightness, CONTRAST: ImageEnhance.Contrast, SATURATION: ImageEnhance.Color}
NAMES = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation"}

Pixels = NDArray[np.uint8]


def rows(count: int, seed: int = 0) -> NDArray[np.float64]:
    return np.asarray(rng.uniform(rng.derive_key(seed, "test"), np.arange(count), DRAWS))


def distorted(image: Pixels, config: PhotometricConfig, draws: NDArray[np.float64]) -> Pixels:
    out = image.copy()
    distort_image(out, config, draws)
    return out


def step_by_step(image: Pixels, config: PhotometricConfig, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """The definition: each step on floats, clipped after each."""
    pixels = image.astype(np.float64)
    for kind, factor in draw_factors(config, draws):
        grey = (pixels @ np.array(photometric.GRAY_WEIGHTS))[..., None]
        towards = {BRIGHTNESS: np.zeros_like(grey), CONTRAST: np.full_like(grey, grey.mean()), SATURATION: grey}[kind]
        pixels = np.clip(towards + factor * (pixels - towards), 0, 255)
    return np.asarray(np.clip(pixels + np.array(draw_lighting(config, draws)), 0, 255))


def one_only(kind: int, amount: float) -> PhotometricConfig:
    return PhotometricConfig.from_dict({**NO_PHOTOMETRIC.to_dict(), NAMES[kind]: amount})


# ------------------------------------------------------------------ the draws
def test_factors_are_uniform_in_their_ranges() -> None:
    config = PhotometricConfig(brightness=0.5, contrast=0.25, saturation=1.0)
    found = [dict(draw_factors(config, row)) for row in rows(6000)]
    for kind, amount in ((BRIGHTNESS, 0.5), (CONTRAST, 0.25), (SATURATION, 1.0)):
        values = [each[kind] for each in found]
        counts = np.histogram(values, bins=6, range=(1 - amount, 1 + amount))[0]
        assert counts.sum() == 6000
        assert counts == pytest.approx(1000, rel=0.15)


def test_all_six_orders_come_equally_often() -> None:
    found = [tuple(kind for kind, _ in draw_factors(HOWARD, row)) for row in rows(6000)]
    assert set(found) == set(FACTOR_ORDERS)
    assert len(FACTOR_ORDERS) == 6
    assert [found.count(order) for order in FACTOR_ORDERS] == pytest.approx([1000] * 6, rel=0.15)


def test_lighting_has_the_covariance_of_krizhevskys_components() -> None:
    shifts = np.array([draw_lighting(HOWARD, row) for row in rows(20000)])
    components, deviations = np.array(photometric.PCA_COMPONENTS), 0.1 * np.array(photometric.PCA_DEVIATIONS)
    wanted = components @ np.diag(deviations**2) @ components.T
    assert shifts.mean(axis=0) == pytest.approx(0, abs=0.15)
    assert np.cov(shifts.T) == pytest.approx(wanted, rel=0.05)


def test_the_components_are_orthonormal() -> None:
    components = np.array(photometric.PCA_COMPONENTS)
    assert components.T @ components == pytest.approx(np.eye(3), abs=1e-3)


def test_draws_of_0_and_just_below_1_are_finite() -> None:
    for value in (0.0, np.nextafter(1, 0)):
        draws = np.full(DRAWS, value)
        assert np.isfinite(draw_lighting(HOWARD, draws)).all()
        assert distorted(picture(1), HOWARD, draws).shape == (30, 40, 3)


# ------------------------------------------------------------------ the pixels
def test_it_is_the_steps_in_turn_but_for_rounding() -> None:
    # At most two roundings of at most one level, scaled by what follows, and the last one.
    worst = 0.0
    for number, row in enumerate(rows(300)):
        image = picture(number)
        wanted = step_by_step(image, HOWARD, row)
        worst = max(worst, float(np.abs(distorted(image, HOWARD, row) - wanted).max()))
    assert worst < 4


@pytest.mark.parametrize("order", FACTOR_ORDERS, ids=lambda order: "-".join(NAMES[kind] for kind in order))
def test_it_is_pils_enhancement_in_each_order(order: tuple[int, ...]) -> None:
    for number, row in enumerate(rows(40)):
        row[3] = (FACTOR_ORDERS.index(order) + 0.5) / 6
        wanted = Pillow.fromarray(picture(number))
        for kind, factor in draw_factors(UNLIT, row):
            wanted = ENHANCERS[kind](wanted).enhance(factor)
        found = distorted(picture(number), UNLIT, row)
        # PIL cuts every step's fraction off: up to 1, times 1.5 for each step that follows.
        assert np.abs(found.astype(int) - np.asarray(wanted)).max() <= 1 + 1.5 + 1.5**2 + 1


def test_the_order_matters_where_a_step_clips() -> None:
    draws = np.array([0.99, 0.01, 0.5, 0.0, 0.5, 0.5, 0.5])  # brighter by half, then half the contrast
    first = distorted(picture(3), UNLIT, draws)
    draws[3] = (FACTOR_ORDERS.index((CONTRAST, BRIGHTNESS, SATURATION)) + 0.5) / 6
    assert np.abs(first.astype(int) - distorted(picture(3), UNLIT, draws)).max() > 20


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [(BRIGHTNESS, [[0, 0, 0]] * 2), (CONTRAST, [[76, 76, 76]] * 2), (SATURATION, [[124, 124, 124], [29, 29, 29]])],
)
def test_a_factor_of_0_leaves_black_the_mean_grey_or_each_pixels_grey(kind: int, wanted: Any) -> None:
    image = np.array([[[200, 100, 50], [0, 0, 255]]], dtype=np.uint8)
    draws = np.full(DRAWS, 0.0)
    grey = image @ np.array(photometric.GRAY_WEIGHTS)
    assert grey.ravel() == pytest.approx([124.2, 29.07])
    found = distorted(image, one_only(kind, 1.0), draws)
    assert np.abs(found[0].astype(int) - wanted).max() <= 1


def test_lighting_adds_one_colour_everywhere() -> None:
    config = PhotometricConfig(brightness=0.0, contrast=0.0, saturation=0.0, lighting=0.3)
    image = np.full((5, 7, 3), 128, dtype=np.uint8)
    (row,) = rows(1)
    found = distorted(image, config, row)
    assert len(np.unique(found.reshape(-1, 3), axis=0)) == 1
    assert found[0, 0] - 128.0 == pytest.approx(draw_lighting(config, row), abs=1)
    assert not np.array_equal(found, image)


@pytest.mark.parametrize("amounts", [NO_PHOTOMETRIC, HOWARD])
def test_nothing_is_done_when_all_is_off(amounts: PhotometricConfig) -> None:
    image = picture(2)
    same = [np.array_equal(distorted(image, amounts, row), image) for row in rows(20)]
    assert all(same) == (amounts is NO_PHOTOMETRIC)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 16), (7, 31), (13, 1000), (224, 224)])
def test_any_shape_in_place(shape: tuple[int, int]) -> None:
    # OpenCV writes where it reads here: at no width may a pixel be read after it was written.
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for row in rows(8):
        assert np.abs(distorted(image, HOWARD, row) - step_by_step(image, HOWARD, row)).max() < 5


@pytest.mark.parametrize("field", ["brightness", "contrast", "saturation", "lighting"])
@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_impossible_amounts_are_errors(field: str, amount: float) -> None:
    with pytest.raises(ValidationError, match=field):
        PhotometricConfig(**{field: amount})
