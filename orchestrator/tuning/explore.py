"""A sweep from its plan to its hand-over, in a session."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from orchestrator.checkpoint import places
from orchestrator.config.fingerprint import fingerprint
from orchestrator.config.overrides import paths
from orchestrator.data import order
from orchestrator.fleet import plan
from orchestrator.fleet.supply import Supply, looking
from orchestrator.launch import cluster
from orchestrator.launch.config import RunSpec
from orchestrator.launch.lease import Lease
from orchestrator.launch.named import SWEEP
from orchestrator.launch.session import Session
from orchestrator.recipe.config import Recipe
from orchestrator.storage import files, urls
from orchestrator.tracking.tracker import FinalStatus, TrackedRun
from orchestrator.training.job import Cadence, checkpoints_of, marks_of
from orchestrator.tuning import samplers, sharing, study
from orchestrator.tuning.board import Board
from orchestrator.tuning.config import SearchConfig, TuneJob
from orchestrator.tuning.ledger import Ledger, Origin
from orchestrator.tuning.population import Exploiting
from orchestrator.tuning.space import Space, grid, recipe_of
from orchestrator.tuning.sweep import STAGED, Sweep, Terms
from orchestrator.tuning.trials import State, Trial

SAVED_SECONDS = 15.0  # for a checkpoint that was begun with the epoch that ends at a meeting

_STATUS: dict[State, FinalStatus] = {
    "finished": "FINISHED",
    "pruned": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "stopped": "KILLED",
}


@dataclass(frozen=True)
class Plan:
    """What a sweep is; a pure function of command line, space and dataset."""

    job: TuneJob
    base: Recipe
    space: Space
    dataset_digest: str

    @property
    def name(self) -> str:
        """Name of the sweep and of its folder. Budgets are no part of it: more of one goes on."""
        # The space counts by its content, not by the name of its file; sharing changes no result.
        search = self.job.search.model_dump(exclude={"space", "share_prefixes"})
        about = fingerprint(self.base, self.space, search, self.dataset_digest, self.job.new)
        return f"{self.base.name}-sweep-{about}"


@dataclass(frozen=True)
class Explored:
    """What came of it."""

    plan: Plan
    folder: str
    key: str
    trials: tuple[Trial, ...]
    enough: str  # why no more was tried; empty when all that was asked for has been
    new_epochs: int  # trained by this command


def run(session: Session, planned: Plan, folder: str, key: str, held: Lease) -> Explored:
    """Train the trials that are not done; all of them. The caller holds the lease and has opened the run of `key`."""
    job, base = planned.job, planned.base
    destination = session.destination.model_copy(update={"storage": folder})
    cadence = _cadence(planned, session)
    epoch_samples = _epoch_samples(planned, session)
    shared = sharing.Sharing(_listed(planned), base)

    def spec_of(recipe: Recipe) -> RunSpec:
        marks = tuple(epoch * epoch_samples for epoch in shared.marks(recipe))
        return RunSpec(
            recipe=recipe, placement=job.placement, destination=destination,
            cadence=cadence.model_copy(update={"marks": marks}),
            dataset_digest=planned.dataset_digest, weights=job.weights and urls.absolute(job.weights, "weights"),
        )  # fmt: skip

    look = looking(cluster.capacity, job.placement, session.gpus)
    full = plan.slots(session.capacity, job.placement, session.gpus)
    with Supply(full, look) as supply:
        terms = Terms(
            base=base, metric=job.search.metric, budget=job.budget, spec_of=spec_of, stop_flag=held.stop_flag,
            successor=held.successor, gpus=session.gpus, stopped=session.interruption.event.is_set,
            slots=lambda: _slots(supply.slots, job), origin_of=partial(_origin, shared, spec_of, epoch_samples),
        )  # fmt: skip
        ledger = Ledger(folder)
        entries = ledger.read(lambda recipe: spec_of(recipe).folder)
        sampler = samplers.make(job.search.sampler, planned.space, base, job.search.metric, job.search.seed)
        sweep = Sweep(terms, ledger, entries, sampler, _Recorded(session, key), _population(job, spec_of))
        done = sum(entry.trial.done for entry in entries)
        before = f", {done} of {len(entries)} begun ones are done already" if entries else ""
        session.say(
            f"sweep {planned.name}: at most {job.budget.trials} trials, {at_once(session, job)} at once{before}"
        )
        with Board(lambda: sweep.trials, job.search.metric, session.console):
            scheduler = _scheduler(job.search, base)
            study.run(sweep, scheduler, job.placement, session.gpus, _retries(job))
    return Explored(planned, folder, key, sweep.trials, sweep.enough, sweep.new_epochs)


def record_plan(session: Session, planned: Plan, folder: str) -> str:
    """Write what the sweep is and open its run in the tracker; its key there."""
    about = {
        "base": planned.base.to_dict(),
        "space": planned.space.to_dict(),
        "search": planned.job.search.to_dict(),
        "dataset": session.manifest.name,
        "dataset_digest": planned.dataset_digest,
    }
    files.write_bytes(files.join(folder, SWEEP), json.dumps(about, indent=1).encode())
    key = session.key(planned.name)
    params = {f"search.{path}": str(value) for path, value in paths(planned.job.search).items()}
    params |= {path: str(value) for path, value in paths(planned.base).items()}
    session.opened_run(TrackedRun(key, planned.name, None, params, {"orchestrator.folder": urls.redact(folder)}))
    return key


class _Recorded:
    """Every trial is a run of its own in the tracker, nested under the sweep's."""

    def __init__(self, session: Session, parent: str) -> None:
        self._session, self._parent = session, parent
        self._told: dict[str, State] = {}

    def added(self, spec: RunSpec) -> None:
        self._session.follow(spec, self._parent)

    def changed(self, trial: Trial, spec: RunSpec) -> None:
        if self._told.get(spec.name) == trial.state or trial.state not in _STATUS:
            return
        self._told[spec.name] = trial.state
        key = self._session.key(spec.name, self._parent)
        tags = {"orchestrator.trial": trial.state, "orchestrator.trial_reason": trial.reason}
        self._session.ended_run(key, _STATUS[trial.state], {name: text for name, text in tags.items() if text})


