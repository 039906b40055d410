"""Population based training: who is replaced, by whose weights, under which schedule."""

from collections.abc import Sequence

import pytest

from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import CosineDecay, Segments, compute_lr
from orchestrator.recipe.prefix import count_shared_epochs
from orchestrator.tuning.population import PopulationBasedTraining
from orchestrator.tuning.trial import EpochResult, Trial
from tests.support.launched import recipe


def base(rate: float) -> Recipe:
    return recipe("tiny", epochs=8, schedule=CosineDecay(base_rate=rate).to_dict())


def trial(number: int, *errors: float, state: str = "running") -> Trial:
    epochs = tuple(
        EpochResult(at, {"validation/raw_top1_error": error}, 1.0 * at, 64 * at) for at, error in enumerate(errors, 1)
    )
    rate = 0.01 * number
    return Trial(number, {"schedule.base_rate": rate}, base(rate), state, "", epochs)  # type: ignore[arg-type]


def exploiting(saved: Sequence[int] = range(100), seed: int = 0) -> PopulationBasedTraining:
    return PopulationBasedTraining(
        "top1_error", 2, seed, lambda one, epoch: 64 * epoch if one.number in saved else None
    )


TRIALS = [trial(1, 90, 50), trial(2, 90, 20), trial(3, 90, 40), trial(4, 90, 80)]


def test_the_population_meets_between_the_first_epoch_and_the_last() -> None:
    assert [epoch for epoch in range(9) if exploiting().is_exploit_epoch(epoch, 8)] == [2, 4, 6]


def test_the_worst_goes_on_with_the_weights_of_the_best() -> None:
    found = exploiting().choose_replacements(TRIALS, 2)
    assert list(found) == [4]
    one = found[4]
    assert one.origin.model_dump() == {"trial": 2, "samples": 128, "epoch": 2}
    assert one.assignment == {"schedule.base_rate": 0.02, "from": "t002 at epoch 2"}
    schedule = one.recipe.schedule
    assert isinstance(schedule, Segments)
    first, second = schedule.segments
    assert (first.from_epoch, first.schedule) == (0.0, TRIALS[1].recipe.schedule)
    assert second.from_epoch == 2.0
    assert second.schedule.base_rate in (pytest.approx(0.016), pytest.approx(0.025))
    assert count_shared_epochs(TRIALS[1].recipe, one.recipe) == 2.0
    assert compute_lr(schedule, 2.5, 1, 8) == pytest.approx(
        compute_lr(CosineDecay(base_rate=second.schedule.base_rate), 2.5, 1, 8)
    )


def test_one_that_diverged_on_the_way_is_replaced_too() -> None:
    trials = [*TRIALS, trial(5, 90, state="diverged"), trial(6, 90, state="failed")]
    assert set(exploiting().choose_replacements(trials, 2)) == {4, 5}
    alive = [trial(5, 90, 50, 50, state="diverged")]  # later than this meeting
    assert set(exploiting().choose_replacements([*TRIALS, *alive], 2)) == {4}


def test_what_came_from_a_meeting_was_no_part_of_it() -> None:
    following = exploiting().choose_replacements(TRIALS, 2)[4]
    told = trial(5, 90, 1)  # it validates what it took over
    later = [*TRIALS, Trial(5, following.assignment, following.recipe, "running", "", told.epochs, inherited_epochs=2)]
    assert exploiting().choose_replacements(later, 2) == exploiting().choose_replacements(TRIALS, 2)


def test_no_order_matters() -> None:
    assert exploiting().choose_replacements(TRIALS[::-1], 2) == exploiting().choose_replacements(TRIALS, 2)


def test_few_and_equal_ones_go_on_themselves() -> None:
    assert exploiting().choose_replacements(TRIALS[:3], 2) == {}, "a quarter of three is nobody"
    alike = [trial(number, 90, 50) for number in (1, 2, 3, 4)]
    assert exploiting().choose_replacements(alike, 2) == {}


def test_a_donor_whose_checkpoint_is_gone_gives_nothing() -> None:
    assert exploiting(saved=[1, 3, 4]).choose_replacements(TRIALS, 2) == {}


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    drawn = [exploiting(seed=seed).choose_replacements(TRIALS, 2)[4] for seed in range(8)]
    assert drawn == [exploiting(seed=seed).choose_replacements(TRIALS, 2)[4] for seed in range(8)]
    assert len({one.recipe.to_json() for one in drawn}) == 2, "both factors are drawn"


def test_a_replaced_one_is_explored_further() -> None:
    following = exploiting().choose_replacements(TRIALS, 2)[4]
    second = Trial(5, following.assignment, following.recipe, "running", "", trial(5, 90, 20, 10, 5).epochs)
    later = [second, *(trial(number, 90, 50, 50, 50 + number) for number in (1, 2, 3))]
    again = exploiting().choose_replacements(later, 4)
    assert list(again) == [3]
    schedule = again[3].recipe.schedule
    assert isinstance(schedule, Segments)
    assert [one.from_epoch for one in schedule.segments] == [0.0, 2.0, 4.0]
