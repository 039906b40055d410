"""Trials on Ray Tune. What Tune decides: which actor trains what, and which trial is ended early.

What a trial is, what is known of it, and how it ended, is the sweep's (`Steering`): Tune's own records are scratch, and
nothing of them is read after a driver died.
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
from typing import Any, Literal, Protocol

from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, Stopper, TuneConfig
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.config.output import prepare_output
from orchestrator.ray_backend import ray_compat, ray_env, worker_prestart
from orchestrator.ray_backend.run_spec import Placement
from orchestrator.tuning import trial_run
from orchestrator.tuning.trial_run import TrialReport, TrialRun, TrialTask

# Ray Train's workers of a trial reserve what they need by themselves; its actor only drives them.
WAITING_RESOURCES = {"memory": 1.0}  # a byte of it: an actor that reserves nothing at all is refused
EPOCH_KEY, SCORE_KEY = "epoch", "score"
_CREDENTIAL_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
_log = logging.getLogger(__name__)
_EXIT_DETAIL = re.compile(r"Worker exit detail: ([^.]+)")


class ReportDecision(Protocol):
    """What the sweep thinks of a report."""

    @property
    def should_stop(self) -> bool:
        """Whether the trial ends here, whatever the scheduler thinks."""

    @property
    def ask_scheduler(self) -> bool:
        """Whether the scheduler is to judge it."""


class TrialController(Protocol):
    """The sweep as the study sees it; called from the thread of `run` alone."""

    def next_task(self) -> TrialTask | Literal["later"] | None:
        """The next trial; "later" when none may begin now, None when there will be none any more."""

    def on_trial_started(self, number: int) -> None:
        """An actor has begun a trial."""

    def on_trial_report(self, report: TrialReport) -> ReportDecision:
        """A trial reported an epoch, or its end."""

    def on_trial_ended(self, number: int, error: str | None) -> None:
        """A trial is over; error: what it failed with in the end."""


class Rule(Protocol):
    """Which trials end early: the values of tuning.config.SearchConfig that concern a scheduler."""

    kind: str
    grace: int
    epochs: int
    reduction: float


def run_tuner(
    steering: TrialController, scheduler: TrialScheduler, placement: Placement, gpus: float, retries: int
) -> None:
    """Run trials until there are no more. Blocks; a trial's failure is told to `steering`, never raised."""
    ray_env.set_tune_variables()
    # It repeats which trials failed; the sweep has told them, with their causes.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    one = {"CPU": float(placement.cpus_per_worker)} | ({"GPU": gpus} if gpus > 0 else {})
    bundle = one if placement.workers == 1 else WAITING_RESOURCES
    with tempfile.TemporaryDirectory(prefix="orchestrator-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, PlacementGroupFactory([bundle])),
            tune_config=TuneConfig(
                metric=SCORE_KEY,
                mode="min",
                search_alg=_SweepSearcher(steering),
                scheduler=_SweepScheduler(steering, scheduler),
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_make_name,
                trial_dirname_creator=_make_name,
            ),
            run_config=RunConfig(
                name="sweep",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=retries),
                verbose=0,
                callbacks=[_SweepCallback(steering)],
                stop=_NeverStopper(),
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
    propagated.add(ray_compat.FAST_START_VARIABLE)
    added.update(worker_prestart.get_hook_variables())
    try:
        yield
    finally:
        for current, original in zip((propagated, added), before, strict=True):
            current.clear()
            current.update(original)


def make_asha(epochs: int, grace: int, reduction: float) -> TrialScheduler:
    """Asynchronous successive halving (arXiv 1810.05934)."""
    return AsyncHyperBandScheduler(time_attr=EPOCH_KEY, max_t=epochs, grace_period=grace, reduction_factor=reduction)


def make_median_stopping(grace: int) -> TrialScheduler:
    """Ends trials that are worse than the median of the running means at the same epoch (Vizier, section 3.2.2)."""
    return MedianStoppingRule(
        time_attr=EPOCH_KEY,
        grace_period=float(grace),
        min_samples_required=3,
        min_time_slice=sys.maxsize,  # else trials pause for others to come as far, and none of ours is ever paused
    )


def make_fifo() -> TrialScheduler:
    """Ends no trial."""
    return FIFOScheduler()  # type: ignore[no-untyped-call]


class TrialActor(tune.Trainable):
    """The process that trains trials, one after the other: torch is imported once."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take a trial over."""
        prepare_output()
        task = trial_run.decode_task(config["trial"])
        from orchestrator.tuning.trial_training import train_trial  # torch is imported in the trial's process alone

        self._run = TrialRun(task, train_trial)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial over; the one before saves where it is, if it has not ended."""
        self._run.close()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The next epoch."""
        report = self._run.step()
        # As text: Tune would take nested values apart.
        told: dict[str, Any] = {"report": report.to_json(), EPOCH_KEY: report.epoch, "done": report.state != "running"}
        return told if report.score is None else {**told, SCORE_KEY: report.score}

    def cleanup(self) -> None:
        """The end of this process: save."""
        self._run.close()


class _NotPickled:
    """Tune writes down what it consists of, for a restore that is never asked for: this is left out of it."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _SweepSearcher(_NotPickled, Searcher):
    def __init__(self, steering: TrialController) -> None:
        super().__init__(metric=SCORE_KEY, mode="min")
        self._controller = steering

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a text
        task = self._controller.next_task()
        if task is None:
            return str(Searcher.FINISHED)
        return None if task == "later" else {"number": task.number, "trial": json.dumps(task.to_dict())}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class _NeverStopper(_NotPickled, Stopper):
    """Nothing: the judge ends trials, and the source the study."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return False


class _SweepScheduler(_NotPickled, TrialScheduler):
    """Asks the sweep, then the scheduler, which is not shown again what an earlier attempt had reported."""

    def __init__(self, steering: TrialController, inner: TrialScheduler) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._controller, self._inner = steering, inner
        self._last_epochs: dict[str, int] = {}

    @property
    def metric(self) -> str:
        return SCORE_KEY

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return bool(self._inner.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._inner.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        report = _parse_report(result)
        decision = self._controller.on_trial_report(report)
        if decision.should_stop:
            return str(TrialScheduler.STOP)
        if SCORE_KEY not in result or report.epoch <= self._last_epochs.get(trial.trial_id, 0):
            return str(TrialScheduler.CONTINUE)
        self._last_epochs[trial.trial_id] = report.epoch
        found = self._inner.on_trial_result(tune_controller, trial, result)
        return str(found if decision.ask_scheduler else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self._inner.debug_string())


class _SweepCallback(_NotPickled, Callback):
    """Passes on what the judge is not asked about: beginnings and ends."""

    def __init__(self, steering: TrialController) -> None:
        self._controller = steering

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._controller.on_trial_started(_get_number(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        report = _parse_report(result)
        if report.state != "running":  # the judge is not shown a trial's last words
            self._controller.on_trial_report(report)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._controller.on_trial_ended(_get_number(trial), None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        # Its actor, which would have done so, may be dead, and its workers' reservation would stay.
        if (internals := ray_compat.load_ray_internals()) is not None:
            internals.release_placement_group(trial_run.decode_task(trial.config["trial"]).spec.folder)
        self._controller.on_trial_ended(_get_number(trial), _find_cause(trial))


def _parse_report(result: dict[str, Any]) -> TrialReport:
    return TrialReport.from_dict(json.loads(result["report"]))


def _get_number(trial: Trial) -> int:
    return int(trial.config["number"])


def _make_name(trial: Trial) -> str:
    return f"t{_get_number(trial):03d}"


def _find_cause(trial: Trial) -> str:
    """Why a trial failed for good: Ray puts the cause at the end of a long text."""
    try:
        text = Path(trial.error_file or "").read_text(encoding="utf-8", errors="replace").rpartition("Failure #")[2]
    except OSError:
        text = ""
    if (detail := _EXIT_DETAIL.search(text)) is not None:
        return f"its process died: {detail[1]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "its process died"
