"""The run of a sweep in a session: its plan, its trials, its progress, its entries in the tracker."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.config.json_text import parse_object
from orchestrator.config.overrides import flatten_config
from orchestrator.ray_backend import cluster, launch_errors
from orchestrator.ray_backend.lease import Lease
from orchestrator.ray_backend.run_lookup import SWEEP_FILE, SWEEPS, choose_code
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.recipe.config import Recipe, is_same_but_for_code
from orchestrator.scheduler.run_plan import count_slots
from orchestrator.scheduler.scheduler import CapacityMonitor
from orchestrator.storage import file_io
from orchestrator.tracking.tracker import FinalStatus, TrackedRun
from orchestrator.tuning import ray_tune, trial_store
from orchestrator.tuning.config import TuneJob
from orchestrator.tuning.samplers import Sampler
from orchestrator.tuning.space import Space
from orchestrator.tuning.sweep import STAGED_TRIALS, Sweep, SweepContext
from orchestrator.tuning.trial import Metric, State, Trial, TrialTask, format_assignment, make_short_names

# Of other ends: FAILED.
_TRACKER_STATUS: dict[State, FinalStatus] = {"finished": "FINISHED", "pruned": "FINISHED", "stopped": "KILLED"}


@dataclass(frozen=True)
class SweepPlan:
    """The definition of a sweep: a pure function of command line, space and dataset.

    The code of the base names that of the plug-ins in the space, too.
    """

    job: TuneJob
    base: Recipe
    space: Space
    dataset_digest: str

    @property
    def metric(self) -> Metric:
        """The metric that trials are compared by."""
        return Metric(name=self.job.search.metric, maximize=self.job.search.mode == "max")

    @property
    def name(self) -> str:
        """The name of the sweep and of its folder, which budgets leave alone."""
        # The space counts by its content, not by the name of its file. Sweeps of older versions had interval_epochs,
        # and no mode, which is "min" for the errors.
        search = {**self.job.search.model_dump(exclude={"space", "mode"}), "interval_epochs": None}
        if self.metric.maximize:
            search["mode"] = "max"
        digest = compute_fingerprint(self.base, self.space, search, self.dataset_digest, self.job.new)
        return f"{self.base.name}-sweep-{digest}"

    def make_sampler(self) -> Sampler:
        """Return the sampler of its trials."""
        search = self.job.search
        return Sampler(search.sampler, self.space, self.base, self.metric, search.seed)

    def make_spec(self, session: Session, folder: str, recipe: Recipe) -> RunSpec:
        """Return the run of a recipe in the folder of the sweep."""
        # The name of the sweep has its generation; the recipe is a trial's, not one from a file.
        job = self.job.model_copy(update={"new": 0, "provenance": None})
        destination = session.destination.model_copy(update={"storage": folder})
        return job.build_run_spec(recipe, destination, self.dataset_digest)


@dataclass(frozen=True)
class SweepResult:
    """The trials of a sweep that has ended."""

    plan: SweepPlan
    folder: str
    key: str
    trials: tuple[Trial, ...]
    stop_reason: str  # why the sweep ended before all its trials did; else empty


def match_code(plan: SweepPlan, storage: str, say: Callable[[str], None]) -> SweepPlan:
    """Return the plan; with `same_code_anyway` that of a sweep that began with other code of its plug-ins, if any.

    Either way `say` receives a line. Raises ConfigError when several sweeps differ in nothing but such code.
    """
    names = file_io.list_names(file_io.join(storage, SWEEPS)) if plan.base.code else []
    if plan.name in names:
        return plan
    others: dict[str, SweepPlan] = {}
    for name in sorted(name for name in names if name.startswith(f"{plan.base.name}-sweep-")):
        try:
            record = parse_object(file_io.read_bytes(file_io.join(storage, SWEEPS, name, SWEEP_FILE)))
            other = replace(plan, base=Recipe.from_dict(record.get("base", {})))
        except (FileNotFoundError, ValueError):
            continue
        if other.name == name and is_same_but_for_code(other.base, plan.base):
            others[name] = other
    bases = {name: other.base for name, other in others.items()}
    resumes = others and choose_code(plan.name, plan.base, bases, plan.job.same_code_anyway, say)
    return next(iter(others.values())) if resumes else plan


def record_plan(session: Session, plan: SweepPlan, folder: str) -> str:
    """Write the definition of the sweep and open its run in the tracker; return the run's key there."""
    about = {
        "base": plan.base.to_dict(),
        "space": plan.space.to_dict(),
        "search": plan.job.search.to_dict(),
        "dataset": session.manifest.name,
        "dataset_digest": plan.dataset_digest,
    }
    file_io.write_bytes(file_io.join(folder, SWEEP_FILE), json.dumps(about, indent=1).encode())
    key = session.recorder.make_tracking_key(plan.name)
    params = {f"search.{path}": str(value) for path, value in flatten_config(plan.job.search).items()}
    params |= {path: str(value) for path, value in flatten_config(plan.base).items()}
    session.recorder.record_parent_run(
        TrackedRun(key, plan.name, None, params, {"orchestrator.folder": redaction.redact(folder)})
    )
    return key


