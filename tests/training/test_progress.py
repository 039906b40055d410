"""The clock of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.overrides import apply_overrides
from orchestrator.training.train_state import Progress
from orchestrator.training.train_step import compute_averaging_start_step
from tests.support.runs import recipe


@pytest.mark.parametrize(
    ("step", "samples", "epoch", "step_in_epoch"),
    [(0, 0, 0, 0), (1, 32, 0, 1), (9, 288, 0, 9), (10, 320, 1, 0), (27, 864, 2, 7)],
)
def test_literals(step: int, samples: int, epoch: int, step_in_epoch: int) -> None:
    found = Progress(samples, 32, 10)
    assert (found.step, found.epoch, found.step_in_epoch) == (step, epoch, step_in_epoch)


@given(st.integers(0, 10_000), st.integers(1, 5000), st.integers(1, 5000))
def test_one_step_at_a_time_is_the_same_as_all_at_once(step: int, batch_size: int, steps_per_epoch: int) -> None:
    found = Progress(step * batch_size, batch_size, steps_per_epoch)
    assert found.epoch * steps_per_epoch + found.step_in_epoch == found.step == step
    after = found.advance()
    assert after == Progress((step + 1) * batch_size, batch_size, steps_per_epoch)


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.6, 36), (0.61, 36), (0.99, 59), (0.9999, 59)])
def test_averaging_begins_at_its_share_and_holds_at_least_the_last_step(start: float, first: int) -> None:
    assert compute_averaging_start_step(apply_overrides(recipe(epochs=6), {"averaging.start": start}), 10) == first
