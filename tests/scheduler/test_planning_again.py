"""Nodes that come and go while runs wait for their turn: what has not begun is planned anew."""

import threading
from collections.abc import Sequence

import pytest

from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler import capacity, multi_run, run_plan, scheduler
from orchestrator.scheduler.capacity import CapacityMonitor
from orchestrator.scheduler.run_plan import ScalingModel
from orchestrator.scheduler.scheduler import RunResult, execute_plan
from tests.scheduler.test_scheduler import Launcher, Seen, planned, released
from tests.support.launched import recipe, spec, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(capacity, "POLL_SECONDS", 0.02)


def test_who_has_not_begun_gets_another_order_and_other_workers() -> None:
    launcher, there, asked = Launcher(), [1], list[tuple[list[str], int]]()
    names = [f"r{number}" for number in range(4)]
    specs = [spec(recipe(name)) for name in names]

    def replan(runs: Sequence[RunSpec], slots: int) -> Sequence[RunSpec]:
        asked.append(([run.recipe.name for run in runs], slots))
        if slots < 1:
            raise ValueError("nothing fits")
        return [run_plan.replace_workers(run, 2) for run in reversed(runs)]

    result: list[dict[str, RunResult]] = []

    def work() -> None:
        made = planned(specs, 1)
        result.append(execute_plan(made, launcher, Seen(), threading.Event(), now, replan=replan))

    with released(launcher, names) as go, CapacityMonitor(1, lambda: there[0]) as now:
        threading.Thread(target=work, daemon=True).start()
        until(lambda: launcher.under_way == 1)
        there[0] = 0
        until(lambda: len(asked) == 1)
        there[0] = 9
        until(lambda: launcher.under_way == 4)
        go.set()
        until(lambda: bool(result))
    assert asked == [(["r1", "r2", "r3"], 0), (["r1", "r2", "r3"], 9)], (
        "not the one under way, and once for each change"
    )
    assert (launcher.calls, launcher.workers) == (["r0", "r3", "r2", "r1"], [1, 2, 2, 2])
    assert {end.status for end in result[0].values()} == {"finished"}


def test_nobody_is_asked_while_nothing_changes() -> None:
    def never(runs: Sequence[RunSpec], slots: int) -> Sequence[RunSpec]:
        raise AssertionError(slots)

    ended = execute_plan(planned([spec(recipe("a"))], 1), Launcher(), Seen(), threading.Event(), replan=never)
    assert {end.status for end in ended.values()} == {"finished"}


def test_more_nodes_widen_where_all_end_sooner_and_fewer_do_not() -> None:
    asked = {run.name: run for run in (spec(recipe("long")), spec(recipe("short")))}
    long, short = asked
    durations = {long: 100.0, short: 40.0}
    pace = ScalingModel(launch_overhead=1.0, most_workers=4)
    wide = multi_run._replan_runs(asked, durations, pace, [asked[short], asked[long]], 6)
    assert [(run.name, run.placement.workers) for run in wide] == [(long, 4), (short, 2)]
    narrow = multi_run._replan_runs(asked, durations, pace, wide, 1)
    assert [(run.name, run.placement.workers) for run in narrow] == [(long, 1), (short, 1)]
    assert [run.name for run in multi_run._replan_runs(asked, durations, ScalingModel(), wide, 2)] == [long, short]
    with pytest.raises(ValueError, match="not one run fits"):
        multi_run._replan_runs(asked, durations, pace, wide, 0)
