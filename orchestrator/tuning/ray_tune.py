"""Trials on Ray Tune, which decides which actor trains what and which trial is pruned.

The sweep (`sweep.Sweep`) defines the trials and records their results. Tune's own records are scratch: every driver
creates them afresh and reads none of an earlier one.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.config.output import prepare_output
from orchestrator.ray_backend import cluster, ray_env
from orchestrator.ray_backend.run_spec import Placement
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.config import SearchConfig
from orchestrator.tuning.sweep import Sweep
from orchestrator.tuning.trial import TrialReport, TrialTask

# For the actor of a trial with several workers, which Ray Train reserves for: an actor must reserve something.
WAITING_RESOURCES = {"memory": 1.0}  # bytes
EPOCH_KEY, SCORE_KEY = "epoch", "score"
# Nodes have credentials of their own; what Tune passes to actors is visible in the cluster's records.
_CREDENTIAL_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
_log = logging.getLogger(__name__)
_EXIT_DETAIL = re.compile(r"Worker exit detail: ([^.]+)")


def run_tuner(sweep: Sweep, scheduler: TrialScheduler, placement: Placement, gpus: float) -> None:
    """Run trials until the sweep has no more. Blocks; a trial's failure is reported to the sweep, never raised."""
    ray_env.set_tune_variables()
    # It repeats which trials failed; the sweep has reported them, with their causes.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    worker = {"CPU": float(placement.cpus_per_worker)} | ({"GPU": gpus} if gpus > 0 else {})
    bundle = worker if placement.workers == 1 else WAITING_RESOURCES
    # With several workers Ray Train restarts them by itself.
    max_failures = placement.max_restarts if placement.workers == 1 else 1
    with tempfile.TemporaryDirectory(prefix="orchestrator-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, PlacementGroupFactory([bundle])),
            tune_config=TuneConfig(
                metric=SCORE_KEY,
                mode="min",
                search_alg=_SweepSearcher(sweep),
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_make_name,
                trial_dirname_creator=_make_name,
            ),
            run_config=RunConfig(
                name="sweep",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=max_failures),
                verbose=0,
                callbacks=[_SweepCallback(sweep)],
                checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        with _patch_actor_variables():
            tuner.fit()


@contextmanager
def _patch_actor_variables() -> Iterator[None]:
    """Choose the environment variables that Tune gives its actors, while a tuner fits.

    Credentials are kept out: what Tune hands on stands in the cluster's records, and nodes have their own.
    """
    try:
        from ray.tune.execution import class_cache  # not documented, so it may be missing

        propagated: Any = class_cache.ENV_VARS_TO_PROPAGATE
        added: Any = class_cache.DEFAULT_ENV_VARS
    except (ImportError, AttributeError):
        _log.warning("Ray Tune changed: AWS keys of this environment, if any, are handed on to the trials' processes")
        yield
        return
    before = set(propagated), dict(added)
    propagated.difference_update(_CREDENTIAL_VARIABLES)
    propagated.add(ray_env.FAST_START_VARIABLE)
    added.update(cluster.get_hook_variables())
    try:
        yield
    finally:
        for current, original in zip((propagated, added), before, strict=True):
            current.clear()
            current.update(original)


class TrialActor(tune.Trainable):
    """The process that trains trials one after another, so that torch is imported once."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take over a trial."""
        prepare_output()
        from orchestrator.tuning.trial_run import TrialRun  # the driver does without torch

        self._run = TrialRun(_parse_task(config))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over the next trial; the one before saves if it has not ended."""
        self._run.close()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train the next epoch."""
        report = self._run.step()
        # As text, because Tune flattens nested values.
        result: dict[str, Any] = {
            "report": report.to_json(),
            EPOCH_KEY: report.epoch,
            "done": report.state != "running",
        }
        return result if report.score is None else {**result, SCORE_KEY: report.score}

    def cleanup(self) -> None:
        """Save before the process ends."""
        self._run.close()


class _NotPickled:
    """A part of Tune that stays out of the state that Tune saves for a restore, which the project never uses."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _SweepSearcher(_NotPickled, Searcher):
    def __init__(self, sweep: Sweep) -> None:
        super().__init__(metric=SCORE_KEY, mode="min")
        self._sweep = sweep

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a text
        task = self._sweep.next_task()
        if task is None:
            return str(Searcher.FINISHED)
        return None if task == "later" else {"number": task.number, "trial": task.to_json()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass


class _SweepScheduler(_NotPickled, TrialScheduler):
    """A scheduler of Tune's that asks the sweep first, and judges each epoch of a trial once."""

    def __init__(self, sweep: Sweep, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._sweep = sweep
        self._last_epochs: dict[str, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        report = _parse_report(result)
        verdict = self._sweep.on_trial_report(report)
        if verdict == "stop":
            return str(TrialScheduler.STOP)
        if SCORE_KEY not in result or report.epoch <= self._last_epochs.get(trial.trial_id, 0):
            return str(TrialScheduler.CONTINUE)
        self._last_epochs[trial.trial_id] = report.epoch
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(decision if verdict == "judge" else TrialScheduler.CONTINUE)


class _Fifo(_SweepScheduler, FIFOScheduler):
    """Prunes no trial."""


class _Asha(_SweepScheduler, AsyncHyperBandScheduler):
    """Asynchronous successive halving (arXiv 1810.05934)."""


class _MedianStopping(_SweepScheduler, MedianStoppingRule):
    """Prunes trials worse than the median of the running means (Vizier, section 3.2.2)."""


def make_scheduler(sweep: Sweep, search: SearchConfig, base: Recipe) -> TrialScheduler:
    """Return the scheduler that prunes the trials of a sweep."""
    options: dict[str, Any] = {"time_attr": EPOCH_KEY, "grace_period": float(search.get_grace_epochs(base))}
    if search.scheduler == "asha":
        return _Asha(sweep, max_t=base.epochs, reduction_factor=search.reduction, **options)
    if search.scheduler == "median":
        # Else trials pause until others have caught up, which the sweep does not support.
        return _MedianStopping(sweep, min_samples_required=3, min_time_slice=sys.maxsize, **options)
    return _Fifo(sweep)


class _SweepCallback(_NotPickled, Callback):
    """Reports to the sweep what Tune does not ask a scheduler about: the ends of trials."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        report = _parse_report(result)
        if report.state != "running":  # Tune does not show the last report to the scheduler
            self._sweep.on_trial_report(report)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._sweep.on_trial_ended(trial.config["number"], None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        # Its actor may be dead, and cannot release the reservation of its workers.
        if (internals := ray_env.load_ray_internals()) is not None:
            internals.release_placement_group(_parse_task(trial.config).spec.folder)
        self._sweep.on_trial_ended(trial.config["number"], _find_cause(trial))


def _parse_task(config: dict[str, Any]) -> TrialTask:
    return TrialTask.from_dict(json.loads(config["trial"]))


def _parse_report(result: dict[str, Any]) -> TrialReport:
    return TrialReport.from_dict(json.loads(result["report"]))


def _make_name(trial: Trial) -> str:
    return f"t{trial.config['number']:03d}"


def _find_cause(trial: Trial) -> str:
    """Return why a trial failed: Ray puts the cause at the end of a long text."""
    try:
        text = Path(trial.error_file or "").read_text(encoding="utf-8", errors="replace").rpartition("Failure #")[2]
    except OSError:
        text = ""
    if (detail := _EXIT_DETAIL.search(text)) is not None:
        return f"its process died: {detail[1]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "its process died"
