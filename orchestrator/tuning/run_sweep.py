"""The run of a sweep in a session: its plan, its trials, its entries in the tracker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.config.overrides import flatten_config
from orchestrator.ray_backend import cluster, launch_errors
from orchestrator.ray_backend.lease import Lease
from orchestrator.ray_backend.run_lookup import SWEEP_FILE
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.recipe.config import Recipe
from orchestrator.scheduler.run_plan import count_slots
from orchestrator.scheduler.scheduler import CapacityMonitor
from orchestrator.storage import file_io, urls
from orchestrator.tracking.tracker import FinalStatus, TrackedRun
from orchestrator.tuning import ray_tune, samplers
from orchestrator.tuning.config import SearchConfig, TuneJob
from orchestrator.tuning.live_progress import SweepProgress
from orchestrator.tuning.space import Space
from orchestrator.tuning.sweep import STAGED_TRIALS, Sweep, SweepContext
from orchestrator.tuning.trial import Metric, State, Trial
from orchestrator.tuning.trial_store import TrialStore

_TRACKER_STATUS: dict[State, FinalStatus] = {
    "finished": "FINISHED",
    "pruned": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "stopped": "KILLED",
}


@dataclass(frozen=True)
class SweepPlan:
    """The definition of a sweep: a pure function of command line, space and dataset."""

    job: TuneJob
    base: Recipe
    space: Space
    dataset_digest: str

    @property
    def metric(self) -> Metric:
        """The metric that trials are compared by."""
        return self.job.search.objective

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


@dataclass(frozen=True)
class SweepResult:
    """The trials of a sweep that has ended."""

    plan: SweepPlan
    folder: str
    key: str
    trials: tuple[Trial, ...]
    stop_reason: str  # why the sweep ended before all its trials did; else empty
    new_epochs: int  # trained by this command


def run_trials(session: Session, plan: SweepPlan, folder: str, key: str, lease: Lease) -> SweepResult:
    """Train the trials that are not done; return all. The caller holds the lease and has opened the run of `key`."""
    job, base = plan.job, plan.base
    destination = session.destination.model_copy(update={"storage": folder})

    def make_spec(recipe: Recipe) -> RunSpec:
        return RunSpec(
            recipe=recipe,
            placement=job.placement,
            destination=destination,
            cadence=job.cadence,
            dataset_digest=plan.dataset_digest,
            weights=job.weights and urls.require_absolute(job.weights, "weights"),
        )

    def query_slots() -> int:
        return count_slots(cluster.get_capacity(), job.placement, session.gpus)

    full = count_slots(session.capacity, job.placement, session.gpus)
    tracked = _TrialTracker(session, key)
    with CapacityMonitor(full, query_slots) as supply:
        context = SweepContext(
            base=base,
            metric=plan.metric,
            budget=job.budget,
            make_spec=make_spec,
            stop_flag=lease.stop_flag,
            successor=lease.successor,
            gpus=session.gpus,
            is_stop_requested=session.interruption.event.is_set,
            count_slots=lambda: _count_slots(supply.slots, job),
            on_trial_added=tracked.add_trial,
            on_trial_changed=tracked.update_trial,
        )
        store = TrialStore(folder)
        entries = store.load_trials(lambda recipe: make_spec(recipe).folder)
        sampler = samplers.make_sampler(job.search.sampler, plan.space, base, plan.metric, job.search.seed)
        sweep = Sweep(context, store, entries, sampler)
        done = sum(entry.trial.is_terminal for entry in entries)
        progress = f", {done} of {len(entries)} begun ones are done already" if entries else ""
        session.print_line(
            f"sweep {plan.name}: at most {job.budget.trials} trials, "
            f"{count_parallel_trials(session, job)} in parallel{progress}"
        )
        with SweepProgress(lambda: sweep.trials, plan.metric, session.console):
            scheduler = _make_scheduler(job.search, base)
            ray_tune.run_tuner(sweep, scheduler, job.placement, session.gpus, _get_max_failures(job))
    return SweepResult(plan, folder, key, sweep.trials, sweep.stop_reason, sweep.new_epochs)


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


class _TrialTracker:
    """Trials as runs of their own in the tracker, nested under the sweep's."""

    def __init__(self, session: Session, parent: str) -> None:
        self._session, self._parent = session, parent
        self._logged_states: dict[str, State] = {}

    def add_trial(self, spec: RunSpec) -> None:
        self._session.recorder.record_run(spec, self._parent)

    def update_trial(self, trial: Trial, spec: RunSpec) -> None:
        if self._logged_states.get(spec.name) == trial.state or trial.state not in _TRACKER_STATUS:
            return
        self._logged_states[spec.name] = trial.state
        key = self._session.recorder.make_tracking_key(spec.name, self._parent)
        tags = {"orchestrator.trial": trial.state, "orchestrator.trial_reason": trial.reason}
        self._session.recorder.close_run(
            key, _TRACKER_STATUS[trial.state], {name: text for name, text in tags.items() if text}
        )


def _get_max_failures(job: TuneJob) -> int:
    """Return how often an actor may fail; with several workers Ray Train restarts them by itself."""
    return job.placement.max_restarts if job.placement.workers == 1 else 1


def count_parallel_trials(session: Session, job: TuneJob) -> int:
    """Return how many trials run at the same time. Raises ClusterError when the cluster holds fewer than requested."""
    capacity = count_slots(session.capacity, job.placement, session.gpus) // job.placement.workers
    requested = job.placement.at_once
    if requested is not None and requested > max(1, capacity):
        raise launch_errors.ClusterError(
            f"placement.at_once must be at most {max(1, capacity)}, the trials of {job.placement.workers} workers that "
            f"fit on the cluster, got {requested}; set a lower one, or leave it out"
        )
    return requested or max(1, capacity)


def _count_slots(workers: int, job: TuneJob) -> int:
    """Return how many trials Tune may hold, now that the cluster holds so many workers."""
    capacity = max(1, workers // job.placement.workers)
    requested = job.placement.at_once
    # The staged trial keeps the process of one that ends; none is staged where it would find room to begin.
    would_begin = job.placement.workers > 1 or (requested is not None and requested < capacity)
    return min(requested or capacity, capacity) - (STAGED_TRIALS if would_begin else 0)


def _make_scheduler(search: SearchConfig, base: Recipe) -> Any:
    grace = search.get_grace_epochs(base)
    if search.scheduler == "asha":
        return ray_tune.make_asha(base.epochs, grace, search.reduction)
    return ray_tune.make_median_stopping(grace) if search.scheduler == "median" else ray_tune.make_fifo()


def get_unfinished(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that can resume."""
    return [trial for trial in trials if not trial.is_terminal]
