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
        self._activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._step = 0  # the next one
        self._running: profile | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Begin the trace if it includes the first step."""
        self._begin_if_due()

    def on_step_end(self, trainer: Trainer) -> None:
        """Count the step; begin or end the trace where it is due."""
        self._step += 1
        if self._step == self._last + 1:
            self._write_trace()
        self._begin_if_due()

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Write what was traced if training ended before the last step of the trace."""
        self._write_trace()

    def _begin_if_due(self) -> None:
        if self._step == self._first:
            self._running = profile(activities=self._activities, record_shapes=True)
            self._running.start()

    def _write_trace(self) -> None:
        """Write the trace, once. A failure only costs a warning: no training ends for a trace."""
        running, self._running = self._running, None
        if running is None:
            return
        try:
            running.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "trace.json.gz")
                running.export_chrome_trace(path)
                file_io.write_bytes(self._url, file_io.read_bytes(path))
        except (OSError, RuntimeError) as error:
            _log.warning("%s: the trace was not written: %s", redaction.redact(self._url), error)
