"""Population based training: who is replaced, by whose weights, under which schedule."""

from collections.abc import Sequence

import pytest

from orchestrator.recipe.config import Recipe
from orchestrator.recipe.prefix import prefix_epochs
from orchestrator.recipe.schedule import CosineDecay, Segments, rate_at
from orchestrator.tuning.population import Exploiting
from orchestrator.tuning.trials import Epoch, Trial
from tests.support.launched import recipe


def base(rate: float) -> Recipe:
    return recipe("tiny", epochs=8, schedule=CosineDecay(base_rate=rate).to_dict())


def trial(number: int, *errors: float, state: str = "running") -> Trial:
    epochs = tuple(
        Epoch(at, {"validation/raw_top1_error": error}, 1.0 * at, 64 * at) for at, error in enumerate(errors, 1)
    )
    rate = 0.01 * number
    return Trial(number, {"schedule.base_rate": rate}, base(rate), state, "", epochs)  # type: ignore[arg-type]


def exploiting(saved: Sequence[int] = range(100), seed: int = 0) -> Exploiting:
    return Exploiting("top1_error", 2, seed, lambda one, epoch: 64 * epoch if one.number in saved else None)


TRIALS = [trial(1, 90, 50), trial(2, 90, 20), trial(3, 90, 40), trial(4, 90, 80)]


def test_the_worst_goes_on_with_the_weights_of_the_best() -> None:
    found = exploiting().replacement(TRIALS[3], TRIALS)
    assert found is not None
    assert found.origin.model_dump() == {"trial": 2, "samples": 128, "epoch": 2}
    assert found.assignment == {"schedule.base_rate": 0.02, "from": "t002 at epoch 2"}
    schedule = found.recipe.schedule
    assert isinstance(schedule, Segments)
    first, second = schedule.segments
    assert (first.from_epoch, first.schedule) == (0.0, TRIALS[1].recipe.schedule)
    assert second.from_epoch == 2.0
    assert second.schedule.base_rate in (pytest.approx(0.016), pytest.approx(0.025))
    assert prefix_epochs(TRIALS[1].recipe, found.recipe) == 2.0
    assert rate_at(schedule, 2.5, 1, 8) == pytest.approx(
        rate_at(CosineDecay(base_rate=second.schedule.base_rate), 2.5, 1, 8)
    )


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_others_go_on_themselves(number: int) -> None:
    assert exploiting().replacement(TRIALS[number - 1], TRIALS) is None


def test_nobody_is_replaced_between_two_looks_or_at_the_end() -> None:
    assert exploiting().replacement(trial(4, 90), TRIALS) is None
    whole = [trial(number, *[10.0 * number] * 8) for number in (1, 2, 3, 4)]
    assert exploiting().replacement(whole[3], whole) is None


def test_too_few_have_come_so_far() -> None:
    early = [*TRIALS[:2], trial(3, 90), TRIALS[3]]
    assert exploiting().replacement(TRIALS[3], early) is None


def test_all_alike() -> None:
    alike = [trial(number, 90, 50) for number in (1, 2, 3, 4)]
    assert exploiting().replacement(alike[3], alike) is None


def test_a_donor_whose_checkpoint_is_gone_gives_nothing() -> None:
    assert exploiting(saved=[1, 3, 4]).replacement(TRIALS[3], TRIALS) is None


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    drawn = [exploiting(seed=seed).replacement(TRIALS[3], TRIALS) for seed in range(8)]
    assert drawn == [exploiting(seed=seed).replacement(TRIALS[3], TRIALS) for seed in range(8)]
    assert len({one.recipe.to_json() for one in drawn if one is not None}) == 2, "both factors are drawn"


def test_a_replaced_one_is_explored_further() -> None:
    following = exploiting().replacement(TRIALS[3], TRIALS)
    assert following is not None
    second = Trial(5, following.assignment, following.recipe, "running", "", trial(5, 90, 20, 10, 5).epochs)
    later = [second, *(trial(number, 90, 50, 50, 50 + number) for number in (1, 2, 3))]
    again = exploiting().replacement(later[3], later)
    assert again is not None
    assert isinstance(again.recipe.schedule, Segments)
    assert [one.from_epoch for one in again.recipe.schedule.segments] == [0.0, 2.0, 4.0]
