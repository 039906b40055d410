"""What is known of each run while it runs, read from the journals."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from orchestrator.data.crops import NUM_CROPS
from orchestrator.fleet import schedule
from orchestrator.fleet.figures import NOTHING, EpochFigures, of_epoch, whole
from orchestrator.fleet.forecast import VALIDATION_SHARE, Durations, Seen
from orchestrator.fleet.plan import STEADY, Pace
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
    workers: int | None = None  # of the last attempt
    epoch_ended: float | None = None  # unix seconds

    @property
    def state(self) -> str:
        """The status for people: a run whose workers have not begun yet is starting, or waits for a busy cluster."""
        if self.status != "running" or self.attempt_began is not None or self.running_since is None:
            return self.status
        return "starting" if time.time() - self.running_since < WAITING_SECONDS else "WAITING"

    @property
    def seen(self) -> Seen:
        """What a plan wants to know of it."""
        figures = self.figures
        return Seen(figures.epoch, figures.images_per_second, self.workers, self.status == "finished")

    @property
    def epochs_left(self) -> int:
        """Epochs that have not ended."""
        return max(0, self.spec.recipe.epochs - self.figures.epoch)


class Board:
    """The rows of a fleet; `poll` brings them up to date."""

    def __init__(self, specs: Sequence[RunSpec], scored_images: int = 0) -> None:
        """scored_images: of each run when all are trained, on all crops."""
        self.rows = {spec.name: Row(spec) for spec in specs}
        self._scored_images = scored_images
        self.began = time.time()
        self._own = {spec.name: spec.placement.workers for spec in specs}
        self._order = [spec.name for spec in specs]
        self._epoch = dict.fromkeys(self._order, 1.0)  # expected duration of one, with the run's own workers
        self._in_seconds = False
        self._pace = STEADY
        self._starts: list[float] = []  # seconds from launch to first step

    def expect(self, order: Sequence[RunSpec], expected: Durations, pace: Pace) -> None:
        """What the plan says of the runs that are not done: their order, and how long each takes in `order`."""
        self._order, self._in_seconds, self._pace = [spec.name for spec in order], expected.in_seconds, pace
        for name, duration in zip(self._order, expected.values, strict=True):
            self._epoch[name] = duration / max(1, self.rows[name].epochs_left)

    def change(self, spec: RunSpec, status: RunStatus, message: str) -> None:
        """A run changed its state."""
        row = self.rows[spec.name]
        row.status, row.message = status, message
        if status == "running":
            row.running_since, row.attempt_began = time.time(), None
            if spec.placement.workers != row.spec.placement.workers:
                row.spec, row.seconds_per_epoch = spec, None  # measured with others

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
                if event.kind == "started":
                    self._started(row, event)
                _apply(row, event)
                news.append((row, event))
        return news

    def seen(self) -> Mapping[str, Seen]:
        """What is known of the runs, by name."""
        return {name: row.seen for name, row in self.rows.items()}

    def start_seconds(self) -> float:
        """From a launch to the first step: as measured, else as the plan has it."""
        return median(self._starts) if self._starts else self._pace.start

    def seconds_left(self, spec: RunSpec) -> float | None:
        """Of a run's training with its present workers, measured in its present attempt; else None."""
        row = self.rows[spec.name]
        return None if row.attempt_began is None or row.seconds_per_epoch is None else self._left(row, None)

    def eta_seconds(self, slots: int) -> float | None:
        """Seconds until the last run ends on so many slots; None before a speed is known.

        Runs whose speed is not measured yet are as much slower than expected as the others are.
        """
        running = [row for row in self.rows.values() if row.status == "running"]
        waiting = [self.rows[name] for name in self._order if self.rows[name].status == "waiting"]
        scale = self._scale()
        left = {row.spec.name: self._left(row, scale) for row in (*running, *waiting)}
        known = {name: seconds for name, seconds in left.items() if seconds is not None}
        if len(known) < len(left):
            return None
        start = self.start_seconds()
        busy = [
            (known[row.spec.name] + (start if row.attempt_began is None else 0.0), row.spec.placement.workers)
            for row in running
        ]
        lasts = [known[row.spec.name] + start for row in waiting]
        workers = [min(row.spec.placement.workers, max(slots, 1)) for row in waiting]
        at_once = next((row.spec.placement.at_once for row in waiting), None)
        starts = schedule.in_turn(lasts, workers, slots, at_once, busy)
        ends = [begin + last for begin, last in zip(starts, lasts, strict=True)]
        return max([end for end, _ in busy] + ends, default=0.0)

    def scoring_seconds(self, slots: int) -> float | None:
        """Seconds that scoring takes after the last run on so many slots, by the speed of training; None before one.

        At most so: crops of square images coincide, and images that were scored before are not scored again.
        """
        speeds = {
            name: row.figures.images_per_second / (row.workers or row.spec.placement.workers)
            for name, row in self.rows.items()
            if row.figures.images_per_second
        }
        if not self._scored_images:
            return 0.0
        if not speeds:
            return None
        usual = sum(speeds.values()) / len(speeds)
        each = self._scored_images * NUM_CROPS * VALIDATION_SHARE
        return sum(each / speeds.get(name, usual) for name in self.rows) / max(1, slots)

    def _left(self, row: Row, scale: float | None) -> float | None:
        """Seconds of training left: as measured, else as expected times `scale`."""
        if row.seconds_per_epoch is None:
            return None if scale is None else row.epochs_left * self._expected(row) * scale
        since = time.time() - row.epoch_ended if row.status == "running" and row.epoch_ended is not None else 0.0
        begun = min(max(since, 0.0), row.seconds_per_epoch)
        return max(0.0, row.epochs_left * row.seconds_per_epoch - begun)

    def _expected(self, row: Row) -> float:
        """The expected duration of an epoch with the workers that the run has now."""
        return self._pace.training(self._epoch[row.spec.name], self._own[row.spec.name], row.spec.placement.workers)

    def _scale(self) -> float | None:
        """Seconds that what is expected to take 1 has taken."""
        pairs = [(row.seconds_per_epoch, self._expected(row)) for row in self.rows.values()]
        found = [seconds / expected for seconds, expected in pairs if seconds is not None and expected > 0]
        if found:
            return sum(found) / len(found)
        return 1.0 if self._in_seconds else None

    def _started(self, row: Row, event: Event) -> None:
        if row.running_since is not None and row.attempt_began is None and event.time >= row.running_since:
            self._starts.append(event.time - row.running_since)
        row.attempt_began = (event.time, row.figures.epoch)
        row.epoch_ended = event.time
        row.workers = whole(event.values.get("workers")) or row.workers


def _apply(row: Row, event: Event) -> None:
    if event.kind == "incident":
        row.restarts += 1
    elif event.kind == "epoch":
        row.figures = of_epoch(event)
        epoch, row.epoch_ended = row.figures.epoch, event.time
        if row.figures.top1_error is not None:
            # After a restart epochs may be seen again.
            row.curve = [point for point in row.curve if point[0] < epoch]
            row.curve.append((float(epoch), row.figures.top1_error))
        if row.attempt_began is not None and epoch > row.attempt_began[1]:
            row.seconds_per_epoch = (event.time - row.attempt_began[0]) / (epoch - row.attempt_began[1])
