"""Which trials of a grid share the beginning of their training."""

from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import CosineDecay, StepDecay
from orchestrator.recipe.presets import googlenet_digits
from orchestrator.tuning.sharing import PrefixSharing
from orchestrator.tuning.trial import Trial
from tests.tuning import made

BASE = googlenet_digits()


def steps(every: float, factor: float, rate: float = 0.02) -> Recipe:
    schedule = StepDecay(base_rate=rate, decay_epochs=every, decay_factor=factor)
    return BASE.model_copy(update={"schedule": schedule})


def tried(number: int, recipe: Recipe, epochs: int) -> Trial:
    named = recipe.model_copy(update={"name": f"t{number}"})
    return made.trial(number, [50.0] * epochs, "running", recipe=named)


def test_trials_keep_what_later_ones_begin_with() -> None:
    recipes = [steps(8, 0.3), steps(8, 0.6), steps(4, 0.6), steps(8, 0.3, rate=0.01)]
    sharing = PrefixSharing(recipes, BASE)
    assert [sharing.get_mark_epochs(one) for one in recipes] == [(4, 8), (4,), (), ()]
    assert sharing.get_mark_epochs(recipes[0].model_copy(update={"name": "t001"})) == (4, 8)


def test_the_longest_way_that_was_gone_comes_first() -> None:
    recipes = [steps(4, 0.3), steps(8, 0.3), steps(8, 0.6)]
    sharing = PrefixSharing(recipes, BASE)
    trials = [tried(1, recipes[0], 26), tried(2, recipes[1], 8)]
    assert [(trial.number, epoch) for trial, epoch in sharing.find_origins(recipes[2], trials)] == [(2, 8), (1, 4)]
    early = [tried(1, recipes[0], 4), tried(2, recipes[1], 7)]
    assert [(trial.number, epoch) for trial, epoch in sharing.find_origins(recipes[2], early)] == [(1, 4)]


def test_schedules_that_differ_from_the_start_share_nothing() -> None:
    cosine = BASE.model_copy(update={"schedule": CosineDecay(base_rate=0.02)})
    sharing = PrefixSharing([steps(8, 0.3), cosine], BASE)
    assert sharing.get_mark_epochs(steps(8, 0.3)) == ()
    assert sharing.find_origins(cosine, [tried(1, steps(8, 0.3), 26)]) == []


def test_without_a_list_nothing_is_shared() -> None:
    sharing = PrefixSharing([], BASE)
    assert sharing.get_mark_epochs(steps(8, 0.3)) == ()
    assert sharing.find_origins(steps(8, 0.6), [tried(1, steps(8, 0.3), 26)]) == []
