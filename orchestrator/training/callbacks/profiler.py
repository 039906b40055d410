"""A trace of some steps on demand, for chrome://tracing or Perfetto, kept in the run's folder."""

from __future__ import annotations

import logging
import os
import tempfile
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from orchestrator.config import redaction
from orchestrator.storage import file_io
from orchestrator.training.callbacks.callback import Callback
from orchestrator.training.config import Outcome

if TYPE_CHECKING:  # trainer imports this module
    from orchestrator.training.trainer import Trainer

_log = logging.getLogger(__name__)


class Profiler(Callback):
    """Traces the steps `first` to `last` of an attempt, counted from 0, into one file."""

    def __init__(self, steps: tuple[int, int], url: str, device: torch.device) -> None:
        self._first, self._last = steps
        self._url = url
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile: profile | None = profile(activities=activities, record_shapes=True)
        self._step = 0  # the next one

    def on_start(self, trainer: Trainer) -> None:
        """Begin the trace if it includes the first step."""
        if self._profile is not None and self._step == self._first:
            self._profile.start()

    def on_step_end(self, trainer: Trainer) -> None:
        """Count the step; begin or end the trace where it is due."""
        self._step += 1
        if self._step == self._last + 1:
            self.on_end(trainer, None)
        self.on_start(trainer)

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Write what was traced, once. A failure only costs a warning: no training ends for a trace."""
        running, self._profile = self._profile, None
        if running is None or self._step < self._first:
            return
        try:
            running.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "trace.json.gz")
                running.export_chrome_trace(path)
                file_io.write_bytes(self._url, file_io.read_bytes(path))
        except (OSError, RuntimeError) as error:
            _log.warning("%s: the trace was not written: %s", redaction.redact(self._url), error)
