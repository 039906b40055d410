"""A sweep from its plan to its hand-over, in a session."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config import redaction
from orchestrator.config.fingerprint import compute_fingerprint
from orchestrator.config.overrides import flatten_config
from orchestrator.ray_backend import cluster, launch_errors
from orchestrator.ray_backend.lease import Lease
from orchestrator.ray_backend.run_lookup import SWEEP_FILE
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.recipe.config import Recipe
from orchestrator.scheduler.capacity import CapacityMonitor, count_slots
from orchestrator.storage import file_io, urls
from orchestrator.tracking.tracker import FinalStatus, TrackedRun
from orchestrator.tuning import ray_tune, samplers
from orchestrator.tuning.config import SearchConfig, TuneJob
from orchestrator.tuning.live_progress import SweepProgress
from orchestrator.tuning.space import Space
from orchestrator.tuning.sweep import STAGED_TRIALS, Sweep, SweepContext
from orchestrator.tuning.trial import State, Trial
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
    """What a sweep is; a pure function of command line, space and dataset."""

    job: TuneJob
    base: Recipe
    space: Space
    dataset_digest: str

    @property
    def name(self) -> str:
        """Name of the sweep and of its folder. Budgets are no part of it: more of one goes on."""
        # The space counts by its content, not by the name of its file. Names of older sweeps have interval_epochs.
        search = {**self.job.search.model_dump(exclude={"space"}), "interval_epochs": None}
        about = compute_fingerprint(self.base, self.space, search, self.dataset_digest, self.job.new)
        return f"{self.base.name}-sweep-{about}"


@dataclass(frozen=True)
class SweepResult:
    """What came of it."""

    plan: SweepPlan
    folder: str
    key: str
    trials: tuple[Trial, ...]
    stop_reason: str  # why no more was tried; empty when all that was asked for has been
    new_epochs: int  # trained by this command


def run_trials(session: Session, planned: SweepPlan, folder: str, key: str, held: Lease) -> SweepResult:
    """Train the trials that are not done; all of them. The caller holds the lease and has opened the run of `key`."""
    job, base = planned.job, planned.base
    destination = session.destination.model_copy(update={"storage": folder})

    def spec_of(recipe: Recipe) -> RunSpec:
        return RunSpec(
            recipe=recipe,
            placement=job.placement,
            destination=destination,
            cadence=job.cadence,
            dataset_digest=planned.dataset_digest,
            weights=job.weights and urls.require_absolute(job.weights, "weights"),
        )

    def query_slots() -> int:
        return count_slots(cluster.get_capacity(), job.placement, session.gpus)

    full = count_slots(session.capacity, job.placement, session.gpus)
    with CapacityMonitor(full, query_slots) as supply:
        terms = SweepContext(
            base=base,
            metric=job.search.metric,
            budget=job.budget,
            make_spec=spec_of,
            stop_flag=held.stop_flag,
            successor=held.successor,
            gpus=session.gpus,
            is_stop_requested=session.interruption.event.is_set,
            count_slots=lambda: _count_slots(supply.slots, job),
        )
        ledger = TrialStore(folder)
        entries = ledger.load_trials(lambda recipe: spec_of(recipe).folder)
        sampler = samplers.make_sampler(job.search.sampler, planned.space, base, job.search.metric, job.search.seed)
        sweep = Sweep(terms, ledger, entries, sampler, _TrialTracker(session, key))
        done = sum(entry.trial.is_terminal for entry in entries)
        before = f", {done} of {len(entries)} begun ones are done already" if entries else ""
        session.print_line(
            f"sweep {planned.name}: at most {job.budget.trials} trials, "
            f"{count_parallel_trials(session, job)} at once{before}"
        )
        with SweepProgress(lambda: sweep.trials, job.search.metric, session.console):
            scheduler = _make_scheduler(job.search, base)
            ray_tune.run_tuner(sweep, scheduler, job.placement, session.gpus, _get_max_failures(job))
    return SweepResult(planned, folder, key, sweep.trials, sweep.stop_reason, sweep.new_epochs)


def record_plan(session: Session, planned: SweepPlan, folder: str) -> str:
    """Write what the sweep is and open its run in the tracker; its key there."""
    about = {
        "base": planned.base.to_dict(),
        "space": planned.space.to_dict(),
        "search": planned.job.search.to_dict(),
        "dataset": session.manifest.name,
        "dataset_digest": planned.dataset_digest,
    }
    file_io.write_bytes(file_io.join(folder, SWEEP_FILE), json.dumps(about, indent=1).encode())
    key = session.make_tracking_key(planned.name)
    params = {f"search.{path}": str(value) for path, value in flatten_config(planned.job.search).items()}
    params |= {path: str(value) for path, value in flatten_config(planned.base).items()}
    session.record_parent_run(
        TrackedRun(key, planned.name, None, params, {"orchestrator.folder": redaction.redact(folder)})
    )
    return key


class _TrialTracker:
    """Every trial is a run of its own in the tracker, nested under the sweep's."""

    def __init__(self, session: Session, parent: str) -> None:
        self._session, self._parent = session, parent
        self._logged_states: dict[str, State] = {}

    def on_trial_added(self, spec: RunSpec) -> None:
        self._session.record_run(spec, self._parent)

    def on_trial_changed(self, trial: Trial, spec: RunSpec) -> None:
        if self._logged_states.get(spec.name) == trial.state or trial.state not in _TRACKER_STATUS:
            return
        self._logged_states[spec.name] = trial.state
        key = self._session.make_tracking_key(spec.name, self._parent)
        tags = {"orchestrator.trial": trial.state, "orchestrator.trial_reason": trial.reason}
        self._session.close_run(key, _TRACKER_STATUS[trial.state], {name: text for name, text in tags.items() if text})


def _get_max_failures(job: TuneJob) -> int:
    """How often an actor may fail; Ray Train restarts the workers of a trial that has several by itself."""
    return job.placement.max_restarts if job.placement.workers == 1 else 1


def count_parallel_trials(session: Session, job: TuneJob) -> int:
    """Trials at once. Raises launch_errors.ClusterError when the cluster holds fewer than were asked for."""
    holds = count_slots(session.capacity, job.placement, session.gpus) // job.placement.workers
    asked = job.placement.at_once
    if asked is not None and asked > max(1, holds):
        raise launch_errors.ClusterError(
            f"placement.at_once: {asked} is refused: the cluster holds {holds} trials of {job.placement.workers} "
            f"workers at once; lower it, or leave it out"
        )
    return asked or max(1, holds)


def _count_slots(workers: int, job: TuneJob) -> int:
    """Trials that the study may have in hand, now that the cluster holds so many workers."""
    holds = max(1, workers // job.placement.workers)
    asked = job.placement.at_once
    # One more than fit keeps the process of a trial that ends, unless it would find room to begin.
    fits = job.placement.workers > 1 or (asked is not None and asked < holds)
    return min(asked or holds, holds) - (STAGED_TRIALS if fits else 0)


def _make_scheduler(search: SearchConfig, base: Recipe) -> Any:
    if search.scheduler == "asha":
        return ray_tune.make_asha(base.epochs, search.get_grace_epochs(base), search.reduction)
    return (
        ray_tune.make_median_stopping(search.get_grace_epochs(base))
        if search.scheduler == "median"
        else ray_tune.make_fifo()
    )


def get_unfinished(trials: Sequence[Trial]) -> list[Trial]:
    """Those that could go on."""
    return [trial for trial in trials if not trial.is_terminal]
