"""Learning rates against literals, and what holds for every schedule."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.base import compute_fingerprint
from orchestrator.config.errors import ConfigError
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import (
    AnySchedule,
    CosineDecay,
    ExponentialDecay,
    PolynomialDecay,
    StepDecay,
    compute_lr,
)
from orchestrator.recipe.presets import PRESETS

rates = st.floats(1e-6, 10)
warmups = st.floats(0, 20)
schedules: st.SearchStrategy[AnySchedule] = st.one_of(
    st.builds(StepDecay, base_rate=rates, warmup_epochs=warmups, decay_factor=st.floats(0.1, 1)),
    st.builds(ExponentialDecay, base_rate=rates, warmup_epochs=warmups, decay_epochs=st.floats(0.5, 50)),
    st.builds(PolynomialDecay, base_rate=rates, warmup_epochs=warmups, power=st.floats(0.1, 5)),
    st.builds(CosineDecay, base_rate=rates, warmup_epochs=warmups),
)


def rate_of(schedule: AnySchedule, epochs_done: float, epochs: int) -> float:
    return compute_lr(schedule, epochs_done, 1, epochs)


# Section 6: 4% every 8 epochs.
@pytest.mark.parametrize(
    ("epochs_done", "rate"),
    [(0.0, 0.01), (7.99, 0.01), (8.0, 0.0096), (15.999, 0.0096), (16.0, 0.009216), (240.0, 0.002938577)],
)
def test_the_papers_steps(epochs_done: float, rate: float) -> None:
    assert rate_of(StepDecay(base_rate=0.01), epochs_done, 250) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("steps", range(6))
def test_exponential_equals_step_where_the_steps_are(steps: int) -> None:
    at = (8.0 * steps, 250)
    assert rate_of(ExponentialDecay(), *at) == pytest.approx(rate_of(StepDecay(), *at), rel=1e-12)
    assert rate_of(ExponentialDecay(), 8.0 * steps + 4, 250) < rate_of(StepDecay(), 8.0 * steps + 4, 250)


@pytest.mark.parametrize(
    ("schedule", "epochs_done", "rate"),
    [
        (PolynomialDecay(base_rate=0.01, power=0.5), 0, 0.01),
        (PolynomialDecay(base_rate=0.01, power=0.5), 45, 0.005),
        (PolynomialDecay(base_rate=0.01, power=0.5), 30, 0.00707107),
        (PolynomialDecay(base_rate=0.01, power=0.5), 60, 0.0),
        (PolynomialDecay(base_rate=0.01, power=1), 15, 0.0075),
        (CosineDecay(base_rate=0.2), 0, 0.2),
        (CosineDecay(base_rate=0.2), 15, 0.17071068),
        (CosineDecay(base_rate=0.2), 30, 0.1),
        (CosineDecay(base_rate=0.2), 60, 0.0),
        (ExponentialDecay(base_rate=0.1, decay_factor=0.5, decay_epochs=10), 5, 0.07071068),
        (ExponentialDecay(base_rate=0.1, decay_factor=0.5, decay_epochs=10), 30, 0.0125),
        (ExponentialDecay(base_rate=0.1, decay_factor=0.5, decay_epochs=10, warmup_epochs=10), 5, 0.03535534),
        (StepDecay(base_rate=0.1, decay_factor=1.0, decay_epochs=1), 59, 0.1),
        (PolynomialDecay(base_rate=0.01, power=1, final_rate=0.002), 30, 0.006),
        (PolynomialDecay(base_rate=0.01, power=1, final_rate=0.002), 60, 0.002),
        (PolynomialDecay(base_rate=0.01, power=1, final_rate=0.002), 61, 0.002),
        (CosineDecay(base_rate=0.2, final_rate=0.1), 30, 0.15),
        (CosineDecay(base_rate=0.2, final_rate=0.1), 60, 0.1),
        (CosineDecay(base_rate=0.2, warmup_epochs=20), 10, 0.09330127),
        (StepDecay(base_rate=0.08, warmup_epochs=5), 0, 0.0),
        (StepDecay(base_rate=0.08, warmup_epochs=5), 1.25, 0.02),
        (StepDecay(base_rate=0.08, warmup_epochs=5), 5, 0.08),
        (StepDecay(base_rate=0.08, warmup_epochs=5), 8, 0.0768),
        (PolynomialDecay(base_rate=0.01, power=0.5, warmup_epochs=30), 15, 0.00433013),
    ],
)
def test_literals(schedule: AnySchedule, epochs_done: float, rate: float) -> None:
    assert rate_of(schedule, epochs_done, 60) == pytest.approx(rate, rel=1e-5, abs=1e-12)


@given(schedules, st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_never_rises_after_the_warm_up(schedule: AnySchedule, epochs: int, one: float, other: float) -> None:
    start = schedule.warmup_epochs
    early, late = sorted(start + share * max(0.0, epochs - start) for share in (one, other))
    rate = rate_of(schedule, late, epochs)
    assert 0 <= rate <= rate_of(schedule, early, epochs) * (1 + 1e-12)
    assert rate <= schedule.base_rate


@given(schedules, st.floats(0, 400))
def test_the_rate_is_never_negative_nor_above_its_base(schedule: AnySchedule, epochs_done: float) -> None:
    assert 0 <= rate_of(schedule, epochs_done, 300) <= schedule.base_rate


@pytest.mark.parametrize("batch_size", [1, 32, 250])
def test_the_clock_is_samples(batch_size: int) -> None:
    """1,281,000 images: a batch's size decides when the rate is computed, never what it is."""
    schedule = StepDecay(base_rate=0.01)
    before, at = (8 * 1_281_000 - batch_size, 8 * 1_281_000)
    assert compute_lr(schedule, before, 1_281_000, 250) == 0.01
    assert compute_lr(schedule, at, 1_281_000, 250) == pytest.approx(0.0096)


