"""Train several runs in a session: plan, supervise, show, record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from orchestrator.monitor.formatting import format_duration
from orchestrator.ray_backend import cluster, preflight
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.scheduler import estimate, run_plan
from orchestrator.scheduler.capacity import CapacityMonitor, make_slot_counter
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.estimate import Durations
from orchestrator.scheduler.progress import ProgressMonitor, ProgressTable
from orchestrator.scheduler.run_plan import RunPlan, ScalingModel
from orchestrator.scheduler.scheduler import ReplanFn, RunPhase, RunResult, WideningHooks, execute_plan
from orchestrator.tracking.tracker import FinalStatus
from orchestrator.training.run_dir import load_finished_outcome

_FINAL_STATUS: dict[RunPhase, FinalStatus] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class MultiRunResult:
    """How each run ended, by name, in the order asked; and what was seen of it."""

    results: dict[str, RunResult]
    progress: ProgressMonitor

    def list_runs(self, status: RunPhase) -> list[str]:
        """Names of the runs that ended so."""
        return [name for name, end in self.results.items() if end.status == status]


def train_runs(
    session: Session,
    specs: Sequence[RunSpec],
    parent: str | None = None,
    config: PlanConfig | None = None,
    stop_run: Callable[[RunSpec], None] | None = None,
    scored_images: int = 0,
) -> MultiRunResult:
    """Train every run that is not finished; each is recorded under the run of key `parent`.

    Returns when all ended, however they did. A run's failure is in the result, never raised.
    stop_run: asks one run to save and stop, the session going on; without it no run under way gets more workers.
    scored_images: of each run afterwards, on all crops, which the time left includes.
    """
    config = config or PlanConfig()
    done = {spec.name: outcome for spec in specs if (outcome := load_finished_outcome(spec.folder)) is not None}
    todo = [spec for spec in specs if spec.name not in done]
    board = ProgressMonitor(specs, scored_images)
    ended: dict[str, RunResult] = {}
    for spec in specs:
        if spec.name in done:
            session.set_final_status(session.record_run(spec, parent), "FINISHED")
            board.update_phase(spec, "finished", "before")
            ended[spec.name] = RunResult("finished", "", done[spec.name])
    board.poll(waiting=True)  # what earlier jobs did is known, and not told as news
    if done:
        session.print_line(f"{len(done)} of {len(specs)} models are trained already")
    if todo:
        planned, replan = _make_plan(session, specs, todo, board, config)
        tail = None
        if stop_run is not None and config.most_workers is not None:
            tail = WideningHooks(board.estimate_seconds_left, board.estimate_start_seconds, stop_run)
        ended |= _train_planned(session, planned, board, parent, tail, replan)
    return MultiRunResult({spec.name: ended[spec.name] for spec in specs}, board)


def _make_plan(
    session: Session, specs: Sequence[RunSpec], todo: Sequence[RunSpec], board: ProgressMonitor, config: PlanConfig
) -> tuple[RunPlan, ReplanFn]:
    """The plan of what is to be done, told; the board expects it. And how to plan again for other nodes."""
    expected = estimate.estimate_durations(specs, board.get_histories(), session.manifest, config)
    pace = estimate.make_scaling_model(config, expected.in_seconds)
    by_name = {spec.name: value for spec, value in zip(specs, expected.values, strict=True)}
    planned = run_plan.plan_runs(todo, session.capacity, session.gpus, [by_name[spec.name] for spec in todo], pace)
    in_order = Durations(tuple(by_name[spec.name] for spec in planned.order), expected.in_seconds)
    board.set_expected_durations(planned.order, in_order, estimate.make_scaling_model(config))
    waves = f" in {planned.num_waves} waves" if planned.num_waves > 1 else ""
    takes = f", about {format_duration(planned.makespan)}" if expected.in_seconds else ""
    session.print_line(f"training {len(planned.runs)} models, {planned.max_concurrent} at once{waves}{takes}")
    return planned, partial(_replan_runs, {spec.name: spec for spec in todo}, by_name, pace)


def _replan_runs(
    asked: Mapping[str, RunSpec],
    durations: Mapping[str, float],
    pace: ScalingModel,
    runs: Sequence[RunSpec],
    slots: int,
) -> Sequence[RunSpec]:
    """The order, and the workers, of runs that have not begun, on a cluster that holds so many workers now."""
    own = [asked[spec.name] for spec in runs]  # with the workers that their placement has
    return run_plan.plan_for_slots(own, slots, [durations[spec.name] for spec in runs], pace).order


def _train_planned(
    session: Session,
    planned: RunPlan,
    board: ProgressMonitor,
    parent: str | None,
    tail: WideningHooks | None,
    replan: ReplanFn,
) -> dict[str, RunResult]:
    def on_change(spec: RunSpec, status: RunPhase, message: str) -> None:
        board.update_phase(spec, status, message)
        if status in _FINAL_STATUS:
            session.set_final_status(session.make_run_key(spec, parent), _FINAL_STATUS[status])
        if message:
            session.print_line(f"{spec.name}: {status}: {message}")

    first = planned.order[0]
    warnings = (
        first.dataset_warning,
        preflight.check_label_mixing(first.destination.data, session.manifest, first.recipe),
        preflight.check_exclusive_create(first.destination),
    )
    for warning in filter(None, warnings):
        session.print_line(f"warning: {warning}")
    # A run alone takes what nodes there are by itself.
    look = make_slot_counter(cluster.get_capacity, first.placement, session.gpus) if len(planned.runs) > 1 else None

    def on_capacity(before: int, now: int) -> None:
        session.print_line(f"the cluster holds {now} workers now, {before} before")

    with (
        CapacityMonitor(planned.slots, look, on_capacity) as supply,
        ProgressTable(board, lambda: supply.slots, session.console),
    ):
        return execute_plan(
            planned,
            lambda spec: session.train_run(spec, parent),
            on_change,
            session.interruption.event,
            supply,
            tail,
            replan,
        )
