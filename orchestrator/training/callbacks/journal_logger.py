"""Rank 0's side of a run's record: journal events. On other ranks it does nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from orchestrator.data.sample_audit import BadEntry
from orchestrator.tracking.journal import JournalWriter
from orchestrator.training.attempts import Attempt, build_incident
from orchestrator.training.config import Outcome, TrainJob
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.run_dir import get_journal_dir
from orchestrator.training.train_state import Progress

CLOSE_TIMEOUT_SECONDS = 30.0
START_FLUSH_SECONDS = 5.0
MAX_BAD_SAMPLES_LOGGED = 100  # of an attempt; the record kept with the weights has them all


class JournalLogger:
    """Writes what happens in this attempt."""

    def __init__(self, job: TrainJob, world: DistributedContext, attempt: Attempt) -> None:
        self._attempt = attempt
        self._samples = 0  # of the last event
        self._bad_told = 0
        self._replay: tuple[int, float, float] | None = None  # samples to reach, when steps began, what came before
        self._journal = JournalWriter(get_journal_dir(job.folder), attempt.number) if world.is_rank_zero else None

    def log_start(self, progress: Progress, world: DistributedContext, passed_over: list[str], **facts: object) -> None:
        """The steps of an attempt begin; an incident when the one before did not end in order, or left no good state.

        facts: what else is worth knowing of this start.
        """
        if self._journal is None:
            return
        self._samples = progress.samples
        found = build_incident(self._attempt, progress.samples, passed_over)
        if found is not None:
            self._journal.append("incident", progress.samples, **asdict(found))
            lost = (found.seconds_to_detect or 0.0) + found.seconds_to_restart
            self._replay = (progress.samples + found.samples_replayed, time.monotonic(), lost)
        self._journal.append(
            "started",
            progress.samples,
            attempt=self._attempt.number,
            workers=world.workers,
            device=str(world.device),
            resumed=progress.samples > 0,
            samples_per_epoch=progress.samples_per_epoch,
            seconds_to_start=round(time.time() - self._attempt.start_time, 3),
            **facts,
        )
        # On record before the first step, whatever happens next; storage that is down does not hold training up long.
        self._journal.flush(START_FLUSH_SECONDS)

    def log_recovery(self, progress: Progress) -> None:
        """Training came this far; what was replayed after an incident is told once."""
        if self._journal is None or self._replay is None or progress.samples < self._replay[0]:
            return
        _, began, lost = self._replay
        self._replay = None
        seconds = time.monotonic() - began
        self._journal.append(
            "recovered",
            progress.samples,
            attempt=self._attempt.number,
            seconds_to_replay=round(seconds, 3),
            seconds_lost=round(lost + seconds, 3),
        )

    def log_step_metrics(self, progress: Progress, loss: float, rate: float) -> None:
        """Record a point of the curves between two epoch ends; the loss is the mean since the point before."""
        self._samples = progress.samples
        if self._journal is not None:
            values = {"train/step_loss": loss, "train/rate": rate}
            self._journal.append("metrics", progress.samples, **values)

    def log_epoch_metrics(self, progress: Progress, metrics: dict[str, float]) -> None:
        """The metrics of an epoch that ended."""
        self._samples = progress.samples
        if self._journal is not None:
            self._journal.append("epoch", progress.samples, **metrics)

    def log_event(self, kind: str, progress: Progress, **values: object) -> None:
        """Something else that happened."""
        if self._journal is not None:
            self._journal.append(kind, progress.samples, **values)

    def log_bad_samples(self, progress: Progress, found: Sequence[BadEntry]) -> None:
        """Samples that were given weight 0 for the first time."""
        if self._journal is None:
            return
        for one in found[: MAX_BAD_SAMPLES_LOGGED - self._bad_told]:
            self._bad_told += 1
            self._journal.append("bad-sample", progress.samples, **one.to_dict())

    def log_outcome(self, outcome: Outcome) -> None:
        """The attempt ended with an outcome."""
        if self._journal is not None:
            kind = outcome.status if outcome.status in ("finished", "stopped") else "failed"
            self._journal.append(kind, outcome.samples, status=outcome.status, message=outcome.message)

    def log_crash(self, error: Exception) -> None:
        """The attempt ends with an exception; the next one tells it as the cause of its incident."""
        if self._journal is not None:
            self._journal.append("crashed", self._samples, cause=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Bring the journal to storage."""
        if self._journal is not None:
            self._journal.close(CLOSE_TIMEOUT_SECONDS)
