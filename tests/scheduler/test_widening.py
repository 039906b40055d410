"""When it pays to stop a run so that it goes on with more workers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scheduler.run_plan import ScalingModel
from orchestrator.scheduler.widening import ActiveRun, choose_wider_runs, estimate_restarted_seconds, is_worth_widening

IDEAL = ScalingModel(launch_overhead=20, most_workers=8, serial_share=0.0)


@pytest.mark.parametrize(
    ("left", "workers", "wider", "serial_share", "worth"),
    [
        (1000, 1, 2, 0.0, True),  # 500 + 20 against 1000
        (81, 1, 2, 0.0, True),  # saves 20.5 of 81, as much again as the restart takes
        (79, 1, 2, 0.0, False),
        (39, 1, 2, 0.0, False),  # would end later
        (1000, 1, 2, 0.9, False),  # saves 30 of 1000: less than a tenth
        (1000, 1, 1, 0.0, False),
        (1000, 4, 5, 0.05, True),  # 1000 x 0.24 / 0.2875 + 20 = 855
        (0, 1, 2, 0.0, False),
    ],
)
def test_a_run_is_widened_where_it_saves_clearly(
    left: float, workers: int, wider: int, serial_share: float, worth: bool
) -> None:
    assert is_worth_widening(left, workers, wider, ScalingModel(20, 8, serial_share)) is worth


def test_a_free_restart_still_needs_a_gain() -> None:
    assert not is_worth_widening(0.0, 1, 2, ScalingModel(0.0, 2))
    assert is_worth_widening(1.0, 1, 2, ScalingModel(0.0, 2))


def test_the_last_run_gets_all_empty_slots() -> None:
    assert choose_wider_runs([ActiveRun("a", 1000, 1, 8)], 3, IDEAL) == {"a": 4}
    assert choose_wider_runs([ActiveRun("a", 1000, 1, 2)], 3, IDEAL) == {"a": 2}
    assert choose_wider_runs([ActiveRun("a", 1000, 1, 8)], 0, IDEAL) == {}
    assert choose_wider_runs([], 3, IDEAL) == {}


def test_slots_go_to_the_runs_that_would_end_last() -> None:
    runs = [ActiveRun("long", 1000, 1, 8), ActiveRun("short", 300, 1, 8)]
    assert choose_wider_runs(runs, 2, IDEAL) == {"long": 3}  # 353 s, still the last
    assert choose_wider_runs(runs, 3, IDEAL) == {"long": 4}  # 270 s
    assert choose_wider_runs([ActiveRun("a", 1000, 1, 8), ActiveRun("b", 900, 1, 8)], 2, IDEAL) == {"a": 2, "b": 2}


def test_nobody_is_stopped_when_the_last_run_cannot_have_more() -> None:
    assert choose_wider_runs([ActiveRun("stuck", 1000, 1, 1), ActiveRun("b", 900, 1, 8)], 2, IDEAL) == {}


def test_a_run_about_to_end_is_left_alone() -> None:
    assert choose_wider_runs([ActiveRun("a", 30, 1, 8)], 7, IDEAL) == {}


@given(
    lefts=st.lists(st.floats(0, 1e5), min_size=1, max_size=5),
    free=st.integers(0, 8),
    start=st.floats(0, 100),
    share=st.floats(0, 0.9),
)
def test_widening_uses_no_more_than_is_free_and_ends_no_later(
    lefts: list[float], free: int, start: float, share: float
) -> None:
    pace = ScalingModel(start, 4, share)
    runs = [ActiveRun(str(number), left, 1, 4) for number, left in enumerate(lefts)]
    found = choose_wider_runs(runs, free, pace)
    assert sum(workers - 1 for workers in found.values()) <= free
    assert all(2 <= workers <= 4 for workers in found.values())
    ends = [
        estimate_restarted_seconds(run.seconds_left, 1, found[run.name], pace)
        if run.name in found
        else run.seconds_left
        for run in runs
    ]
    assert max(ends) <= max(lefts)
