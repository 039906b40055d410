"""Keeps the weights of the epoch that validated best, for inference, beside the run's newest checkpoints."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from orchestrator.checkpoint import checkpoint_dir, weights
from orchestrator.checkpoint.checkpoint import NonFiniteError
from orchestrator.storage import commit, file_io
from orchestrator.training.attempts import Attempt
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import TrainJob
from orchestrator.training.run_dir import get_best_weights_dir
from orchestrator.training.train_state import TrainState

_log = logging.getLogger(__name__)

# The first that an epoch has: the averaged weights are those used at inference (arXiv 1409.4842, section 6).
MONITORED_METRICS = ("validation/averaged_top1_error", "validation/raw_top1_error")


class BestCheckpoint:
    """Rank 0's. What is kept there is never resumed from: it is for people, and costs a run nothing when it fails."""

    def __init__(self, job: TrainJob, classes: tuple[str, ...], attempt: Attempt, watchdog: Watchdog) -> None:
        self._folder, self._job, self._classes = get_best_weights_dir(job.folder), job, classes
        self._attempt, self._watchdog = attempt, watchdog
        self._error = _load_best_error(self._folder)
        self._thread: threading.Thread | None = None

    def save_if_best(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Keep the present weights, written in the background, if these metrics are the best so far."""
        name = next((name for name in MONITORED_METRICS if name in metrics), None)
        if name is None or (self._error is not None and metrics[name] >= self._error[1] and name == self._error[0]):
            return
        if self._error is not None and MONITORED_METRICS.index(name) > MONITORED_METRICS.index(self._error[0]):
            return  # raw weights after averaged ones
        self.wait()
        before, self._error = self._error, (name, metrics[name])
        averaged, raw = state.copy_final_weights()
        about = {"samples": state.progress.samples, name: metrics[name]}
        url = checkpoint_dir.make_checkpoint_url(self._folder, state.progress.samples, self._attempt.number)

        def write() -> None:
            try:
                with self._watchdog.watch_phase("save-best", self._job.cadence.limits.save_seconds):
                    if self._attempt.is_superseded():
                        return
                    recipe = self._job.recipe.to_dict()
                    weights.save(url, averaged, raw, recipe, self._classes, about=about)
                    for place in checkpoint_dir.list_checkpoints(self._folder):
                        if place.url != url:
                            file_io.remove(place.url)
            except (OSError, NonFiniteError) as error:
                self._error = before  # what is kept is still the one before
                _log.warning("best weights not kept: %s", error)

        self._thread = threading.Thread(target=write, name="best-weights")
        self._thread.start()

    def wait(self) -> None:
        """Until what is being written is there."""
        if self._thread is not None:
            with self._watchdog.watch_phase("wait-for-save", 2 * self._job.cadence.limits.save_seconds):
                self._thread.join()
            self._thread = None


def _load_best_error(folder: str) -> tuple[str, float] | None:
    """Name and value of the error of the weights that are kept; None when there are none that can be read."""
    for place in checkpoint_dir.list_checkpoints(folder):
        try:
            about = commit.read_metadata(place.url)
        except (FileNotFoundError, commit.CommitError):
            continue
        for name in MONITORED_METRICS:
            value = about.get(name)
            if isinstance(value, int | float):
                return name, float(value)
    return None
