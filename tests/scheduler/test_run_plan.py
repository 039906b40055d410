"""Plans and their numbers, against brute force."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ray_backend.cluster import ClusterCapacity, Node
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler.run_plan import RunPlan, compute_start_times, count_slots, plan_runs
from tests.support.launched import recipe, spec

durations = st.lists(st.integers(1, 40).map(float), min_size=1, max_size=7)
slot_counts = st.integers(1, 4)


def runs(count: int, **placement: Any) -> list[RunSpec]:
    return [spec(recipe(f"run-{number}"), **placement) for number in range(count)]


def one_node(cpus: int) -> ClusterCapacity:
    return ClusterCapacity((Node(cpus, 0),))


def plan_equal(count: int, capacity: ClusterCapacity, gpus: float = 0, **placement: Any) -> RunPlan:
    return plan_runs(runs(count, **placement), capacity, gpus, [1.0] * count)


def best_makespan(works: list[float], slots: int) -> float:
    """Return the least makespan of all assignments."""
    best = sum(works)
    for slot_of in product(range(slots), repeat=len(works)):
        loads = [0.0] * slots
        for amount, slot in zip(works, slot_of, strict=True):
            loads[slot] += amount
        best = min(best, max(loads))
    return best


# ------------------------------------------------------------------ plans
@settings(max_examples=100)
@given(works=durations, slots=slot_counts)
def test_longest_first_keeps_grahams_bound(works: list[float], slots: int) -> None:
    plan = plan_runs(runs(len(works)), one_node(slots), 0, works)
    optimum = best_makespan(works, plan.max_concurrent)
    assert optimum <= plan.makespan * (1 + 1e-9)
    assert plan.makespan <= optimum * (4 / 3 - 1 / (3 * plan.max_concurrent)) * (1 + 1e-9)
    assert plan.max_concurrent == min(slots, len(works))
    assert sorted(run.name for run in plan.order) == sorted(run.name for run in runs(len(works)))
    assert [run.start for run in plan.runs] == sorted(run.start for run in plan.runs)
    lasts = [run.end - run.start for run in plan.runs]
    assert lasts == sorted(lasts, reverse=True)


@pytest.mark.parametrize(
    ("placement", "capacity", "gpus", "concurrent"),
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
def test_as_many_run_together_as_fit_and_are_allowed(
    placement: dict[str, int], capacity: ClusterCapacity, gpus: float, concurrent: int
) -> None:
    assert plan_equal(7, capacity, gpus, **placement).max_concurrent == concurrent


def test_a_node_without_room_for_a_worker_counts_nothing() -> None:
    (run,) = runs(1, cpus_per_worker=4)
    assert count_slots(ClusterCapacity((Node(3, 0), Node(3, 0), Node(9, 0))), run.placement, 0) == 2


def test_nodes_that_an_autoscaler_can_add_are_asked_for_by_starting_runs() -> None:
    capacity = ClusterCapacity((Node(2, 0),), max_cpus=8, max_gpus=0)
    assert plan_equal(7, capacity).max_concurrent == 7
    assert plan_equal(7, capacity, workers=3).max_concurrent == 2
    placement = runs(1)[0].placement
    assert count_slots(ClusterCapacity((Node(2, 1),), max_cpus=64, max_gpus=4), placement, 1.0) == 4
    # Live nodes count, whatever the autoscaler's file says.
    assert count_slots(ClusterCapacity((Node(8, 0),), max_cpus=2, max_gpus=0), placement, 0) == 8


def test_a_plan_needs_a_run_and_room_for_it() -> None:
    with pytest.raises(ValueError, match=r"placement\.workers must fit the cluster, got 3 and room for 2: not one run"):
        plan_equal(1, one_node(2), workers=3)
    with pytest.raises(ValueError, match="no run to plan"):
        plan_runs([], one_node(2), 0, [])


def test_only_a_single_run_may_change_its_number_of_workers() -> None:
    capacity = ClusterCapacity((Node(1, 0), Node(1, 0)))
    assert plan_equal(1, capacity, workers=3, min_workers=2).max_concurrent == 1
    with pytest.raises(ValueError, match=r"placement\.min_workers must be left out .* got 2 for 2 runs"):
        plan_equal(2, capacity, workers=3, min_workers=2)


def test_seven_equal_runs_take_four_waves_of_two_slots() -> None:
    plan = plan_runs(runs(7), one_node(2), 0, [100.0] * 7, start_seconds=10)
    assert (plan.max_concurrent, plan.makespan) == (2, 440.0)
    assert [run.start for run in plan.runs] == [0, 0, 110, 110, 220, 220, 330]
    assert [run.name for run in plan.order] == [run.name for run in runs(7)]


def test_the_longest_run_starts_first_and_equal_ones_keep_their_order() -> None:
    plan = plan_runs(runs(4), one_node(2), 0, [1.0, 5.0, 6.0, 5.0])
    assert [run.recipe.name for run in plan.order] == ["run-2", "run-1", "run-3", "run-0"]
    assert plan.makespan == 10.0


def test_a_thousand_runs_are_near_the_bound() -> None:
    works = [float(1 + number * 7919 % 997) for number in range(1000)]
    plan = plan_runs([runs(1)[0]] * 1000, one_node(16), 0, works)
    assert plan.makespan <= 1.01 * sum(works) / 16


# ------------------------------------------------------------------ numbers
@settings(max_examples=150)
@given(works=durations, slots=slot_counts, busy=st.lists(st.integers(1, 20).map(float), max_size=4))
def test_no_more_runs_than_slots_are_active(works: list[float], slots: int, busy: list[float]) -> None:
    starts = compute_start_times(works, slots, busy)
    assert starts == sorted(starts)
    spans = [(0.0, end) for end in busy] + [(start, start + work) for start, work in zip(starts, works, strict=True)]
    for moment in starts:
        assert sum(begin <= moment < end for begin, end in spans) <= slots


def test_after_a_loss_of_slots_a_run_waits_until_the_others_fit() -> None:
    assert compute_start_times([2.0], 1, [4.0, 6.0]) == [6.0]
    assert compute_start_times([2.0], 2, [4.0, 6.0]) == [4.0]
