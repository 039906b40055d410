"""How far two recipes share their training; what is claimed is held against the rates themselves."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.config import Recipe, RunningMean
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
)
from orchestrator.recipe.prefix import count_shared_epochs, find_differences, shares_prefix
from tests.recipe.test_segments import COSINE, FLAT, LINEAR, segments

EPOCHS = 12

# Few values, so that schedules drawn at random often agree for a while.
_rates = st.sampled_from([0.1, 0.2])
_warmups = st.sampled_from([0.0, 1.0, 3.0])
_plain: st.SearchStrategy[PlainSchedule] = st.one_of(
    st.builds(
        StepDecay,
        base_rate=_rates,
        warmup_epochs=_warmups,
        decay_factor=st.sampled_from([0.5, 1.0]),
        decay_epochs=st.sampled_from([0.5, 2.0, 3.0]),
    ),
    st.builds(ExponentialDecay, base_rate=_rates, warmup_epochs=_warmups),
    st.builds(PolynomialDecay, base_rate=_rates, warmup_epochs=_warmups),
    st.builds(CosineDecay, base_rate=_rates, final_rate=st.sampled_from([0.0, 0.05])),
)


@st.composite
def _any(draw: st.DrawFn) -> AnySchedule:
    starts = sorted(draw(st.sets(st.sampled_from([1.0, 2.0, 2.5, 5.0]), max_size=3)))
    if not starts and draw(st.booleans()):
        return draw(_plain)
    return Segments(segments=tuple(Segment(from_epoch=start, schedule=draw(_plain)) for start in (0.0, *starts)))


def agree(a: AnySchedule, b: AnySchedule, before: float, totals: tuple[int, int] = (EPOCHS, EPOCHS)) -> bool:
    """Whether all rates before that point are the same, at 24 steps an epoch and closer to where things change."""
    steps = [step / 24 for step in range(24 * EPOCHS)] + [at - 1e-9 for at in (0.5, 1.0, 2.0, 2.5, 3.0, 5.0)]
    return all(compute_lr(a, at, 1, totals[0]) == compute_lr(b, at, 1, totals[1]) for at in steps if at < before)


def recipe(schedule: AnySchedule, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {"epochs": EPOCHS, "averaging": RunningMean(start=0.5)}
    return Recipe(**{"name": "x", "schedule": schedule} | fields | changes)


# ------------------------------------------------------------------ what is claimed is so
@given(_any(), _any(), st.floats(0, 15))
def test_schedules_that_share_a_prefix_say_the_same_rates(a: AnySchedule, b: AnySchedule, epochs: float) -> None:
    if shares_prefix(a, b, epochs, EPOCHS):
        assert agree(a, b, epochs)


@given(_any(), _any())
def test_the_prefix_is_how_far_they_share_it(a: AnySchedule, b: AnySchedule) -> None:
    shared = count_shared_epochs(recipe(a), recipe(b))
    assert agree(a, b, shared)
    assert shares_prefix(a, b, shared, EPOCHS)
    assert count_shared_epochs(recipe(b), recipe(a)) == shared
    if shared < EPOCHS:
        assert not shares_prefix(a, b, shared + 1e-6, EPOCHS)


@given(_any(), _any(), st.integers(6, 11))
def test_a_prefix_of_trainings_of_unlike_length_is_one_too(a: AnySchedule, b: AnySchedule, epochs: int) -> None:
    shared = count_shared_epochs(recipe(a), recipe(b, epochs=epochs))
    assert agree(a, b, shared, (EPOCHS, epochs))
    assert shared <= epochs * 0.5, "then the shorter one averages its weights"


@given(_any())
def test_a_schedule_shares_all_with_itself(schedule: AnySchedule) -> None:
    assert shares_prefix(schedule, schedule, EPOCHS, EPOCHS)
    assert count_shared_epochs(recipe(schedule), recipe(schedule)) == EPOCHS


# ------------------------------------------------------------------ and it is not nothing
@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        (COSINE, segments((0.0, COSINE), (3.0, FLAT)), 3.0),
        (segments((0.0, COSINE), (3.0, FLAT)), segments((0.0, COSINE), (3.0, FLAT), (5.5, LINEAR)), 5.5),
        (segments((0.0, COSINE), (3.0, FLAT)), segments((0.0, COSINE), (2.5, FLAT)), 2.5),
        (COSINE, segments((0.0, COSINE), (2.0, COSINE)), 12.0),
        (COSINE, LINEAR, 0.0),
        (COSINE, CosineDecay(base_rate=0.2, warmup_epochs=3.0), 0.0),
        (StepDecay(decay_epochs=4.0), StepDecay(decay_epochs=6.0), 4.0),
        (StepDecay(decay_epochs=4.0), StepDecay(decay_epochs=4.0, decay_factor=0.5), 4.0),
        (StepDecay(base_rate=0.1, decay_epochs=4.0), FLAT, 4.0),
        (StepDecay(decay_factor=1.0, decay_epochs=2.0), StepDecay(decay_factor=1.0, decay_epochs=3.0), 12.0),
        (
            segments((0.0, FLAT), (4.0, COSINE)),
            segments((0.0, FLAT), (4.0, CosineDecay(base_rate=0.2, warmup_epochs=2.0))),
            12.0,  # both warm-ups are over when they would begin
        ),
        (ExponentialDecay(), ExponentialDecay(decay_factor=0.9), 0.0),
    ],
)
def test_how_far_they_come(a: AnySchedule, b: AnySchedule, shared: float) -> None:
    assert count_shared_epochs(recipe(a), recipe(b)) == shared
    assert agree(a, b, shared)


def test_what_lies_beyond_the_training_is_not_looked_at() -> None:
    late = segments((0.0, COSINE), (8.0, FLAT))
    assert shares_prefix(COSINE, late, 100.0, 8)
    assert not shares_prefix(COSINE, late, 8.5, 9)
    assert shares_prefix(COSINE, LINEAR, 0.0, 9), "before the beginning nothing differs"


# ------------------------------------------------------------------ recipes
@pytest.mark.parametrize(
    "change",
    [
        {"seeds.order": 1},
        {"batch_size": 64},
        {"optimizer.momentum": 0.8},
        {"averaging.start": 0.6},
        {"model.width": 0.5},
        {"model.kind": "alexnet"},
        {"precision": "bfloat16"},
    ],
)
def test_recipes_that_differ_in_more_share_nothing(change: dict[str, Any]) -> None:
    assert count_shared_epochs(recipe(FLAT), apply_overrides(recipe(FLAT), change)) == 0
    assert find_differences(recipe(FLAT), apply_overrides(recipe(COSINE), change))[0] in {
        next(iter(change)),
        "model.kind",
    }


def test_a_name_trains_nothing() -> None:
    assert count_shared_epochs(recipe(FLAT), recipe(FLAT, name="another")) == EPOCHS
    assert find_differences(recipe(FLAT), recipe(COSINE, name="another", epochs=9)) == ()


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        (FLAT, FLAT, 4.0),  # then the average of the one of 8 epochs begins
        (FLAT, segments((0.0, FLAT), (2.0, LINEAR)), 2.0),
        (segments((0.0, FLAT), (2.0, LINEAR)), segments((0.0, FLAT), (2.0, LINEAR)), 2.0),
        (COSINE, COSINE, 0.0),
        (ExponentialDecay(), ExponentialDecay(), 4.0),
    ],
)
def test_trainings_of_unlike_length_share_what_asks_for_no_length(
    a: AnySchedule, b: AnySchedule, shared: float
) -> None:
    assert (
        count_shared_epochs(recipe(a), recipe(b, epochs=8))
        == shared
        == count_shared_epochs(recipe(b, epochs=8), recipe(a))
    )


def test_an_average_that_begins_between_floats_is_not_overstepped() -> None:
    """0.29 is a little less in binary: of 100 steps an epoch the 29th is averaged already."""
    of = recipe(FLAT, epochs=100, averaging=RunningMean(start=0.29))
    shared = count_shared_epochs(of, recipe(FLAT, epochs=101, averaging=RunningMean(start=0.29)))
    assert 28.99 < shared < 29
