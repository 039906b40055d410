"""Train several runs in a session: plan, schedule, show, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.monitor.formatting import format_duration
from orchestrator.ray_backend import cluster
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.scheduler import run_plan
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.progress import ProgressMonitor, ProgressTable
from orchestrator.scheduler.run_plan import RunPlan, count_slots
from orchestrator.scheduler.scheduler import CapacityMonitor, RunPhase, RunResult, Scheduler
from orchestrator.storage import file_io
from orchestrator.tracking.tracker import FinalStatus
from orchestrator.training.run_dir import load_finished_outcome

_FINAL_STATUS: dict[RunPhase, FinalStatus] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class MultiRunResult:
    """Results by name, in the order asked, and the progress that was observed."""

    results: dict[str, RunResult]
    progress: ProgressMonitor


def train_runs(
    session: Session,
    specs: Sequence[RunSpec],
    parent: str | None = None,
    config: PlanConfig | None = None,
    scored_images: int = 0,
) -> MultiRunResult:
    """Train every run that is not finished; each is recorded under the run of key `parent`.

    Returns when all ended, with whatever result. A run's failure is in the result, never raised.
    scored_images: of each run afterwards, on all crops, which the time left includes.
    """
    done = {spec.name: outcome for spec in specs if (outcome := load_finished_outcome(spec.folder)) is not None}
    config = config or PlanConfig()
    progress = ProgressMonitor(specs, scored_images, session.manifest, config)
    results: dict[str, RunResult] = {}
    for spec in specs:
        if spec.name in done:
            session.recorder.set_final_status(session.recorder.record_run(spec, parent), "FINISHED")
            progress.update_phase(spec, "finished")
            results[spec.name] = RunResult("finished", "", done[spec.name])
    progress.poll(waiting=True)  # the events of earlier jobs are no news
    if done:
        session.print_line(f"{len(done)} of {len(specs)} models are trained already")
    if len(done) < len(specs):
        plan = run_plan.plan_unfinished(
            specs, progress.get_histories(), session.manifest, config, session.capacity, session.gpus
        )
        num_waves = -(-len(plan.runs) // plan.max_concurrent)
        waves = f" in {num_waves} waves" if num_waves > 1 else ""
        takes = f", about {format_duration(plan.makespan)}" if plan.in_seconds else ""
        session.print_line(f"training {len(plan.runs)} models, {plan.max_concurrent} at a time{waves}{takes}")
        results |= _execute_plan(session, plan, progress, parent)
    return MultiRunResult({spec.name: results[spec.name] for spec in specs}, progress)


def _execute_plan(
    session: Session, plan: RunPlan, progress: ProgressMonitor, parent: str | None
) -> dict[str, RunResult]:
    def on_change(spec: RunSpec, status: RunPhase, message: str) -> None:
        progress.update_phase(spec, status)
        if status in _FINAL_STATUS:
            session.recorder.set_final_status(session.recorder.make_run_key(spec, parent), _FINAL_STATUS[status])
        if message:
            session.print_line(f"{spec.name}: {status}: {message}")

    def on_capacity(before: int, now: int) -> None:
        session.print_line(f"the cluster holds {now} workers now, {before} before")

    first = plan.order[0]
    if (problem := file_io.find_conditional_create_problem(first.destination.storage)) is not None:
        session.print_line(f"warning: storage: {problem}")
    if first.dataset_warning:
        session.print_line(f"warning: {first.dataset_warning}")

    def query_slots() -> int:
        # A single run needs no free slots counted: Ray has it wait for nodes.
        return count_slots(cluster.get_capacity(), first.placement, session.gpus) if len(plan.runs) > 1 else plan.slots

    with (
        CapacityMonitor(plan.slots, query_slots, on_capacity) as capacity,
        ProgressTable(progress, lambda: capacity.slots, session.console),
    ):
        stop = session.interruption.event
        return Scheduler(plan, lambda spec: session.train_run(spec, parent), on_change, stop, capacity).run()
