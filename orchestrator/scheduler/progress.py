"""What is known of each run while it runs, read from the journals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from rich.table import Table

from orchestrator.data.transforms.multi_crop import NUM_CROPS
from orchestrator.monitor.formatting import (
    NO_METRICS,
    EpochMetrics,
    format_duration,
    format_eta,
    format_number,
    parse_epoch_metrics,
    parse_int,
)
from orchestrator.monitor.live_table import LiveTable
from orchestrator.ray_backend.ray_env import get_submission_id
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler import run_plan
from orchestrator.scheduler.estimate import VALIDATION_SHARE, Durations, RunHistory
from orchestrator.scheduler.run_plan import DEFAULT_SCALING, ScalingModel
from orchestrator.scheduler.scheduler import RunPhase
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.tracking.journal import Cursor
from orchestrator.training.run_dir import get_journal_dir

# Longer than the start of a run takes on a busy machine.
START_GRACE_SECONDS = 60.0


@dataclass
class RunProgress:
    """One run as the board knows it."""

    spec: RunSpec
    status: RunPhase = "waiting"
    message: str = ""
    metrics: EpochMetrics = NO_METRICS  # of the last epoch
    restarts: int = 0
    seconds_per_epoch: float | None = None
    cursor: Cursor | None = None
    attempt_start: tuple[float, int] | None = None  # unix seconds, epoch
    running_since: float | None = None  # unix seconds
    error_curve: list[tuple[float, float]] = field(default_factory=list)  # epoch, top-1 error in percent
    workers: int | None = None  # of the last attempt
    epoch_end_time: float | None = None  # unix seconds

    @property
    def state(self) -> str:
        """The status for people: a run whose workers have not begun yet is starting, or waits for a busy cluster."""
        if self.status != "running" or self.attempt_start is not None or self.running_since is None:
            return self.status
        return "starting" if time.time() - self.running_since < START_GRACE_SECONDS else "WAITING"

    @property
    def history(self) -> RunHistory:
        """What a plan wants to know of it."""
        figures = self.metrics
        return RunHistory(figures.epoch, figures.images_per_second, self.workers, self.status == "finished")

    @property
    def epochs_left(self) -> int:
        """Epochs that have not ended."""
        return max(0, self.spec.recipe.epochs - self.metrics.epoch)


class ProgressMonitor:
    """The rows of a fleet; `poll` brings them up to date."""

    def __init__(self, specs: Sequence[RunSpec], scored_images: int = 0) -> None:
        """scored_images: of each run when all are trained, on all crops."""
        self.rows = {spec.name: RunProgress(spec) for spec in specs}
        self._scored_images = scored_images
        self.start_time = time.time()
        self._own = {spec.name: spec.placement.workers for spec in specs}
        self._order = [spec.name for spec in specs]
        self._epoch = dict.fromkeys(self._order, 1.0)  # expected duration of one, with the run's own workers
        self._in_seconds = False
        self._pace = DEFAULT_SCALING
        self._starts: list[float] = []  # seconds from launch to first step

    def set_expected_durations(self, order: Sequence[RunSpec], expected: Durations, pace: ScalingModel) -> None:
        """What the plan says of the runs that are not done: their order, and how long each takes in `order`."""
        self._order, self._in_seconds, self._pace = [spec.name for spec in order], expected.in_seconds, pace
        for name, duration in zip(self._order, expected.values, strict=True):
            self._epoch[name] = duration / max(1, self.rows[name].epochs_left)

    def update_phase(self, spec: RunSpec, status: RunPhase, message: str) -> None:
        """A run changed its state."""
        row = self.rows[spec.name]
        row.status, row.message = status, message
        if status == "running":
            row.running_since, row.attempt_start = time.time(), None
            if spec.placement.workers != row.spec.placement.workers:
                row.spec, row.seconds_per_epoch = spec, None  # measured with others

    def poll(self, waiting: bool = False) -> list[tuple[RunProgress, Event]]:
        """Read what is new in the journals; the new events with their rows, each row already up to date.

        waiting: look at runs that wait, too; they have a journal when they were begun by an earlier job.
        """
        news = []
        for row in self.rows.values():
            if row.status == "waiting" and not waiting:
                continue
            try:
                events, row.cursor = journal.read_events(get_journal_dir(row.spec.folder), row.cursor)
            except journal.DamagedSegmentError as error:
                row.cursor = error.cursor  # it would hide all that comes after it
                continue
            except OSError:
                # Looking is not worth a failure: what is missed now is seen at the next poll.
                continue
            for event in events:
                if event.kind == "started":
                    self._record_start(row, event)
                _apply_event(row, event)
                news.append((row, event))
        return news

    def get_histories(self) -> Mapping[str, RunHistory]:
        """What is known of the runs, by name."""
        return {name: row.history for name, row in self.rows.items()}

    def estimate_start_seconds(self) -> float:
        """From a launch to the first step: as measured, else as the plan has it."""
        return median(self._starts) if self._starts else self._pace.launch_overhead

    def estimate_seconds_left(self, spec: RunSpec) -> float | None:
        """Of a run's training with its present workers, measured in its present attempt; else None."""
        row = self.rows[spec.name]
        return (
            None
            if row.attempt_start is None or row.seconds_per_epoch is None
            else self._estimate_row_seconds(row, None)
        )

    def estimate_training_seconds(self, slots: int) -> float | None:
        """Seconds until the last run ends on so many slots; None before a speed is known.

        Runs whose speed is not measured yet are as much slower than expected as the others are.
        """
        running = [row for row in self.rows.values() if row.status == "running"]
        waiting = [self.rows[name] for name in self._order if self.rows[name].status == "waiting"]
        scale = self._compute_slowdown()
        left = {row.spec.name: self._estimate_row_seconds(row, scale) for row in (*running, *waiting)}
        known = {name: seconds for name, seconds in left.items() if seconds is not None}
        if len(known) < len(left):
            return None
        start = self.estimate_start_seconds()
        busy = [
            (known[row.spec.name] + (start if row.attempt_start is None else 0.0), row.spec.placement.workers)
            for row in running
        ]
        lasts = [known[row.spec.name] + start for row in waiting]
        workers = [min(row.spec.placement.workers, max(slots, 1)) for row in waiting]
        at_once = next((row.spec.placement.at_once for row in waiting), None)
        starts = run_plan.compute_start_times(lasts, workers, slots, at_once, busy)
        ends = [begin + last for begin, last in zip(starts, lasts, strict=True)]
        return max([end for end, _ in busy] + ends, default=0.0)

    def estimate_scoring_seconds(self, slots: int) -> float | None:
        """Seconds that scoring takes after the last run on so many slots, by the speed of training; None before one.

        At most so: crops of square images coincide, and images that were scored before are not scored again.
        """
        speeds = {
            name: row.metrics.images_per_second / (row.workers or row.spec.placement.workers)
            for name, row in self.rows.items()
            if row.metrics.images_per_second
        }
        if not self._scored_images:
            return 0.0
        if not speeds:
            return None
        usual = sum(speeds.values()) / len(speeds)
        each = self._scored_images * NUM_CROPS * VALIDATION_SHARE
        return sum(each / speeds.get(name, usual) for name in self.rows) / max(1, slots)

    def _estimate_row_seconds(self, row: RunProgress, scale: float | None) -> float | None:
        """Seconds of training left: as measured, else as expected times `scale`."""
        if row.seconds_per_epoch is None:
            return None if scale is None else row.epochs_left * self._get_expected_epoch_seconds(row) * scale
        since = time.time() - row.epoch_end_time if row.status == "running" and row.epoch_end_time is not None else 0.0
        begun = min(max(since, 0.0), row.seconds_per_epoch)
        return max(0.0, row.epochs_left * row.seconds_per_epoch - begun)

    def _get_expected_epoch_seconds(self, row: RunProgress) -> float:
        """The expected duration of an epoch with the workers that the run has now."""
        return self._pace.scale_duration(
            self._epoch[row.spec.name], self._own[row.spec.name], row.spec.placement.workers
        )

    def _compute_slowdown(self) -> float | None:
        """Seconds that what is expected to take 1 has taken."""
        pairs = [(row.seconds_per_epoch, self._get_expected_epoch_seconds(row)) for row in self.rows.values()]
        found = [seconds / expected for seconds, expected in pairs if seconds is not None and expected > 0]
        if found:
            return sum(found) / len(found)
        return 1.0 if self._in_seconds else None

    def _record_start(self, row: RunProgress, event: Event) -> None:
        if row.running_since is not None and row.attempt_start is None and event.time >= row.running_since:
            self._starts.append(event.time - row.running_since)
        row.attempt_start = (event.time, row.metrics.epoch)
        row.epoch_end_time = event.time
        row.workers = parse_int(event.values.get("workers")) or row.workers


