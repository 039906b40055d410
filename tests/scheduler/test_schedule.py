"""The schedules as numbers, against brute force."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.scheduler import run_plan
from orchestrator.scheduler.run_plan import assign_slots, compute_lower_bound, compute_start_times

durations = st.lists(st.integers(1, 40).map(float), min_size=1, max_size=7)
slot_counts = st.integers(1, 4)


def end(works: list[float], slots: int, chosen: list[int]) -> float:
    loads = [0.0] * slots
    for amount, slot in zip(works, chosen, strict=True):
        loads[slot] += amount
    return max(loads)


def best(works: list[float], slots: int) -> float:
    """The least makespan of all assignments."""
    return min(end(works, slots, list(chosen)) for chosen in product(range(slots), repeat=len(works)))


@settings(max_examples=150)
@given(works=durations, slots=slot_counts)
def test_small_schedules_are_the_shortest_there_are(works: list[float], slots: int) -> None:
    assert end(works, slots, assign_slots(works, slots)) == best(works, slots)


@settings(max_examples=100)
@given(works=durations, slots=slot_counts)
def test_longest_first_alone_keeps_grahams_bound(works: list[float], slots: int) -> None:
    falling = sorted(works, reverse=True)
    chosen, said = run_plan._assign_longest_first(falling, slots)
    assert said == end(falling, slots, chosen)
    assert said <= best(works, slots) * (4 / 3 - 1 / (3 * slots)) * (1 + 1e-9)


@settings(max_examples=100)
@given(works=durations, slots=slot_counts)
def test_nothing_beats_the_lower_bound(works: list[float], slots: int) -> None:
    bound = compute_lower_bound(works, slots)
    assert bound <= best(works, slots) * (1 + 1e-9)
    assert bound >= max(works)
    assert bound >= sum(works) / slots * (1 - 1e-9)


@pytest.mark.parametrize(("runs", "slots", "waves"), [(7, 2, 4), (7, 3, 3), (7, 7, 1), (7, 9, 1), (6, 3, 2), (0, 2, 0)])
def test_the_bound_of_equal_runs_is_their_waves(runs: int, slots: int, waves: int) -> None:
    assert compute_lower_bound([3.0] * runs, slots) == pytest.approx(3.0 * waves)


def test_the_bound_sees_waves_of_unequal_runs() -> None:
    # Of the three longest some slot takes two: 5 + 6, though the mean is 9.
    assert compute_lower_bound([7.0, 6.0, 5.0], 2) == 11.0
    assert end([7.0, 6.0, 5.0], 2, assign_slots([7.0, 6.0, 5.0], 2)) == 11.0


def test_the_search_finds_what_longest_first_misses() -> None:
    works = [3.0, 3.0, 2.0, 2.0, 2.0]
    assert run_plan._assign_longest_first(works, 2)[1] == 7.0
    assert end(works, 2, assign_slots(works, 2)) == 6.0


def test_a_hard_case_of_twelve_runs_ends_soon() -> None:
    works = [float(math.isqrt(10**12 * (97 + 31 * number))) for number in range(12)]
    for slots in (2, 3, 4, 5):
        chosen = assign_slots(works, slots)
        assert compute_lower_bound(works, slots) <= end(works, slots, chosen) <= run_plan._assign_longest_first(
            sorted(works, reverse=True), slots
        )[1]  # fmt: skip


def test_a_thousand_runs_are_near_the_bound() -> None:
    works = [float(1 + number * 7919 % 997) for number in range(1000)]
    assert end(works, 16, assign_slots(works, 16)) <= 1.01 * compute_lower_bound(works, 16)


def test_a_schedule_without_a_slot_is_refused() -> None:
    for ask in (compute_lower_bound, assign_slots):
        with pytest.raises(ValueError, match="slots: 0 is refused"):
            ask([1.0], 0)


# ------------------------------------------------------------------ in turn
@settings(max_examples=100)
@given(works=durations, slots=slot_counts)
def test_in_turn_with_one_worker_each_is_the_greedy_schedule(works: list[float], slots: int) -> None:
    falling = sorted(works, reverse=True)
    starts = compute_start_times(falling, [1] * len(falling), slots)
    assert max(s + w for s, w in zip(starts, falling, strict=True)) == run_plan._assign_longest_first(falling, slots)[1]


@settings(max_examples=150)
@given(
    runs=st.lists(st.tuples(st.integers(1, 20).map(float), st.integers(1, 3)), min_size=1, max_size=8),
    slots=st.integers(3, 5),
    at_once=st.one_of(st.none(), st.integers(1, 3)),
    busy=st.lists(st.tuples(st.integers(1, 20).map(float), st.integers(1, 2)), max_size=2),
)
def test_in_turn_never_uses_more_than_there_is(
    runs: list[tuple[float, int]], slots: int, at_once: int | None, busy: list[tuple[float, int]]
) -> None:
    starts = compute_start_times([d for d, _ in runs], [w for _, w in runs], slots, at_once, busy)
    assert starts == sorted(starts)
    spans = [(0.0, e, w) for e, w in busy] + [(s, s + d, w) for s, (d, w) in zip(starts, runs, strict=True)]
    for moment in starts:
        here = [width for begin, finish, width in spans if begin <= moment < finish]
        assert sum(here) <= slots
        assert at_once is None or len(here) <= max(at_once, len(busy))


def test_a_run_that_needs_more_than_there_is_waits_for_all_others() -> None:
    assert compute_start_times([5.0, 2.0], [1, 9], 2) == [0.0, 5.0]
    assert compute_start_times([2.0], [1], 1, busy=[(4.0, 1), (6.0, 1)]) == [6.0]
