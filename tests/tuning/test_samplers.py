"""Samplers: functions of the trials so far, which never suggest an invalid recipe or one twice."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.presets import googlenet_digits
from orchestrator.tuning import samplers
from orchestrator.tuning.config import SamplerKind
from orchestrator.tuning.named_spaces import build_schedule_space
from orchestrator.tuning.samplers import Sampler
from orchestrator.tuning.space import Dimension, Space, list_grid
from orchestrator.tuning.trial import Assignment, EpochResult, Metric, State, Trial

BASE = googlenet_digits()
SCHEDULES = build_schedule_space(BASE)
OWN = {
    "step": {"schedule.decay_factor", "schedule.decay_epochs"},
    "exponential": {"schedule.decay_factor", "schedule.decay_epochs"},
    "polynomial": {"schedule.power", "schedule.final_rate"},
    "cosine": {"schedule.final_rate"},
}
SHARED = {"schedule.kind", "schedule.base_rate", "schedule.warmup_epochs"}
DRAWING: tuple[SamplerKind, ...] = ("random", "tpe")
KINDS: tuple[SamplerKind, ...] = (*DRAWING, "grid")

each_kind = pytest.mark.parametrize("kind", KINDS)
each_drawing = pytest.mark.parametrize("kind", DRAWING)
seeds = st.integers(0, 2**63)


def space(dimensions: dict[str, Any]) -> Space:
    return Space.from_dict({"dimensions": dimensions})


def sampler(kind: SamplerKind, over: Space = SCHEDULES, seed: int = 0) -> Sampler:
    return Sampler(kind, over, BASE, Metric(name="top1_error"), seed)


def trial(number: int, assignment: Assignment, state: State = "finished", score: float | None = 5.0) -> Trial:
    epochs = () if score is None else (EpochResult(1, {"validation/raw_top1_error": score}, 1.0),)
    return Trial(number, assignment, apply_overrides(BASE, assignment), state, epochs=epochs)


def error(assignment: Assignment) -> float:
    """Best at a rate of 0.03 under a cosine."""
    off = abs(math.log(assignment["schedule.base_rate"] / 0.03))
    return 2 + 10 * off + (0 if assignment["schedule.kind"] == "cosine" else 8)


def run(one: Sampler, number: int, states: Sequence[State] = ("finished", "pruned")) -> list[Trial]:
    """So many trials, one after the other; fewer when the space is exhausted."""
    trials: list[Trial] = []
    for place, state in zip(range(number), itertools.cycle(states)):
        found = one.suggest(trials)
        if found is None:
            break
        trials.append(trial(place + 1, found, state, error(found) if "schedule.kind" in found else 5.0))
    return trials


def assignments(trials: Sequence[Trial]) -> list[Assignment]:
    return [one.assignment for one in trials]


# ------------------------------------------------------------------ what holds for all
@each_drawing
@settings(max_examples=15)
@given(seed=seeds)
def test_suggestions_lie_inside_and_name_what_their_kind_has(kind: SamplerKind, seed: int) -> None:
    for assignment in assignments(run(sampler(kind, seed=seed), 14)):
        assert set(assignment) == SHARED | OWN[assignment["schedule.kind"]]
        assert all(SCHEDULES.dimensions[path].accepts(value) for path, value in assignment.items())
        recipe = apply_overrides(BASE, assignment)
        assert recipe.schedule.kind == assignment["schedule.kind"]


@each_kind
def test_suggestions_are_a_function_of_the_trials(kind: SamplerKind) -> None:
    """A new driver resumes with another sampler object, which never saw the trials."""
    one = sampler(kind, seed=3)
    trials = run(one, 24)
    for number in (0, 1, 11, 23):
        assert sampler(kind, seed=3).suggest(trials[:number]) == trials[number].assignment
        assert one.suggest(trials[:number]) == trials[number].assignment


@each_drawing
def test_another_seed_gives_other_suggestions(kind: SamplerKind) -> None:
    first, second = (assignments(run(sampler(kind, seed=seed), 12)) for seed in (0, 1))
    assert all(one != other for one, other in zip(first, second, strict=True))


@each_kind
def test_the_order_of_dimensions_in_a_file_makes_no_difference(kind: SamplerKind) -> None:
    backwards = Space(dimensions=dict(reversed(SCHEDULES.dimensions.items())))
    assert list(backwards.dimensions) != list(SCHEDULES.dimensions)
    assert assignments(run(sampler(kind, backwards), 14)) == assignments(run(sampler(kind), 14))


@each_kind
def test_a_finite_space_is_exhausted_without_repetition(kind: SamplerKind) -> None:
    few = space(
        {
            "schedule.kind": {"values": ["step", "polynomial"]},
            "batch_size": {"low": 8, "high": 10, "whole": True},
            "augmentation.area": {"values": [[0.4, 1.0], [0.8, 1.0]], "when": {"schedule.kind": ["step"]}},
            "schedule.base_rate": {"values": [0.01]},
        }
    )
    trials = run(sampler(kind, few), 20)
    assert len(trials) == 9
    assert {one.recipe for one in trials} == set(list_grid(few, BASE))
    assert sampler(kind, few).suggest(trials) is None


@each_kind
def test_invalid_recipes_are_never_suggested(kind: SamplerKind) -> None:
    """Two of three pairs have a final rate above the base rate."""
    pairs = space(
        {
            "schedule.base_rate": {"values": [0.001, 0.01, 0.1]},
            "schedule.final_rate": {"values": [0.05, 0.005, 0.5]},
        }
    )
    found = assignments(run(sampler(kind, pairs), 9))
    assert sorted((one["schedule.base_rate"], one["schedule.final_rate"]) for one in found) == [
        (0.01, 0.005),
        (0.1, 0.005),
        (0.1, 0.05),
    ]


@each_drawing
def test_a_space_without_a_valid_recipe_is_an_error(kind: SamplerKind) -> None:
    never = space({"schedule.final_rate": {"low": 0.1, "high": 1}})
    message = r"dimensions: none of \d+ trials drawn is valid; narrow the ranges.*final_rate must be at most base_rate"
    with pytest.raises(ConfigError, match=message):
        sampler(kind, never).suggest([])
    with pytest.raises(ConfigError, match="no trial of the grid is valid"):
        sampler("grid", never).suggest([])


@each_kind
def test_a_recipe_tried_under_another_name_is_not_tried_again(kind: SamplerKind) -> None:
    two = space({"optimizer.momentum": {"values": [0.5, 0.9]}})
    own = Trial(1, {}, BASE.model_copy(update={"name": "my-own"}), "finished")  # momentum 0.9
    assert sampler(kind, two).suggest([own]) == {"optimizer.momentum": 0.5}


@each_kind
def test_a_recipe_tried_with_a_plug_in_is_not_tried_again(kind: SamplerKind) -> None:
    two = space({"model.kind": {"values": ["googlenet", "examples.small_cnn:SmallCNN"]}})
    tried = apply_overrides(BASE, {"model.kind": "examples.small_cnn:SmallCNN"})
    own = Trial(1, {}, tried.model_copy(update={"code": {"examples.small_cnn:SmallCNN": "0"}}), "finished")
    assert sampler(kind, two).suggest([own]) == {"model.kind": "googlenet"}


# ------------------------------------------------------------------ random
def test_literals_of_random_draws() -> None:
    """Another draw here means that sweeps under way would not resume as they began."""
    assert sampler("random", seed=7).suggest([]) == {
        "schedule.base_rate": 0.0167059,
        "schedule.kind": "polynomial",
        "schedule.warmup_epochs": 0.712814,
        "schedule.final_rate": 0.001,
        "schedule.power": 1.06695,
    }


def test_random_draws_do_not_depend_on_how_trials_went() -> None:
    well, badly = run(sampler("random"), 6), run(sampler("random"), 6, ("diverged", "failed", "running"))
    assert assignments(well) == assignments(badly)


def test_a_draw_depends_on_its_own_path_only() -> None:
    """One dimension more leaves the draws of the others as they are."""
    momentum = Dimension(low=0.5, high=0.9)
    wider = Space(dimensions={"optimizer.momentum": momentum, **SCHEDULES.dimensions})
    for plain, wide in zip(run(sampler("random"), 5), run(sampler("random", wider), 5), strict=True):
        assert {**plain.assignment, "optimizer.momentum": wide.assignment["optimizer.momentum"]} == wide.assignment


def test_random_draws_are_even() -> None:
    trials = run(sampler("random"), 200)
    kinds = [one.assignment["schedule.kind"] for one in trials]
    assert all(30 <= kinds.count(kind) <= 70 for kind in OWN)
    low = sum(one.assignment["schedule.base_rate"] < 0.01 for one in trials)  # half, on a logarithmic scale
    assert 75 <= low <= 125


def test_what_is_left_is_found_though_it_is_hardly_ever_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    many = space({"batch_size": {"low": 1, "high": 300, "whole": True}})
    trials = [trial(number, {"batch_size": number}) for number in range(1, 300)]
    monkeypatch.setattr(samplers, "MAX_DRAWS", 3)
    assert sampler("random", many).suggest(trials) == {"batch_size": 300}


# ------------------------------------------------------------------ grid
def test_a_grid_has_no_recipe_twice_and_keeps_its_order() -> None:
    trials = run(sampler("grid"), 300)
    assert assignments(trials) == list(list_grid(SCHEDULES, BASE).values())
    assert len({one.recipe for one in trials}) == len(trials) == 270


# ------------------------------------------------------------------ tpe
def test_tpe_finds_what_is_good() -> None:
    metric = Metric(name="top1_error")
    late = {kind: [one.get_score(metric) or 0.0 for one in run(sampler(kind), 50)[25:]] for kind in DRAWING}
    assert sorted(late["tpe"])[12] < 0.6 * sorted(late["random"])[12]
    assert min(late["tpe"]) < 4


def test_tpe_learns_from_its_metric() -> None:
    trials = run(sampler("tpe"), 15)
    top5 = Sampler("tpe", SCHEDULES, BASE, Metric(name="top5_error"), 0)
    assert top5.suggest(trials) != sampler("tpe").suggest(trials)  # no trial reported its top-5 error


def test_tpe_seeks_high_values_of_a_metric_to_maximize() -> None:
    rate = space({"schedule.base_rate": {"low": 0.001, "high": 0.1, "log": True}})
    tpe = Sampler("tpe", rate, BASE, Metric(name="score", maximize=True), 0)
    trials: list[Trial] = []
    for number in range(1, 41):
        assignment = tpe.suggest(trials)
        assert assignment is not None
        epochs = (EpochResult(1, {"validation/score": assignment["schedule.base_rate"]}, 1.0),)
        trials.append(Trial(number, assignment, apply_overrides(BASE, assignment), "finished", epochs=epochs))
    assert sum(one.assignment["schedule.base_rate"] > 0.01 for one in trials[20:]) >= 16  # 10 by chance


def test_tpe_leaves_where_trials_diverge() -> None:
    """Rates above 0.01 diverge. Of 80 late trials 40 would lie below by chance, and 2 if such trials taught nothing."""
    rate = space({"schedule.base_rate": {"low": 0.001, "high": 0.1, "log": True}})
    late: list[bool] = []
    for seed in range(4):
        trials: list[Trial] = []
        for number in range(1, 41):
            found = sampler("tpe", rate, seed).suggest(trials)
            assert found is not None
            is_well = found["schedule.base_rate"] < 0.01
            trials.append(trial(number, found, "finished" if is_well else "diverged", 30.0 if is_well else math.nan))
        late.extend(one.state == "finished" for one in trials[20:])
    assert sum(late) >= 50


def test_tpe_takes_trials_in_every_state_and_from_outside_the_space() -> None:
    states: tuple[State, ...] = ("finished", "pruned", "diverged", "failed", "running", "waiting", "stopped")
    trials = run(sampler("tpe"), 28, states)
    odd = {"schedule.kind": "step", "schedule.base_rate": 5.0, "optimizer.momentum": 0.5}
    trials.append(trial(29, odd))
    trials.append(trial(30, {"schedule.warmup_epochs": 1}, "finished", None))
    trials.append(trial(31, {"schedule.warmup_epochs": 2.5}, "pruned", math.nan))
    found = sampler("tpe").suggest(trials)
    assert found is not None
    assert set(found) == SHARED | OWN[found["schedule.kind"]]


def test_trials_side_by_side_differ() -> None:
    ended = run(sampler("tpe", seed=1), 20)
    beside = list(ended)
    for number in range(21, 29):
        found = sampler("tpe", seed=1).suggest(beside)
        assert found is not None
        beside.append(trial(number, found, "running", None))
    rates = {one.assignment["schedule.base_rate"] for one in beside[20:]}
    assert len(rates) == 8


def test_tpe_takes_lists_whole_numbers_and_none() -> None:
    mixed = space(
        {
            "augmentation.area": {"values": [[0.4, 1.0], [0.8, 1.0]]},
            "batch_size": {"low": 8, "high": 512, "whole": True, "log": True},
            "optimizer.clip_norm": {"values": [None, 1.0]},
            "model.lrn": {"values": [True, False]},
        }
    )
    for one in assignments(run(sampler("tpe", mixed), 14)):
        assert one["augmentation.area"] in ([0.4, 1.0], [0.8, 1.0])
        assert type(one["batch_size"]) is int
        assert one["optimizer.clip_norm"] in (None, 1.0)
        assert type(one["model.lrn"]) is bool
