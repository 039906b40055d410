"""Rank 0's side of a run's record: journal events, the stop flag, tracebacks. On other ranks it does nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from orchestrator.data.audit import BadEntry
from orchestrator.storage import files
from orchestrator.tracking import journal
from orchestrator.tracking.journal import Cursor, DamagedSegment, JournalWriter
from orchestrator.training.job import Outcome, TrainJob, journal_of
from orchestrator.training.progress import Progress
from orchestrator.training.world import World

POLL_SECONDS = 1.0
CLOSE_SECONDS = 30.0
START_SECONDS = 5.0
MOST_BAD_TOLD = 100  # of an attempt; the record kept with the weights has them all
LOST = "the attempt before ended without an outcome: worker or node lost, or driver gone"


class Recorder:
    """Writes what happens in this attempt."""

    def __init__(self, job: TrainJob, world: World, attempt: int) -> None:
        self._stop_flag = job.stop_flag
        self._attempt = attempt
        self._samples = 0  # of the last event
        self._bad_told = 0
        self._stopped = threading.Event()
        self._closing = threading.Event()
        self._journal = JournalWriter(journal_of(job.folder), attempt) if world.leads else None
        if world.leads:
            threading.Thread(target=self._watch, name="stop-flag", daemon=True).start()

    def started(self, progress: Progress, world: World, previous: journal.Event | None, passed_over: list[str]) -> None:
        """An attempt begins; an incident when the one before ended without a word, or its checkpoints are no good."""
        if self._journal is None:
            return
        self._samples = progress.samples
        cause = _cause(self._attempt, previous)
        if cause is not None or passed_over:
            samples, moment = (previous.samples or 0, previous.time) if previous is not None else (0, time.time())
            self._journal.append(
                "incident",
                progress.samples,
                cause=cause or "a checkpoint could not be used",
                seconds_since_last_event=round(time.time() - moment, 3),
                samples_replayed=max(0, samples - progress.samples),
                attempt=self._attempt,
                checkpoints_passed_over=passed_over,
            )
        self._journal.append(
            "started",
            progress.samples,
            attempt=self._attempt,
            workers=world.workers,
            device=str(world.device),
            resumed=progress.samples > 0,
        )
        # On record before the first step, whatever happens next; storage that is down does not hold training up long.
        self._journal.flush(START_SECONDS)

    def stop_requested(self) -> bool:
        """Whether somebody set the stop flag; always False on ranks other than 0."""
        return self._stopped.is_set()

    def point(self, progress: Progress, loss: float, rate: float) -> None:
        """A point of the curves between two epoch ends."""
        self._samples = progress.samples
        if self._journal is not None:
            values = {"train/loss": loss, "train/rate": rate}
            self._journal.append("metrics", progress.samples, **values)

    def epoch(self, progress: Progress, metrics: dict[str, float]) -> None:
        """The metrics of an epoch that ended."""
        self._samples = progress.samples
        if self._journal is not None:
            self._journal.append("epoch", progress.samples, **metrics)

    def bad_samples(self, progress: Progress, found: Sequence[BadEntry]) -> None:
        """Samples that were given weight 0 for the first time."""
        if self._journal is None:
            return
        for one in found[: MOST_BAD_TOLD - self._bad_told]:
            self._bad_told += 1
            self._journal.append("bad-sample", progress.samples, **one.to_dict())

    def ended(self, outcome: Outcome) -> None:
        """The attempt ended with an outcome."""
        if self._journal is not None:
            kind = outcome.status if outcome.status in ("finished", "stopped") else "failed"
            self._journal.append(kind, outcome.samples, status=outcome.status, message=outcome.message)

    def crashed(self, error: Exception) -> None:
        """The attempt ends with an exception; the next one tells it as the cause of its incident."""
        if self._journal is not None:
            self._journal.append("crashed", self._samples, cause=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Bring the journal to storage and stop watching."""
        self._closing.set()
        if self._journal is not None:
            self._journal.close(CLOSE_SECONDS)

    def _watch(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                if files.exists(self._stop_flag):
                    self._stopped.set()
                    return
            except OSError:
                # Not to know is not to stop: a failed query ends no healthy run (pitfalls E44).
                continue


def _cause(attempt: int, previous: journal.Event | None) -> str | None:
    """Why the attempt before did not end in order; None when it did, or there was none."""
    if previous is None:
        # Killed before its first event came to storage.
        return LOST if attempt > 1 else None
    if previous.kind in ("finished", "stopped", "failed"):
        return None
    return f"the attempt before crashed: {previous.values['cause']}" if previous.kind == "crashed" else LOST


def last_event(job: TrainJob) -> journal.Event | None:
    """The last event of earlier attempts that can be read, None for a first one."""
    last: journal.Event | None = None
    cursor: Cursor | None = None
    while True:
        try:
            events, reached = journal.read(journal_of(job.folder), cursor)
        except DamagedSegment as error:
            cursor = error.cursor  # what an attempt said of itself must not keep the next one from starting
            continue
        last = events[-1] if events else last
        if reached == cursor or not events:
            return last
        cursor = reached
