"""One schedule after another: the rates, what is refused, and that older recipes are what they were."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.config.errors import ConfigError
from orchestrator.config.fingerprint import compute_fingerprint
from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import (
    AnySchedule,
    CosineDecay,
    ExponentialDecay,
    PlainSchedule,
    PolynomialDecay,
    Segment,
    Segments,
    StepDecay,
    compute_lr,
    find_schedule_error,
    find_turning_points,
    suggest_lower_lr,
)
from orchestrator.recipe.presets import PRESETS
from tests.recipe.test_lr_schedule import schedules

FLAT = StepDecay(base_rate=0.1, decay_factor=1.0)
COSINE = CosineDecay(base_rate=0.2, warmup_epochs=4.0)
LINEAR = PolynomialDecay(base_rate=0.4, power=1.0)


def segments(*parts: tuple[float, PlainSchedule]) -> Segments:
    return Segments(segments=tuple(Segment(from_epoch=start, schedule=schedule) for start, schedule in parts))


def recipe(schedule: AnySchedule, epochs: int = 10) -> Recipe:
    return Recipe(name="x", epochs=epochs, schedule=schedule)


THREE = segments((0.0, FLAT), (2.5, COSINE), (5.0, LINEAR))


# ------------------------------------------------------------------ rates
@pytest.mark.parametrize(
    ("done", "rate"),
    [(0.0, 0.1), (2.499, 0.1), (2.5, 0.2 * 0.85355339 * 0.625), (4.0, 0.2 * 0.65450850), (5.0, 0.2), (9.0, 0.04)],
)
def test_each_segment_follows_the_clock_of_the_training(done: float, rate: float) -> None:
    """The second one's warm-up is five eighths over when it begins, and half of the third one's fall."""
    assert compute_lr(THREE, done, 1, 10) == pytest.approx(rate, rel=1e-6)


@given(schedules, schedules, st.floats(0.01, 50), st.floats(0, 60))
def test_the_rate_is_that_of_the_last_segment_that_has_begun(
    first: PlainSchedule, second: PlainSchedule, start: float, done: float
) -> None:
    both = segments((0.0, first), (start, second))
    assert compute_lr(both, done, 1, 60) == compute_lr(second if start <= done else first, done, 1, 60)


def test_a_segment_begins_with_the_first_sample_of_its_epoch() -> None:
    both = segments((0.0, FLAT), (3.0, LINEAR))
    assert compute_lr(both, 3 * 1437 - 32, 1437, 10) == 0.1
    assert compute_lr(both, 3 * 1437, 1437, 10) == pytest.approx(0.28)


def test_where_the_rate_turns() -> None:
    assert find_turning_points(THREE) == [2.5, 4.0, 5.0]
    assert find_turning_points(FLAT) == []
    assert find_turning_points(StepDecay(warmup_epochs=1.5)) == [1.5]
    assert find_turning_points(segments((0.0, COSINE), (2.0, FLAT))) == [2.0], "a warm-up that is cut off does not end"


def test_what_to_lower_when_a_training_diverged() -> None:
    assert suggest_lower_lr(COSINE, 1.0) == "lower schedule.base_rate or lengthen schedule.warmup_epochs"
    assert suggest_lower_lr(THREE, 2.4) == "lower base_rate in schedule.segments.0.schedule"
    assert suggest_lower_lr(THREE, 7.0) == "lower base_rate in schedule.segments.2.schedule"


# ------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([], "segments"),
        ([(1.0, FLAT)], "segments.0.from_epoch 1 is refused: the first segment begins at 0"),
        ([(0.0, FLAT), (0.0, COSINE)], "segments.1.from_epoch 0 is refused: the segment before begins at 0"),
        ([(0.0, FLAT), (3.0, COSINE), (2.0, FLAT)], "segments.2.from_epoch 2 is refused: the segment before begins at"),
        ([(-1.0, FLAT)], "from_epoch"),
    ],
)
def test_segments_begin_at_0_and_one_after_the_other(parts: list[tuple[float, PlainSchedule]], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        segments(*parts)


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (segments((0.0, FLAT), (10.0, FLAT)), "schedule.segments.1.from_epoch 10 is refused: training ends after"),
        (segments((0.0, FLAT), (9.9, COSINE)), None),
        (
            segments((0.0, FLAT), (2.0, StepDecay(decay_epochs=10.0))),
            "schedule.segments.1.schedule.decay_epochs 10 is refused: the first step is never reached within",
        ),
        (
            segments((0.0, CosineDecay(warmup_epochs=12.0)), (2.0, FLAT)),
            "schedule.segments.0.schedule.warmup_epochs 12 is refused: the warm-up never ends",
        ),
    ],
)
def test_what_a_training_cannot_follow_is_told(schedule: Segments, told: str | None) -> None:
    found = find_schedule_error(schedule, 10)
    assert (found or "").startswith(told or "")
    assert (found is None) == (told is None)
    if told is not None:
        with pytest.raises(ConfigError, match=told):
            Recipe.from_dict({"name": "x", "epochs": 10, "schedule": schedule.to_dict()})


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"kind": "segments"}, r"^schedule\.segments: must be given"),
        ({"kind": "segments", "segments": []}, r"^schedule\.segments: .*must have at least 1 item"),
        (
            {"kind": "segments", "segments": [{"schedule": {"kind": "segments", "segments": []}}]},
            r"^schedule\.segments\.0\.schedule\.kind: must be one of step, exponential, poly",
        ),
        ({"kind": "segments", "segments": [{"schedule": {"kind": "step", "base_rate": 0}}]}, r"segments\.0.*base_rate"),
    ],
)
def test_what_a_file_may_not_say_is_told_by_its_place(schedule: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Recipe.from_dict({"name": "x", "schedule": schedule})


# ------------------------------------------------------------------ values
def test_segments_survive_json_and_have_a_name_of_their_own() -> None:
    of = recipe(THREE)
    again = Recipe.from_dict(json.loads(of.to_json()))
    assert again == of
    assert compute_fingerprint(again) == compute_fingerprint(of) != compute_fingerprint(recipe(FLAT))
    later = segments((0.0, FLAT), (2.5, COSINE), (5.5, LINEAR))
    assert compute_fingerprint(recipe(later)) != compute_fingerprint(of)


def test_a_sweep_may_set_them_as_one_value_and_switch_back() -> None:
    of = apply_overrides(recipe(FLAT), {"schedule": THREE})
    assert of == recipe(THREE)
    assert apply_overrides(of, {"schedule.kind": "exponential"}).schedule == ExponentialDecay()
    with pytest.raises(ConfigError, match=r"schedule\.base_rate: belongs to schedule\.kind step or exponential or"):
        apply_overrides(of, {"schedule.base_rate": 0.1})


# Taken before there were segments: runs that were trained then are found again.
BEFORE = {
    "googlenet-digits": "239f62fb99",
    "googlenet-imagenet": "57b8f77540",
    "googlenet-bn-digits": "695e50b575",
    "alexnet-imagenet": "7de29dee87",
    "googlenet-tiny": "231a14c95c",
}
BEFORE_BY_KIND = {
    "step": "32633c67d9",
    "exponential": "f026272b15",
    "polynomial": "15c7a75c8c",
    "cosine": "261fe08e01",
}


def test_recipes_from_before_keep_their_names() -> None:
    assert {name: compute_fingerprint(PRESETS[name]()) for name in BEFORE} == BEFORE
    kinds = {kind: Recipe.from_dict({"name": "x", "schedule": {"kind": kind}}) for kind in BEFORE_BY_KIND}
    assert {kind: compute_fingerprint(of) for kind, of in kinds.items()} == BEFORE_BY_KIND
