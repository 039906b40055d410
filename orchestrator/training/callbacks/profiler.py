"""A trace of some steps on demand, for chrome://tracing or Perfetto, kept in the run's folder."""

from __future__ import annotations

import logging
import os
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile

from orchestrator.config import redaction
from orchestrator.storage import file_io

_log = logging.getLogger(__name__)


class Profiler:
    """Traces the steps `first` to `last` of an attempt, counted from 0, into one file."""

    def __init__(self, steps: tuple[int, int], url: str, device: torch.device) -> None:
        self._first, self._last = steps
        self._url = url
        self._activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._step = 0
        self._running: profile | None = None

    def on_step_start(self) -> None:
        """Count a step that is about to be made; begin or end the trace where it is due."""
        if self._step == self._first:
            self._running = profile(activities=self._activities, record_shapes=True)
            self._running.start()
        elif self._step == self._last + 1:
            self.close()
        self._step += 1

    def close(self) -> None:
        """Write what was traced, once. A failure is only warned of: no training ends for a trace."""
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
            _log.warning("%s: no trace of the profiled steps was kept: %s", redaction.redact(self._url), error)
