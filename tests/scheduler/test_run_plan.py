from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ray_backend.cluster import ClusterCapacity, Node
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler import run_plan
from orchestrator.scheduler.run_plan import (
    RunPlan,
    ScalingModel,
    count_slots,
    estimate_work,
    plan_runs,
    replace_workers,
)
from tests.support.launched import recipe, spec, wide


def runs(epochs: list[int], **placement: Any) -> list[RunSpec]:
    return [spec(wide(f"run-{number}", length, 0.1), **placement) for number, length in enumerate(epochs)]


def one_node(cpus: int) -> ClusterCapacity:
    return ClusterCapacity((Node(cpus, 0),))


def best(works: list[float], count: int) -> float:
    """The least makespan of all assignments."""
    found = sum(works)
    for chosen in product(range(count), repeat=len(works)):
        ends = [0.0] * count
        for amount, slot in zip(works, chosen, strict=True):
            ends[slot] += amount
        found = min(found, max(ends))
    return found


def greedy(made: RunPlan) -> float:
    """When all have ended if each run is started in turn as soon as there is room, which is what a supervisor does."""
    lasts = [run.end - run.start for run in made.runs]
    workers = [run.spec.placement.workers for run in made.runs]
    starts = run_plan.compute_start_times(lasts, workers, made.slots, made.max_concurrent)
    return max(start + last for start, last in zip(starts, lasts, strict=True))


# ------------------------------------------------------------------ runs of a fixed size
@settings(max_examples=100)
@given(epochs=st.lists(st.integers(1, 30), min_size=2, max_size=7), count=st.integers(1, 4))
def test_a_small_plan_is_the_shortest_there_is(epochs: list[int], count: int) -> None:
    made = plan_runs(runs(epochs), one_node(count), 0)
    optimum = best([estimate_work(run) for run in made.order], made.max_concurrent)
    assert made.makespan == pytest.approx(optimum)
    assert made.min_makespan <= optimum * (1 + 1e-9)
    assert greedy(made) == pytest.approx(optimum)
    assert sorted(run.name for run in made.order) == sorted(run.name for run in runs(epochs))
    assert made.max_concurrent == min(count, len(epochs))
    starts = [run.start for run in made.runs]
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("placement", "capacity", "gpus", "at_once"),
    [
        ({}, ClusterCapacity((Node(4, 0),)), 0, 4),
        ({}, ClusterCapacity((Node(100, 0),)), 0, 7),
        ({"at_once": 2}, ClusterCapacity((Node(4, 0),)), 0, 2),
        ({"at_once": 9}, ClusterCapacity((Node(4, 0),)), 0, 4),
        ({"workers": 2}, ClusterCapacity((Node(5, 0),)), 0, 2),
        ({"workers": 2}, ClusterCapacity((Node(1, 0), Node(1, 0), Node(1, 0))), 0, 1),
        ({"workers": 2, "cpus_per_worker": 3}, ClusterCapacity((Node(4, 0), Node(12, 0))), 0, 2),
        ({}, ClusterCapacity((Node(64, 0), Node(8, 3))), 1, 3),
    ],
)
def test_as_many_run_at_once_as_fit_and_are_allowed(
    placement: dict[str, int], capacity: ClusterCapacity, gpus: float, at_once: int
) -> None:
    assert plan_runs(runs([1] * 7, **placement), capacity, gpus).max_concurrent == at_once


def test_a_node_without_room_for_a_worker_counts_nothing() -> None:
    (run,) = runs([1], cpus_per_worker=4)
    assert count_slots(ClusterCapacity((Node(3, 0), Node(3, 0), Node(9, 0))), run.placement, 0) == 2


def test_nodes_that_an_autoscaler_can_bring_are_asked_for_by_starting_runs() -> None:
    capacity = ClusterCapacity((Node(2, 0),), max_cpus=8, max_gpus=0)
    assert plan_runs(runs([1] * 7), capacity, 0).max_concurrent == 7
    assert plan_runs(runs([1] * 7, workers=3), capacity, 0).max_concurrent == 2
    assert count_slots(ClusterCapacity((Node(2, 1),), max_cpus=64, max_gpus=4), runs([1])[0].placement, 1.0) == 4
    # What is there counts, whatever the autoscaler's file says.
    assert count_slots(ClusterCapacity((Node(8, 0),), max_cpus=2, max_gpus=0), runs([1])[0].placement, 0) == 8


def test_what_does_not_fit_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"placement\.workers: 3 is refused"):
        plan_runs(runs([1], workers=3), one_node(2), 0)
    with pytest.raises(ValueError, match="no run to plan"):
        plan_runs([], one_node(2), 0)


def test_only_a_run_alone_may_have_a_number_of_workers_that_changes() -> None:
    capacity = ClusterCapacity((Node(1, 0), Node(1, 0)))
    alone, other = (spec(recipe(name), workers=3, min_workers=2) for name in ("one", "two"))
    assert plan_runs([alone], capacity, 0).max_concurrent == 1
    with pytest.raises(ValueError, match=r"placement\.min_workers 2 is refused: only a run alone on its cluster"):
        plan_runs([alone, other], capacity, 0)


def test_seven_equal_runs_take_four_waves_of_two_slots() -> None:
    made = plan_runs(runs([3] * 7), one_node(2), 0, [100.0] * 7, ScalingModel(launch_overhead=10))
    assert (made.num_waves, made.makespan, made.min_makespan) == (4, 440.0, 440.0)
    assert [made.get_wave(run.name) for run in made.order] == [1, 1, 2, 2, 3, 3, 4]
    assert [run.start for run in made.runs] == [0, 0, 110, 110, 220, 220, 330]