def _retries(job: TuneJob) -> int:
    """How often an actor may fail; Ray Train restarts the workers of a trial that has several by itself."""
    return job.placement.max_restarts if job.placement.workers == 1 else 1


def at_once(session: Session, job: TuneJob) -> int:
    """Trials at once. Raises cluster.ClusterError when the cluster holds fewer than were asked for."""
    holds = plan.slots(session.capacity, job.placement, session.gpus) // job.placement.workers
    asked = job.placement.at_once
    if asked is not None and asked > max(1, holds):
        raise cluster.ClusterError(
            f"placement.at_once: {asked} is refused: the cluster holds {holds} trials of {job.placement.workers} "
            f"workers at once; lower it, or leave it out"
        )
    return asked or max(1, holds)


def _slots(workers: int, job: TuneJob) -> int:
    """Trials that the study may have in hand, now that the cluster holds so many workers."""
    holds = max(1, workers // job.placement.workers)
    asked = job.placement.at_once
    # One more than fit keeps the process of a trial that ends, unless it would find room to begin.
    fits = job.placement.workers > 1 or (asked is not None and asked < holds)
    return min(asked or holds, holds) - (STAGED if fits else 0)


def _cadence(planned: Plan, session: Session) -> Cadence:
    """How often trials save: those of a population at each of its looks, and they keep it all."""
    job = planned.job
    if job.search.scheduler != "pbt":
        return job.cadence
    interval = job.search.interval(planned.base.epochs)
    return job.cadence.model_copy(
        update={
            "checkpoint_samples": interval * _epoch_samples(planned, session),
            "keep_checkpoints": max(job.cadence.keep_checkpoints, planned.base.epochs // interval + 2),
        }
    )


def _epoch_samples(planned: Plan, session: Session) -> int:
    steps = order.steps_per_epoch(session.manifest.samples("train"), planned.base.batch_size)
    return steps * planned.base.batch_size


def _listed(planned: Plan) -> list[Recipe]:
    """The recipes of all trials, where that is known before any was tried and they may share their training."""
    search = planned.job.search
    if search.sampler != "grid" or search.scheduler == "pbt" or not search.share_prefixes:
        return []
    found = grid(planned.space, planned.base)[: planned.job.budget.trials]
    return [recipe_of(planned.base, assignment) for assignment in found]


def _origin(
    shared: sharing.Sharing, spec_of: Callable[[Recipe], RunSpec], epoch_samples: int, recipe: Recipe,
    trials: Sequence[Trial],
) -> Origin | None:  # fmt: skip
    """What a new trial may begin with: a checkpoint that an earlier one has kept."""
    for trial, epoch in shared.origins(recipe, trials):
        samples = epoch * epoch_samples
        kept = places.committed(marks_of(spec_of(trial.recipe).folder))
        if any(place.samples == samples for place in kept):
            return Origin(trial=trial.number, samples=samples, epoch=epoch)
    return None


def _population(job: TuneJob, spec_of: Any) -> Exploiting | None:
    if job.search.scheduler != "pbt":
        return None

    def saved(trial: Trial, epoch: int) -> int | None:
        reached = next((one.samples for one in trial.epochs if one.epoch == epoch), None)
        folder = checkpoints_of(spec_of(trial.recipe).folder)
        deadline = time.monotonic() + SAVED_SECONDS
        while not any(place.samples == reached for place in places.committed(folder)):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.2)
        return reached

    return Exploiting(job.search.metric, job.search.interval(job.recipe.epochs), job.search.seed, saved)


def _scheduler(search: SearchConfig, base: Recipe) -> Any:
    if search.scheduler == "asha":
        return study.asha(base.epochs, search.grace(base), search.reduction)
    return study.median(search.grace(base)) if search.scheduler == "median" else study.none()


def unfinished(trials: Sequence[Trial]) -> list[Trial]:
    """Those that could go on."""
    return [trial for trial in trials if not trial.done]
