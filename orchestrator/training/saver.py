"""Checkpoints by the clock, written in the background by rank 0 straight to storage."""

from __future__ import annotations

import threading
import time
from typing import Any

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.training.job import Cadence, TrainJob, checkpoints_of
from orchestrator.training.state import TrainState


class Saver:
    """Saves a state when it is due; at most one write is under way. An error of a write is raised at the next save."""

    def __init__(self, job: TrainJob, attempt: int) -> None:
        self._folder = checkpoints_of(job.folder)
        self._cadence: Cadence = job.cadence
        self._recipe = job.recipe.to_dict()
        self._attempt = attempt
        self._last = time.monotonic()
        self._saved_samples = -1
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def due(self) -> bool:
        """Whether the cadence asks for a checkpoint now; never while one is being written."""
        busy = self._thread is not None and self._thread.is_alive()
        return not busy and time.monotonic() - self._last >= self._cadence.checkpoint_seconds

    def save(self, state: TrainState) -> None:
        """Copy the state now and write it in the background."""
        self.wait()
        if state.progress.samples == self._saved_samples:
            return
        self._last = time.monotonic()
        self._saved_samples = state.progress.samples
        content = {**state.snapshot(), "recipe": self._recipe}
        self._thread = threading.Thread(target=self._write, args=(content,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the write under way has ended. Raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, content: dict[str, Any]) -> None:
        try:
            saved = checkpoint_format.save(self._folder, content, content["samples"], self._attempt)
            checkpoint_format.prune(self._folder, self._cadence.keep_checkpoints, saved)
        except Exception as error:  # raised again in the training thread, by wait()
            self._error = error
