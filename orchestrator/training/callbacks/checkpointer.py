"""Rank 0's checkpoints, and the weights that validated best, written in the background straight to storage."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.checkpoint import NonFiniteError
from orchestrator.storage import commit, file_io
from orchestrator.training import attempts
from orchestrator.training.attempts import Attempt, Goodput
from orchestrator.training.callbacks.callback import Callback
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import Outcome, TrainJob
from orchestrator.training.rank_sync import SyncResult
from orchestrator.training.run_dir import get_best_weights_dir, get_checkpoints_dir
from orchestrator.training.train_state import TrainState

if TYPE_CHECKING:  # trainer imports this module
    from orchestrator.training.trainer import Trainer

_log = logging.getLogger(__name__)
PRODUCTIVE_SECONDS_KEY = "productive_seconds"
# The first that an epoch has: the averaged weights are those used at inference (arXiv 1409.4842, section 6).
MONITORED_METRICS = ("validation/averaged_top1_error", "validation/raw_top1_error")


class BackgroundWriter:
    """One write at a time in a thread of its own, watched by the watchdog as phase `phase`."""

    def __init__(self, phase: str, watchdog: Watchdog, limit: float) -> None:
        """limit: seconds that a write may take."""
        self._phase, self._watchdog, self._limit = phase, watchdog, limit
        self.last: Future[None] | None = None  # the last write, until it was waited for

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in the background; the one before must have been waited for."""

        def run() -> None:
            with self._watchdog.watch_phase(self._phase, self._limit):
                write()

        pool = ThreadPoolExecutor(1, thread_name_prefix=self._phase)
        self.last = pool.submit(run)
        pool.shutdown(wait=False)  # its thread ends with the write

    def wait(self) -> None:
        """Wait until the write under way has ended. Raises what it raised, once."""
        if self.last is not None:
            last, self.last = self.last, None
            # The phase of the writer is the one whose limit counts.
            with self._watchdog.watch_phase("wait-for-save", 2 * self._limit):
                last.result()


class Checkpointer(Callback):
    """Saves the state when it is due, one write at a time. The next save raises the error of a write."""

    def __init__(self, job: TrainJob, attempt: Attempt, goodput: Goodput, watchdog: Watchdog) -> None:
        self._run, self._folder = job.folder, get_checkpoints_dir(job.folder)
        self._cadence, self._recipe = job.cadence, job.recipe.to_dict()
        self._attempt, self._goodput = attempt, goodput
        self.writer = BackgroundWriter("save", watchdog, job.cadence.limits.save_seconds)
        self._last = time.monotonic()
        self._saved_samples = -1

    def on_start(self, trainer: Trainer) -> None:
        """Skip the state that an earlier attempt saved."""
        self._saved_samples = trainer.state.progress.samples

    def on_sync(self, trainer: Trainer, sync: SyncResult) -> None:
        """Save on rank 0 when a checkpoint is due, a rank has a preemption notice, or a stop asks for it."""
        if not sync.is_healthy or not trainer.world.is_rank_zero:
            return
        if sync.sums.should_stop:
            if sync.sums.should_save:
                self.save_and_wait(trainer)
        elif sync.is_preempted or self.is_due(trainer.state.progress.samples):
            self._save_and_notify(trainer)

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Wait for the checkpoint under way; the attempt's outcome is decided, so an error is only logged."""
        try:
            self.writer.wait()
        except Exception as error:
            _log.warning("the last checkpoint was not written: %s: %s", type(error).__name__, error)

    def save_and_wait(self, trainer: Trainer) -> None:
        """Save the state of rank 0 and wait until it is in storage."""
        if trainer.world.is_rank_zero:
            self._save_and_notify(trainer)
            self.writer.wait()

    def _save_and_notify(self, trainer: Trainer) -> None:
        if self.save(trainer.state):
            trainer.notify("on_checkpoint")

    def is_due(self, samples: int) -> bool:
        """Return whether the cadence asks for a checkpoint now; never during a write."""
        if self.writer.last is not None and not self.writer.last.done():
            return False
        each = self._cadence.checkpoint_samples
        passed = each is not None and samples // each > max(0, self._saved_samples) // each
        return passed or time.monotonic() - self._last >= self._cadence.checkpoint_seconds

    def save(self, state: TrainState) -> bool:
        """Copy the state now and write it in the background; return whether it was not saved before."""
        self.writer.wait()
        if state.progress.samples == self._saved_samples:
            return False
        self._last = time.monotonic()
        self._saved_samples = state.progress.samples
        content = {**state.snapshot(), "recipe": self._recipe, PRODUCTIVE_SECONDS_KEY: self._goodput.productive_seconds}
        self.writer.start(lambda: self._write(content))
        return True

    def _write(self, content: dict[str, Any]) -> None:
        if self._attempt.is_superseded():
            return  # it would not count, and must not push out what does
        try:
            saved = checkpoint_format.save(self._folder, content, content["samples"], self._attempt.number)
        except NonFiniteError as error:
            # The checkpoint before stays; the next loss, or the check at the end, ends the run on all ranks.
            _log.warning("checkpoint: %s", error)
            return
        if not self._attempt.is_superseded():  # by one that needs what would be removed
            is_stale = attempts.load_stale_checkpoint_check(self._run)
            checkpoint_format.remove_old_checkpoints(self._folder, self._cadence.keep_checkpoints, saved, is_stale)


class BestCheckpoint(Callback):
    """The best weights so far, for inference. No run resumes from them, and a failed write only costs a warning."""

    def __init__(self, job: TrainJob, classes: tuple[str, ...], attempt: Attempt, watchdog: Watchdog) -> None:
        self._folder, self._attempt = get_best_weights_dir(job.folder), attempt
        self._recipe, self._classes = job.recipe.to_dict(), classes
        self._best = _load_best_error(self._folder)
        self.writer = BackgroundWriter("save-best", watchdog, job.cadence.limits.save_seconds)

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Write the weights in the background if this epoch validated best."""
        error, state = _find_error(metrics), trainer.state
        if error >= self._best:
            return
        self.writer.wait()
        before, self._best = self._best, error
        averaged, raw = state.copy_final_weights()
        metadata = {"samples": state.progress.samples, MONITORED_METRICS[error[0]]: error[1]}
        url = checkpoint_dir.make_checkpoint_url(self._folder, state.progress.samples, self._attempt.number)

        def write() -> None:
            try:
                if self._attempt.is_superseded():
                    return
                checkpoint_format.save_final_weights(url, averaged, raw, self._recipe, self._classes, metadata=metadata)
                for place in checkpoint_dir.list_checkpoints(self._folder):
                    if place.url != url:
                        file_io.remove(place.url)
            except Exception as error:
                self._best = before  # the weights before are still the best ones in storage
                _log.warning("the best weights were not saved: %s", error)

        self.writer.start(write)

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Wait for the write under way."""
        self.writer.wait()


def _find_error(metrics: Mapping[str, Any]) -> tuple[int, float]:
    """Return the first monitored metric that there is and its value; the smallest such pair is the best."""
    for number, name in enumerate(MONITORED_METRICS):
        if isinstance(value := metrics.get(name), int | float):
            return number, float(value)
    return len(MONITORED_METRICS), math.inf


def _load_best_error(folder: str) -> tuple[int, float]:
    """Return the error of the weights in storage; the worst when there are none that can be read."""
    for place in checkpoint_dir.list_checkpoints(folder):
        try:
            return _find_error(commit.read_metadata(place.url))
        except (FileNotFoundError, commit.CommitError):
            continue
    return _find_error({})