@pytest.mark.parametrize(
    ("schedule", "epochs", "message"),
    [
        (StepDecay(), 8, "schedule.decay_epochs must be below epochs (8), got 8: the first step is never reached"),
        (StepDecay(), 9, None),
        (StepDecay(decay_factor=1.0), 3, None),
        (ExponentialDecay(), 3, None),
        (
            CosineDecay(warmup_epochs=3.0),
            3,
            "schedule.warmup_epochs must be below epochs (3), got 3: the warm-up never ends",
        ),
        (CosineDecay(warmup_epochs=2.9), 3, None),
    ],
)
def test_a_schedule_that_a_training_cannot_follow_is_invalid(
    schedule: AnySchedule, epochs: int, message: str | None
) -> None:
    if message is None:
        assert Recipe(name="x", schedule=schedule, epochs=epochs).schedule == schedule
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(name="x", schedule=schedule, epochs=epochs)


# Runs that were trained under these names are found again.
FINGERPRINTS = {
    "googlenet-digits": "239f62fb99",
    "googlenet-imagenet": "57b8f77540",
    "googlenet-bn-digits": "695e50b575",
    "alexnet-imagenet": "7de29dee87",
    "googlenet-tiny": "231a14c95c",
}
FINGERPRINTS_BY_KIND = {
    "step": "32633c67d9",
    "exponential": "f026272b15",
    "polynomial": "15c7a75c8c",
    "cosine": "261fe08e01",
}


def test_recipes_keep_their_fingerprints() -> None:
    assert {name: compute_fingerprint(PRESETS[name]()) for name in FINGERPRINTS} == FINGERPRINTS
    kinds = {kind: Recipe.from_dict({"name": "x", "schedule": {"kind": kind}}) for kind in FINGERPRINTS_BY_KIND}
    assert {kind: compute_fingerprint(recipe) for kind, recipe in kinds.items()} == FINGERPRINTS_BY_KIND


def test_segments_are_no_kind_of_schedule() -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.kind: must be one of .*, got 'segments'"):
        Recipe.from_dict({"name": "x", "schedule": {"kind": "segments", "segments": []}})