def test_given_durations_count_and_not_the_work() -> None:
    made = plan_runs(runs([9, 1, 1]), one_node(2), 0, [1.0, 5.0, 6.0])
    assert [run.recipe.name for run in made.order] == ["run-2", "run-1", "run-0"]
    assert made.makespan == 6.0


def test_work_grows_with_epochs_width_and_pixels() -> None:
    base = spec(wide("a", 10, 0.2))
    assert estimate_work(spec(wide("a", 20, 0.2))) == pytest.approx(2 * estimate_work(base))
    # Filters on both sides, but for the first row; and heads, whose linear layers do not grow with the image.
    assert 3 < estimate_work(spec(wide("a", 10, 0.4))) / estimate_work(base) < 4.2
    larger = recipe(model={"kind": "googlenet", "image_size": 64, "width": 0.2}, epochs=10)
    assert 3 < estimate_work(spec(larger)) / estimate_work(base) < 4.2


def test_work_is_known_for_networks_without_a_width() -> None:
    small, large = (
        spec(recipe(kind, epochs=1, model={"kind": kind, "image_size": 64})) for kind in ("alexnet", "vgg-16")
    )
    assert estimate_work(large) > 10 * estimate_work(small)


def test_the_wide_member_of_the_paper_starts_first() -> None:
    members = [spec(wide(f"m{n}", 2, 0.1)) for n in range(6)] + [spec(wide("m7-wide", 2, 0.125))]
    made = plan_runs(members, one_node(2), 0)
    assert made.order[0].recipe.name == "m7-wide"
    assert [run.recipe.name for run in made.order[1:]] == [f"m{n}" for n in range(6)]


# ------------------------------------------------------------------ runs that may be widened
def test_the_last_of_seven_gets_both_slots_when_it_may() -> None:
    pace = ScalingModel(launch_overhead=10, most_workers=2, serial_share=0.0)
    made = plan_runs(runs([3] * 7), one_node(2), 0, [100.0] * 7, pace)
    assert [run.spec.placement.workers for run in made.runs] == [1] * 6 + [2]
    assert made.makespan == pytest.approx(3 * 110 + 10 + 50)
    assert greedy(made) == pytest.approx(made.makespan)
    # Which run it is does not depend on its workers.
    assert {run.name for run in made.order} == {run.name for run in runs([3] * 7)}


def test_the_wider_member_gets_more_workers_where_all_then_end_sooner() -> None:
    pace = ScalingModel(most_workers=2, serial_share=0.0)
    made = plan_runs(runs([4, 2, 2]), one_node(4), 0, [40.0, 20.0, 20.0], pace)
    given_workers = {run.spec.recipe.name: run.spec.placement.workers for run in made.runs}
    assert given_workers == {"run-0": 2, "run-1": 1, "run-2": 1}
    assert made.makespan == pytest.approx(20.0) == pytest.approx(made.min_makespan)


def test_no_run_is_widened_where_that_does_not_pay() -> None:
    # Twice the workers, hardly any faster; and no slot is ever empty.
    for share, number in ((0.99, 4), (0.05, 8)):
        made = plan_runs(
            runs([1] * number), one_node(2), 0, [10.0] * number, ScalingModel(most_workers=2, serial_share=share)
        )
        assert [run.spec.placement.workers for run in made.runs] == [1] * number


@settings(max_examples=50, deadline=None)
@given(
    lasts=st.lists(st.integers(1, 30).map(float), min_size=1, max_size=6),
    count=st.integers(1, 5),
    most=st.integers(1, 4),
    start=st.integers(0, 5).map(float),
    at_once=st.one_of(st.none(), st.integers(1, 3)),
)
def test_widening_never_makes_a_plan_longer_and_nothing_beats_its_bound(
    lasts: list[float], count: int, most: int, start: float, at_once: int | None
) -> None:
    specs = runs([1] * len(lasts), at_once=at_once)
    narrow = plan_runs(specs, one_node(count), 0, lasts, ScalingModel(start))
    made = plan_runs(specs, one_node(count), 0, lasts, ScalingModel(start, most))
    assert made.min_makespan * (1 - 1e-9) <= made.makespan <= narrow.makespan * (1 + 1e-9)
    assert all(1 <= run.spec.placement.workers <= min(most, count) for run in made.runs)
    assert greedy(made) == pytest.approx(made.makespan)


def test_runs_that_cannot_be_widened_are_not() -> None:
    bn = {"kind": "googlenet", "image_size": 32, "width": 0.1, "batch_norm": True, "lrn": False}
    pace = ScalingModel(most_workers=64)
    assert pace.get_max_workers(spec(recipe(model=bn))) == 1  # another number of workers would change its losses
    assert pace.get_max_workers(spec(recipe(batch_size=5))) == 5
    assert pace.get_max_workers(spec(recipe(), workers=3, min_workers=2)) == 3
    assert ScalingModel().get_max_workers(spec(recipe(), workers=3)) == 3
    assert ScalingModel(most_workers=2).get_max_workers(spec(recipe(), workers=3)) == 3
    assert replace_workers(spec(recipe()), 2).placement.workers == 2


def test_many_runs_of_many_kinds_are_planned_within_seconds() -> None:
    lasts = [float(1 + number * 37 % 101) for number in range(120)]
    pace = ScalingModel(1.0, 8)
    made = plan_runs(runs([1] * 120), one_node(16), 0, lasts, pace)
    assert (
        made.min_makespan
        <= made.makespan
        <= plan_runs(runs([1] * 120), one_node(16), 0, lasts, ScalingModel(1.0)).makespan
    )