def run_trials(session: Session, plan: SweepPlan, folder: str, key: str, lease: Lease) -> SweepResult:
    """Train the trials that are not done; return all. The caller holds the lease and has opened the run of `key`."""
    job, runs = plan.job, _TrialRuns(session, plan, folder, key, lease)
    stored = trial_store.load_trials(folder, lambda recipe: plan.make_spec(session, folder, recipe).folder)
    for trial in stored:
        runs.record(trial)
        if trial.is_terminal:
            runs.close(trial)
    done = sum(trial.is_terminal for trial in stored)
    progress = f", {done} of {len(stored)} begun ones are done already" if stored else ""
    parallel = count_parallel_trials(session, job)
    session.print_line(f"sweep {plan.name}: at most {job.budget.trials} trials, {parallel} in parallel{progress}")
    full = count_slots(session.capacity, job.placement, session.gpus)
    with CapacityMonitor(full, lambda: count_slots(cluster.get_capacity(), job.placement, session.gpus)) as supply:
        context = SweepContext(
            folder=folder,
            base=plan.base,
            metric=plan.metric,
            budget=job.budget,
            suggest=plan.make_sampler().suggest,
            make_task=runs.make_task,
            count_slots=lambda: _count_slots(supply.slots, job),
            is_stop_requested=session.interruption.event.is_set,
            on_trial_added=runs.record,
            on_trial_ended=runs.report_end,
        )
        sweep = Sweep(context, stored)
        scheduler = ray_tune.make_scheduler(sweep, job.search, plan.base)
        ray_tune.run_tuner(sweep, scheduler, job.placement, session.gpus)
    return SweepResult(plan, folder, key, sweep.trials, sweep.stop_reason)


@dataclass(frozen=True)
class _TrialRuns:
    """The runs of the trials, in the tracker nested under the sweep's."""

    session: Session
    plan: SweepPlan
    folder: str
    key: str
    lease: Lease

    def make_spec(self, trial: Trial) -> RunSpec:
        return self.plan.make_spec(self.session, self.folder, trial.recipe)

    def make_task(self, trial: Trial) -> TrialTask:
        return TrialTask(
            number=trial.number,
            spec=self.make_spec(trial).redact_tracking(),
            metric=self.plan.metric,
            stop_flag=self.lease.stop_flag,
            successor=self.lease.successor,
            gpus=self.session.gpus,
            ended=trial.is_terminal,
        )

    def record(self, trial: Trial) -> None:
        self.session.recorder.record_run(self.make_spec(trial), self.key)

    def report_end(self, trial: Trial) -> None:
        self.session.print_line(format_end(trial, self.plan.metric))
        self.close(trial)

    def close(self, trial: Trial) -> None:
        tags = {"orchestrator.trial": trial.state, "orchestrator.trial_reason": trial.reason}
        self.session.recorder.close_run(
            self.session.recorder.make_run_key(self.make_spec(trial), self.key),
            _TRACKER_STATUS.get(trial.state, "FAILED"),
            {name: text for name, text in tags.items() if text},
        )


def format_end(trial: Trial, metric: Metric) -> str:
    """Return a line about a trial that has ended."""
    score = metric.format_score(trial.get_score(metric), unit=True)
    why = f": {trial.reason}" if trial.reason and trial.state not in ("finished", "pruned") else ""
    return (
        f"{trial.name}: {trial.state} after {trial.trained_epochs} of {trial.recipe.epochs} epochs, {metric.label} "
        f"{score} ({format_assignment(trial.assignment, make_short_names([trial]))}){why}"
    )


def count_parallel_trials(session: Session, job: TuneJob) -> int:
    """Return how many trials run at the same time. Raises ClusterError when the cluster holds fewer than requested."""
    capacity = max(1, count_slots(session.capacity, job.placement, session.gpus) // job.placement.workers)
    requested = job.placement.at_once
    if requested is not None and requested > capacity:
        raise launch_errors.ClusterError(
            f"placement.at_once must be at most {capacity}, the trials of {job.placement.workers} workers that "
            f"fit on the cluster, got {requested}; set a lower one, or leave it out"
        )
    return requested or capacity


def _count_slots(workers: int, job: TuneJob) -> int:
    """Return how many trials Tune may hold, now that the cluster holds so many workers."""
    capacity = max(1, workers // job.placement.workers)
    requested = job.placement.at_once
    # The staged trial keeps the process of one that ends; none is staged where it would find room to begin.
    would_begin = job.placement.workers > 1 or (requested is not None and requested < capacity)
    return min(requested or capacity, capacity) - (STAGED_TRIALS if would_begin else 0)
