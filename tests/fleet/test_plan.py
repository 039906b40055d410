from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fleet.plan import Plan, plan, work
from orchestrator.launch.cluster import Capacity, Node
from orchestrator.launch.config import RunSpec
from tests.support.launched import recipe, spec, wide


def runs(epochs: list[int], **placement: Any) -> list[RunSpec]:
    return [spec(wide(f"run-{number}", length, 0.1), **placement) for number, length in enumerate(epochs)]


def best(works: list[float], slots: int) -> float:
    """The least makespan of all assignments."""
    found = sum(works)
    for chosen in product(range(slots), repeat=len(works)):
        ends = [0.0] * slots
        for amount, slot in zip(works, chosen, strict=True):
            ends[slot] += amount
        found = min(found, max(ends))
    return found


@given(epochs=st.lists(st.integers(1, 30), min_size=2, max_size=6), slots=st.integers(1, 4))
def test_no_plan_takes_longer_than_four_thirds_of_the_best(epochs: list[int], slots: int) -> None:
    made = plan(runs(epochs), Capacity((Node(slots, 0),)), 0)
    works = [work(run) for run in made.order]
    optimum = best(works, made.at_once)
    assert optimum * (1 - 1e-9) <= made.makespan <= optimum * (4 / 3) * (1 + 1e-9)
    assert works == sorted(works, reverse=True)
    assert sorted(run.name for run in made.order) == sorted(run.name for run in runs(epochs))
    assert made.at_once == min(slots, len(epochs))


@pytest.mark.parametrize(
    ("placement", "capacity", "gpus", "at_once"),
    [
        ({}, Capacity((Node(4, 0),)), 0, 4),
        ({}, Capacity((Node(100, 0),)), 0, 7),
        ({"at_once": 2}, Capacity((Node(4, 0),)), 0, 2),
        ({"at_once": 9}, Capacity((Node(4, 0),)), 0, 4),
        ({"workers": 2}, Capacity((Node(5, 0),)), 0, 2),
        ({"workers": 2}, Capacity((Node(1, 0), Node(1, 0), Node(1, 0))), 0, 1),
        ({"workers": 2, "cpus_per_worker": 3}, Capacity((Node(4, 0), Node(12, 0))), 0, 2),
        ({}, Capacity((Node(64, 0), Node(8, 3))), 1, 3),
    ],
)
def test_as_many_run_at_once_as_fit_and_are_allowed(
    placement: dict[str, int], capacity: Capacity, gpus: float, at_once: int
) -> None:
    assert plan(runs([1] * 7, **placement), capacity, gpus).at_once == at_once


def test_what_does_not_fit_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"placement\.workers: 3 is refused"):
        plan(runs([1], workers=3), Capacity((Node(2, 0),)), 0)
    with pytest.raises(ValueError, match="no run to plan"):
        plan([], Capacity((Node(2, 0),)), 0)


def test_only_a_run_alone_may_have_a_number_of_workers_that_changes() -> None:
    capacity = Capacity((Node(1, 0), Node(1, 0)))
    alone, other = (spec(recipe(name), workers=3, min_workers=2) for name in ("one", "two"))
    assert plan([alone], capacity, 0).at_once == 1
    with pytest.raises(ValueError, match=r"placement\.min_workers 2 is refused: only a run alone on its cluster"):
        plan([alone, other], capacity, 0)


def test_work_grows_with_epochs_width_and_pixels() -> None:
    base = spec(wide("a", 10, 0.2))
    assert work(spec(wide("a", 20, 0.2))) == pytest.approx(2 * work(base))
    # Filters on both sides, but for the first row; and heads, whose linear layers do not grow with the image.
    assert 3 < work(spec(wide("a", 10, 0.4))) / work(base) < 4.2
    larger = recipe(model={"kind": "googlenet", "image_size": 64, "width": 0.2}, epochs=10)
    assert 3 < work(spec(larger)) / work(base) < 4.2


def test_work_is_known_for_networks_without_a_width() -> None:
    small, large = (
        spec(recipe(kind, epochs=1, model={"kind": kind, "image_size": 64})) for kind in ("alexnet", "vgg-16")
    )
    assert work(large) > 10 * work(small)


def test_the_wide_member_of_the_paper_starts_first() -> None:
    members = [spec(wide(f"m{n}", 2, 0.1)) for n in range(6)] + [spec(wide("m7-wide", 2, 0.125))]
    made = plan(members, Capacity((Node(2, 0),)), 0)
    assert isinstance(made, Plan)
    assert made.order[0].recipe.name == "m7-wide"
    assert [run.recipe.name for run in made.order[1:]] == [f"m{n}" for n in range(6)]
