"""Impossible values of the data configs are errors."""

import pytest
from pydantic import ValidationError

from orchestrator.data.config import AugmentationConfig, OrderConfig


def test_lanes_times_window_has_a_budget() -> None:
    assert OrderConfig().lanes * OrderConfig().window <= OrderConfig().budget
    with pytest.raises(ValidationError, match=r"window 257 x lanes 64 = 16448 samples is over the budget of 16384"):
        OrderConfig(window=257)
    assert OrderConfig(window=257, budget=20_000).window == 257


@pytest.mark.parametrize("area", [(0.0, 1.0), (0.5, 0.4), (0.1, 1.1)])
def test_impossible_areas(area: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="area"):
        AugmentationConfig(area=area)


@pytest.mark.parametrize("aspect", [(0.0, 1.0), (2.0, 1.0)])
def test_impossible_aspects(aspect: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="aspect"):
        AugmentationConfig(aspect=aspect)


def test_at_least_one_interpolation() -> None:
    with pytest.raises(ValidationError):
        AugmentationConfig(interpolations=())
