"""Rank 0's records of an attempt: journal events, and on demand a trace for chrome://tracing or Perfetto."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from orchestrator.config import redaction
from orchestrator.storage import file_io
from orchestrator.tracking.journal import JournalWriter
from orchestrator.training.attempts import Attempt, build_incident
from orchestrator.training.callbacks.callback import Callback
from orchestrator.training.config import Outcome, TrainJob
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.rank_sync import SyncResult
from orchestrator.training.run_dir import get_journal_dir
from orchestrator.training.train_state import Progress

if TYPE_CHECKING:  # trainer imports this module
    from orchestrator.training.trainer import Trainer

_log = logging.getLogger(__name__)
CLOSE_TIMEOUT_SECONDS = 30.0
START_FLUSH_SECONDS = 5.0
MAX_BAD_SAMPLES_LOGGED = 100  # of an attempt; the audit record kept with the weights has them all


class JournalLogger(Callback):
    """Writes the events of this attempt."""

    def __init__(self, job: TrainJob, attempt: Attempt) -> None:
        self._attempt = attempt
        self._samples = 0  # of the last event
        self._num_bad_logged = 0
        self._replay: tuple[int, float, float] | None = None  # samples to reach, start, seconds lost before it
        self._journal = JournalWriter(get_journal_dir(job.folder), attempt.number)

    def on_start(self, trainer: Trainer) -> None:
        """Record the start, the weights it starts from, and a micro-batch that the device's memory forced."""
        progress = trainer.state.progress
        self.log_start(progress, trainer.world, trainer.skipped_checkpoints)
        if trainer.initial_weights is not None:
            text = trainer.initial_weights.describe(trainer.job.weights, trainer.classes)
            self.append("weights", progress, loaded=text)
        if trainer.train_step.micro_batch != trainer.job.execution.micro_batch:
            self.append("micro-batch", progress, images=float(trainer.train_step.micro_batch or 0))

    def on_sync(self, trainer: Trainer, sync: SyncResult) -> None:
        """Record bad samples, the end of a replay, a preemption notice, and a point of the curves when it is due."""
        progress, cadence = trainer.state.progress, trainer.job.cadence
        for sample in sync.new_bad_samples[: MAX_BAD_SAMPLES_LOGGED - self._num_bad_logged]:
            self._num_bad_logged += 1
            self.append("bad-sample", progress, **sample.to_dict())
        if not sync.is_healthy:
            return
        if self._replay is not None and progress.samples >= self._replay[0]:
            _, began, lost = self._replay
            self._replay, seconds = None, time.monotonic() - began
            values = {"seconds_to_replay": round(seconds, 3), "seconds_lost": round(lost + seconds, 3)}
            self.append("recovered", progress, attempt=self._attempt.number, **values)
        if sync.sums.should_stop:
            return
        if sync.is_preempted:
            self.append("preempted", progress)
        if not sync.is_epoch_end and progress.step % cadence.log_steps < cadence.pulse_steps:  # due since the last sync
            mean = trainer.meter.compute_mean_since_last(sync.sums.loss, sync.sums.samples)
            self.append("metrics", progress, **{"train/step_loss": mean, "train/rate": trainer.learning_rate})

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Record the metrics of an epoch."""
        self.append("epoch", trainer.state.progress, **metrics)

    def on_end(self, trainer: Trainer | None = None, outcome: Outcome | None = None) -> None:
        """Bring the journal to storage."""
        self._journal.close(CLOSE_TIMEOUT_SECONDS)

    def log_start(self, progress: Progress, world: DistributedContext, skipped_checkpoints: list[str]) -> None:
        """Record the start of the steps, and an incident when the attempt before crashed or left no usable state."""
        incident = build_incident(self._attempt, progress.samples, skipped_checkpoints)
        if incident is not None:
            self.append("incident", progress, **asdict(incident))
            lost = (incident.seconds_to_detect or 0.0) + incident.seconds_to_restart
            self._replay = (progress.samples + incident.samples_replayed, time.monotonic(), lost)
        values = {"attempt": self._attempt.number, "workers": world.workers, "device": str(world.device)}
        values |= {"resumed": progress.samples > 0, "samples_per_epoch": progress.samples_per_epoch}
        seconds = round(time.time() - self._attempt.start_time, 3)
        self.append("started", progress, **values, seconds_to_start=seconds)
        # In storage before the first step, whatever happens next; storage that is down does not delay training long.
        self._journal.flush(START_FLUSH_SECONDS)

    def log_outcome(self, outcome: Outcome) -> None:
        """Record the outcome of the attempt."""
        kind = outcome.status if outcome.status in ("finished", "stopped") else "failed"
        self._journal.append(kind, outcome.samples, status=outcome.status, message=outcome.message)

    def log_crash(self, error: Exception) -> None:
        """Record the exception that ends the attempt; the next attempt names it as the cause of its incident."""
        self._journal.append("crashed", self._samples, cause=f"{type(error).__name__}: {error}")

    def append(self, kind: str, progress: Progress, **values: object) -> None:
        """Record an event at this progress."""
        self._samples = progress.samples
        self._journal.append(kind, progress.samples, **values)


class Profiler(Callback):
    """Traces the steps `first` to `last` of an attempt, counted from 0, into one file."""

    def __init__(self, steps: tuple[int, int], attempt: Attempt, job: TrainJob, device: torch.device) -> None:
        first, last = steps
        self._url = file_io.join(job.folder, "profile", f"attempt-{attempt.number:06d}-rank-00000.json.gz")

        def choose_action(step: int) -> ProfilerAction:
            if step == last:
                return ProfilerAction.RECORD_AND_SAVE
            return ProfilerAction.RECORD if first <= step < last else ProfilerAction.NONE

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
        if self._profile.profiler is not None:  # else no step was traced
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
