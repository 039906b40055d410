"""What is known of each run while it runs, read from the journals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.fleet.figures import NOTHING, EpochFigures, of_epoch
from orchestrator.fleet.supervisor import RunStatus
from orchestrator.launch.config import RunSpec
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.tracking.journal import Cursor
from orchestrator.training.job import journal_of

# Longer than the start of a run takes on a busy machine.
WAITING_SECONDS = 60.0


@dataclass
class Row:
    """One run as the board knows it."""

    spec: RunSpec
    status: RunStatus = "waiting"
    message: str = ""
    figures: EpochFigures = NOTHING  # of the last epoch
    restarts: int = 0
    seconds_per_epoch: float | None = None
    cursor: Cursor | None = None
    attempt_began: tuple[float, int] | None = None  # unix seconds, epoch
    running_since: float | None = None  # unix seconds
    curve: list[tuple[float, float]] = field(default_factory=list)  # epoch, top-1 error in percent

    @property
    def state(self) -> str:
        """The status for people: a run whose workers have not begun yet is starting, or waits for a busy cluster."""
        if self.status != "running" or self.attempt_began is not None or self.running_since is None:
            return self.status
        return "starting" if time.time() - self.running_since < WAITING_SECONDS else "WAITING"


class Board:
    """The rows of a fleet; `poll` brings them up to date."""

    def __init__(self, specs: Sequence[RunSpec]) -> None:
        self.rows = {spec.name: Row(spec) for spec in specs}
        self.began = time.time()

    def change(self, spec: RunSpec, status: RunStatus, message: str) -> None:
        """A run changed its state."""
        row = self.rows[spec.name]
        row.status, row.message = status, message
        if status == "running":
            row.running_since, row.attempt_began = time.time(), None

    def poll(self, waiting: bool = False) -> list[tuple[Row, Event]]:
        """Read what is new in the journals; the new events with their rows, each row already up to date.

        waiting: look at runs that wait, too; they have a journal when they were begun by an earlier job.
        """
        news = []
        for row in self.rows.values():
            if row.status == "waiting" and not waiting:
                continue
            try:
                events, row.cursor = journal.read(journal_of(row.spec.folder), row.cursor)
            except journal.DamagedSegment as error:
                row.cursor = error.cursor  # it would hide all that comes after it
                continue
            except OSError:
                # Looking is not worth a failure: what is missed now is seen at the next poll.
                continue
            for event in events:
                _apply(row, event)
                news.append((row, event))
        return news

    def eta_seconds(self, at_once: int) -> float | None:
        """Seconds until the last run ends, from the measured speed; None before the first epoch."""
        speeds = [row.seconds_per_epoch for row in self.rows.values() if row.seconds_per_epoch]
        if not speeds:
            return None
        usual = sum(speeds) / len(speeds)
        left = [
            (row.spec.recipe.epochs - row.figures.epoch) * (row.seconds_per_epoch or usual)
            for row in self.rows.values()
            if row.status in ("waiting", "running")
        ]
        return max([sum(left) / at_once, *left], default=0.0)


def _apply(row: Row, event: Event) -> None:
    if event.kind == "started":
        row.attempt_began = (event.time, row.figures.epoch)
    elif event.kind == "incident":
        row.restarts += 1
    elif event.kind == "epoch":
        row.figures = of_epoch(event)
        epoch = row.figures.epoch
        if row.figures.top1_error is not None:
            # After a restart epochs may be seen again.
            row.curve = [point for point in row.curve if point[0] < epoch]
            row.curve.append((float(epoch), row.figures.top1_error))
        if row.attempt_began is not None and epoch > row.attempt_began[1]:
            row.seconds_per_epoch = (event.time - row.attempt_began[0]) / (epoch - row.attempt_began[1])
