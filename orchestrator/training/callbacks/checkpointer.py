"""Checkpoints by the clock and by samples, written in the background by rank 0 straight to storage."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint.checkpoint import NonFiniteError
from orchestrator.training import attempts
from orchestrator.training.attempts import Attempt, Goodput
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import Cadence, TrainJob, get_checkpoints_dir
from orchestrator.training.train_state import TrainState

_log = logging.getLogger(__name__)
PRODUCTIVE_SECONDS_KEY = "productive_seconds"


class Checkpointer:
    """Saves a state when it is due; at most one write is under way. An error of a write is raised at the next save."""

    def __init__(self, job: TrainJob, attempt: Attempt, goodput: Goodput, watchdog: Watchdog) -> None:
        self.stalled_seconds = 0.0  # that training waited for checkpoints, in all
        self._run, self._folder = job.folder, get_checkpoints_dir(job.folder)
        self._cadence: Cadence = job.cadence
        self._recipe = job.recipe.to_dict()
        self._attempt, self._goodput, self._watchdog = attempt, goodput, watchdog
        self._last = time.monotonic()
        self._saved_samples = -1
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def is_due(self, samples: int) -> bool:
        """Whether the cadence asks for a checkpoint now; not while one is being written."""
        if self._thread is not None and self._thread.is_alive():
            return False
        each = self._cadence.checkpoint_samples
        passed = each is not None and samples // each > max(0, self._saved_samples) // each
        return passed or time.monotonic() - self._last >= self._cadence.checkpoint_seconds

    def mark_saved(self, samples: int) -> None:
        """What was saved at `samples` by an earlier attempt need not be saved again."""
        self._saved_samples = samples

    def save(self, state: TrainState) -> None:
        """Copy the state now and write it in the background."""
        began = time.monotonic()
        self.wait()
        if state.progress.samples == self._saved_samples:
            return
        self._last = time.monotonic()
        self._saved_samples = state.progress.samples
        content = {**state.snapshot(), "recipe": self._recipe, PRODUCTIVE_SECONDS_KEY: self._goodput.productive_seconds}
        self._thread = threading.Thread(target=self._write, args=(content,), name="checkpoint")
        self._thread.start()
        self.stalled_seconds += time.monotonic() - began

    def wait(self) -> None:
        """Until the write under way has ended. Raises what it raised."""
        if self._thread is not None:
            # No phase of its own: the writer has one, and its limit is the one that counts.
            with self._watchdog.watch_phase("wait-for-save", 2 * self._cadence.limits.save_seconds):
                self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, content: dict[str, Any]) -> None:
        try:
            with self._watchdog.watch_phase("save", self._cadence.limits.save_seconds):
                if self._attempt.is_superseded():
                    return  # it would not count, and must not push out what does
                samples = content["samples"]
                saved = checkpoint_format.save(self._folder, content, samples, self._attempt.number)
                if not self._attempt.is_superseded():  # by one that needs what would be removed
                    void = attempts.load_stale_checkpoint_check(self._run)
                    checkpoint_format.remove_old_checkpoints(self._folder, self._cadence.keep_checkpoints, saved, void)
        except NonFiniteError as error:
            # What was saved before stays; the loss of the next step, or the end's own look, ends the run on all ranks.
            _log.warning("checkpoint: %s", error)
        except Exception as error:  # raised again in the training thread, by wait()
            self._error = error
