"""Rank 0 keeps the weights of the epoch that validated best, for inference, beside the run's newest checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.checkpoint import checkpoint_dir, weights
from orchestrator.checkpoint.checkpoint import NonFiniteError
from orchestrator.storage import commit, file_io
from orchestrator.training.attempts import Attempt
from orchestrator.training.callbacks.callback import Callback
from orchestrator.training.callbacks.checkpointer import BackgroundWriter
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import Outcome, TrainJob
from orchestrator.training.run_dir import get_best_weights_dir
from orchestrator.training.train_state import TrainState

if TYPE_CHECKING:  # trainer imports this module
    from orchestrator.training.trainer import Trainer

_log = logging.getLogger(__name__)

# The first that an epoch has: the averaged weights are those used at inference (arXiv 1409.4842, section 6).
MONITORED_METRICS = ("validation/averaged_top1_error", "validation/raw_top1_error")


class BestCheckpoint(Callback):
    """The best weights so far. No run resumes from them, and a failed write only costs a warning."""

    def __init__(self, job: TrainJob, classes: tuple[str, ...], attempt: Attempt, watchdog: Watchdog) -> None:
        self._folder, self._job, self._classes = get_best_weights_dir(job.folder), job, classes
        self._attempt = attempt
        self._error = _load_best_error(self._folder)
        self._writer = BackgroundWriter("save-best", watchdog, job.cadence.limits.save_seconds)

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Keep the weights if this epoch validated best."""
        self.save_if_best(trainer.state, metrics)

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Wait for the write under way."""
        self.wait()

    def save_if_best(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Write the present weights in the background if these metrics are the best so far."""
        name = next((name for name in MONITORED_METRICS if name in metrics), None)
        if name is None or (self._error is not None and metrics[name] >= self._error[1] and name == self._error[0]):
            return
        if self._error is not None and MONITORED_METRICS.index(name) > MONITORED_METRICS.index(self._error[0]):
            return  # raw weights after averaged ones
        self.wait()
        before, self._error = self._error, (name, metrics[name])
        averaged, raw = state.copy_final_weights()
        metadata = {"samples": state.progress.samples, name: metrics[name]}
        url = checkpoint_dir.make_checkpoint_url(self._folder, state.progress.samples, self._attempt.number)

        def write() -> None:
            try:
                if self._attempt.is_superseded():
                    return
                weights.save(url, averaged, raw, self._job.recipe.to_dict(), self._classes, metadata=metadata)
                for place in checkpoint_dir.list_checkpoints(self._folder):
                    if place.url != url:
                        file_io.remove(place.url)
            except (OSError, NonFiniteError) as error:
                self._error = before  # the weights before are still the best ones in storage
                _log.warning("the best weights were not saved: %s", error)

        self._writer.start(write)

    def wait(self) -> None:
        """Wait until the write under way has ended."""
        self._writer.wait()


def _load_best_error(folder: str) -> tuple[str, float] | None:
    """Return name and value of the error of the weights in storage; None when there are none that can be read."""
    for place in checkpoint_dir.list_checkpoints(folder):
        try:
            metadata = commit.read_metadata(place.url)
        except (FileNotFoundError, commit.CommitError):
            continue
        for name in MONITORED_METRICS:
            value = metadata.get(name)
            if isinstance(value, int | float):
                return name, float(value)
    return None