def _apply_event(row: RunProgress, event: Event) -> None:
    if event.kind == "incident":
        row.restarts += 1
    elif event.kind == "epoch":
        row.metrics = parse_epoch_metrics(event)
        epoch, row.epoch_end_time = row.metrics.epoch, event.time
        if row.metrics.top1_error is not None:
            # After a restart epochs may be seen again.
            row.error_curve = [point for point in row.error_curve if point[0] < epoch]
            row.error_curve.append((float(epoch), row.metrics.top1_error))
        if row.attempt_start is not None and epoch > row.attempt_start[1]:
            row.seconds_per_epoch = (event.time - row.attempt_start[0]) / (epoch - row.attempt_start[1])


class ProgressTable(LiveTable):
    """Shows a board in the background while its `with` block runs."""

    def __init__(self, board: ProgressMonitor, slots: Callable[[], int], console: Console) -> None:
        """slots: workers that the cluster holds now."""
        super().__init__(console, "progress")
        self._board, self._slots = board, slots
        self._told_waiting: set[str] = set()

    def print_final(self) -> None:
        """The table as it stands at the end."""
        self._console.print(self.build_table())

    def build_table(self) -> Table:
        """The board as a table that fits 100 columns."""
        table = Table(title=self._format_headline(), title_justify="left", box=None, pad_edge=False)
        columns = ("model", "state", "epoch", "loss", "top-1 %", "top-5 %", "images/s", "restarts")
        for name in columns:
            table.add_column(name, justify="left" if name in ("model", "state") else "right", no_wrap=True)
        for row in self._board.rows.values():
            table.add_row(*_format_cells(row))
        return table

    def _format_headline(self) -> str:
        """How far all runs together are."""
        rows = self._board.rows.values()
        placement = next(iter(rows)).spec.placement
        most = placement.at_once or len(rows)
        at_once = max(1, min(self._slots() // placement.fewest_workers, most, len(rows)))
        ended = sum(row.status not in ("waiting", "running") for row in rows)
        waves = math.ceil(len(rows) / at_once)
        training, scoring = (
            self._board.estimate_training_seconds(self._slots()),
            self._board.estimate_scoring_seconds(self._slots()),
        )
        eta = _add_seconds(training, scoring)
        scores = f", scoring up to {format_duration(scoring)} of it" if scoring else ""
        wave = f"wave {min(waves, ended // at_once + 1)} of {waves}, " if waves > 1 else ""
        return f"{wave}{at_once} at once, {format_duration(eta)} left{scores}, done at about {format_eta(eta)}"

    def _format_eta_line(self) -> str:
        """When everything is done."""
        training, scoring = (
            self._board.estimate_training_seconds(self._slots()),
            self._board.estimate_scoring_seconds(self._slots()),
        )
        if scoring == 0:
            return f"all done in about {format_duration(training)}, at {format_eta(training)}"
        whole = _add_seconds(training, scoring)
        return (
            f"all trained in about {format_duration(training)}, at {format_eta(training)}, and scored up "
            f"to {format_duration(scoring)} "
            f"later, at {format_eta(whole)}"
        )

    def refresh(self) -> None:
        """The table, or a line for each event since the last look."""
        news = self._board.poll()
        if self._live is not None:
            for row, event in news:
                if event.kind == "weights":
                    self._console.print(f"{row.spec.name}: {_format_event(row, event)}", highlight=False, markup=False)
            self._live.update(self.build_table(), refresh=True)
            return
        for row in self._board.rows.values():
            if row.state == "WAITING" and row.spec.name not in self._told_waiting:
                self._told_waiting.add(row.spec.name)
                own = ", or this job's own --entrypoint-num-cpus or -gpus hold them" if get_submission_id() else ""
                text = f"{row.spec.name}: WAITING for workers: others use the cluster, or it lost nodes{own}"
                self._console.print(text, highlight=False, markup=False)
        for row, event in news:
            if (line := _format_event(row, event)) is not None:
                done = self._format_eta_line()
                self._console.print(f"{row.spec.name}: {line}, {done}", highlight=False, markup=False)


def _add_seconds(training: float | None, scoring: float | None) -> float | None:
    return None if training is None or scoring is None else training + scoring


def _format_cells(row: RunProgress) -> tuple[str, ...]:
    return (
        row.spec.recipe.name,
        row.state,
        f"{row.metrics.epoch}/{row.spec.recipe.epochs}",
        format_number(row.metrics.loss, ".3f"),
        format_number(row.metrics.top1_error, ".2f"),
        format_number(row.metrics.top5_error, ".2f"),
        format_number(row.metrics.images_per_second, ".0f"),
        str(row.restarts),
    )


def _format_event(row: RunProgress, event: Event) -> str | None:
    if event.kind == "epoch":
        at = parse_epoch_metrics(event)
        return (
            f"epoch {at.epoch}/{row.spec.recipe.epochs}, loss {format_number(at.loss, '.3f')}, "
            f"top-1 error {format_number(at.top1_error, '.2f')}%, {format_number(at.images_per_second, '.0f')} images/s"
        )
    if event.kind == "incident":
        return f"RESTARTED: {event.values.get('cause')}; {event.values.get('samples_replayed')} samples to replay"
    if event.kind == "weights":
        return str(event.values.get("loaded"))
    if event.kind == "started" and event.values.get("resumed"):
        return f"resumed after {event.samples} samples"
    return None
