"""A trace of some steps on demand, for chrome://tracing or Perfetto, kept in the run's folder."""

from __future__ import annotations

import logging
import os
import tempfile
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

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
        first, last = steps

        def choose_action(step: int) -> ProfilerAction:
            if step == last:
                return ProfilerAction.RECORD_AND_SAVE
            return ProfilerAction.RECORD if first <= step < last else ProfilerAction.NONE

        self._url = url
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile = profile(
            activities=activities, schedule=choose_action, on_trace_ready=self._write_trace, record_shapes=True
        )

    def on_start(self, trainer: Trainer) -> None:
        """Begin the trace if it includes the first step."""
        self._profile.start()

    def on_step_end(self, trainer: Trainer) -> None:
        """Begin or end the trace where it is due."""
        self._profile.step()

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Write what was traced, unless that is done."""
        self._profile.stop()

    def _write_trace(self, traced: profile) -> None:
        """Write the trace. A failure only costs a warning: no training ends for a trace."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "trace.json.gz")
                traced.export_chrome_trace(path)
                file_io.write_bytes(self._url, file_io.read_bytes(path))
        except (OSError, RuntimeError) as error:
            _log.warning("%s: the trace was not written: %s", redaction.redact(self._url), error)
