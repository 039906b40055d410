"""Progress of many runs, read from their journals, and the table and log lines that show it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from orchestrator.data.transforms.multi_crop import NUM_CROPS
from orchestrator.monitor.formatting import format_duration, format_eta
from orchestrator.monitor.journal_summary import NO_METRICS, EpochMetrics, parse_epoch_metrics, parse_int
from orchestrator.monitor.live_table import LiveTable, format_metrics, make_progress_table
from orchestrator.monitor.run_status import START_GRACE_SECONDS
from orchestrator.ray_backend.ray_env import get_submission_id
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler import run_plan
from orchestrator.scheduler.estimate import VALIDATION_SHARE, RunHistory
from orchestrator.scheduler.scheduler import RunPhase
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.tracking.journal import Cursor
from orchestrator.training.run_dir import get_journal_dir


@dataclass
class RunProgress:
    """Progress of one run."""

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
    epoch_end_time: float | None = None  # unix seconds; before the first epoch: when the attempt started

    @property
    def state(self) -> str:
        """The status shown: a run whose workers have not begun yet is starting, or waits for a busy cluster."""
        if self.status != "running" or self.attempt_start is not None or self.running_since is None:
            return self.status
        return "starting" if time.time() - self.running_since < START_GRACE_SECONDS else "WAITING"

    @property
    def history(self) -> RunHistory:
        """The facts that estimates need."""
        metrics = self.metrics
        return RunHistory(metrics.epoch, metrics.images_per_second, self.workers, self.status == "finished")

    @property
    def epochs_left(self) -> int:
        """Epochs that have not ended."""
        return max(0, self.spec.recipe.epochs - self.metrics.epoch)

    def apply(self, event: Event) -> None:
        """Take in an event of the journal."""
        if event.kind == "incident":
            self.restarts += 1
        elif event.kind == "started":
            self.attempt_start = (event.time, self.metrics.epoch)
            self.epoch_end_time = event.time
            self.workers = parse_int(event.values.get("workers")) or self.workers
        elif event.kind == "epoch":
            self.metrics = parse_epoch_metrics(event)
            epoch, self.epoch_end_time = self.metrics.epoch, event.time
            if self.metrics.top1_error is not None:
                # After a restart epochs may come again.
                self.error_curve = [point for point in self.error_curve if point[0] < epoch]
                self.error_curve.append((float(epoch), self.metrics.top1_error))
            if self.attempt_start is not None and epoch > self.attempt_start[1]:
                self.seconds_per_epoch = (event.time - self.attempt_start[0]) / (epoch - self.attempt_start[1])

    def format_event(self, event: Event) -> str | None:
        """Return the log line of an event that has one."""
        if event.kind == "epoch":
            metrics = parse_epoch_metrics(event)
            loss, top1, _, speed = format_metrics(metrics)
            return (
                f"epoch {metrics.epoch}/{self.spec.recipe.epochs}, loss {loss}, top-1 error {top1}%, {speed} images/s"
            )
        if event.kind == "incident":
            return f"RESTARTED: {event.values.get('cause')}; {event.values.get('samples_replayed')} samples to replay"
        if event.kind == "weights":
            return str(event.values.get("loaded"))
        if event.kind == "started" and event.values.get("resumed"):
            return f"resumed after {event.samples} samples"
        return None


class ProgressMonitor:
    """The progress of some runs, and estimates of the time left; `poll` brings it up to date."""

    def __init__(self, specs: Sequence[RunSpec], scored_images: int = 0) -> None:
        """scored_images: of each run when all are trained, on all crops."""
        self.rows = {spec.name: RunProgress(spec) for spec in specs}
        self._scored_images = scored_images
        self._epoch_durations = dict.fromkeys(self.rows, 1.0)  # expected
        self._in_seconds = False
        self._start_seconds = 0.0
        self._order = list(self.rows)
        self._measured_starts: list[float] = []  # seconds from launch to first step

    def set_expected_durations(self, durations: Mapping[str, float], in_seconds: bool, start_seconds: float) -> None:
        """Take the plan's durations of the runs that are not finished, by name, in starting order."""
        self._in_seconds, self._start_seconds = in_seconds, start_seconds
        self._epoch_durations |= {
            name: value / max(1, self.rows[name].epochs_left) for name, value in durations.items()
        }
        self._order = list(durations)

    def update_phase(self, spec: RunSpec, status: RunPhase, message: str) -> None:
        """Record that a run changed its phase."""
        row = self.rows[spec.name]
        row.status, row.message = status, message
        if status == "running":
            row.running_since, row.attempt_start = time.time(), None

    def poll(self, waiting: bool = False) -> list[tuple[RunProgress, Event]]:
        """Read the new events of the journals; return them with their rows, which are up to date already.

        waiting: read those of waiting runs, too; they have a journal when an earlier job began them.
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
                continue  # the next poll reads it
            for event in events:
                since = row.running_since
                if event.kind == "started" and since is not None and row.attempt_start is None and event.time >= since:
                    self._measured_starts.append(event.time - since)
                row.apply(event)
                news.append((row, event))
        return news

    def get_histories(self) -> Mapping[str, RunHistory]:
        """Return the facts that estimates need, by name."""
        return {name: row.history for name, row in self.rows.items()}

    def count_concurrent(self, slots: int) -> int:
        """Return how many runs are trained at the same time on so many slots."""
        placement = next(iter(self.rows.values())).spec.placement
        return max(1, min(slots // placement.fewest_workers, placement.at_once or len(self.rows), len(self.rows)))

    def estimate_training_seconds(self, slots: int) -> float | None:
        """Estimate the seconds until the last run ends on so many slots; None before a speed is known.

        Runs whose speed is not measured yet are as much slower than expected as the others are.
        """
        running = [row for row in self.rows.values() if row.status == "running"]
        waiting = [self.rows[name] for name in self._order if self.rows[name].status == "waiting"]
        slowdown = self._estimate_slowdown()
        start = median(self._measured_starts) if self._measured_starts else self._start_seconds
        seconds_left = []
        for row in (*running, *waiting):
            seconds = self._estimate_row_seconds(row, slowdown)
            if seconds is None:
                return None
            seconds_left.append(seconds + (0.0 if row.status == "running" and row.attempt_start is not None else start))
        ends, durations = seconds_left[: len(running)], seconds_left[len(running) :]
        starts = run_plan.compute_start_times(durations, self.count_concurrent(slots), ends)
        return max([*ends, *map(sum, zip(starts, durations, strict=True))], default=0.0)

    def estimate_scoring_seconds(self, slots: int) -> float | None:
        """Estimate the seconds of scoring after the last run, from the speed of training; None before one is known.

        An upper bound: crops of square images coincide, and existing scores are reused.
        """
        if not self._scored_images:
            return 0.0
        speeds = {
            name: row.metrics.images_per_second / (row.workers or row.spec.placement.workers)
            for name, row in self.rows.items()
            if row.metrics.images_per_second
        }
        if not speeds:
            return None
        usual = mean(speeds.values())
        forward_images = self._scored_images * NUM_CROPS * VALIDATION_SHARE
        return sum(forward_images / speeds.get(name, usual) for name in self.rows) / max(1, slots)

    def _estimate_row_seconds(self, row: RunProgress, slowdown: float | None) -> float | None:
        """Estimate the seconds of training left: as measured, else as expected times `slowdown`."""
        if row.seconds_per_epoch is None:
            expected = self._epoch_durations[row.spec.name]
            return None if slowdown is None else row.epochs_left * expected * slowdown
        running = row.status == "running" and row.epoch_end_time is not None
        since = time.time() - row.epoch_end_time if running and row.epoch_end_time is not None else 0.0
        in_epoch = min(max(since, 0.0), row.seconds_per_epoch)
        return max(0.0, row.epochs_left * row.seconds_per_epoch - in_epoch)

    def _estimate_slowdown(self) -> float | None:
        """Return the mean of measured over expected durations."""
        expected = self._epoch_durations
        ratios = [
            row.seconds_per_epoch / expected[name]
            for name, row in self.rows.items()
            if row.seconds_per_epoch is not None and expected[name] > 0
        ]
        if ratios:
            return mean(ratios)
        return 1.0 if self._in_seconds else None


class ProgressTable(LiveTable):
    """A table of the progress in a terminal, lines in a log, while its `with` block runs."""

    def __init__(self, progress: ProgressMonitor, slots: Callable[[], int], console: Console) -> None:
        """slots: returns the workers that fit on the cluster now."""
        super().__init__(console, "progress")
        self._progress, self._slots = progress, slots
        self._reported_waiting: set[str] = set()

    def print_final(self) -> None:
        """Print the table as it stands at the end."""
        self._console.print(self.build_table())

    def build_table(self) -> Table:
        """Build the table; it fits 100 columns."""
        table = make_progress_table("restarts", self._format_headline())
        for row in self._progress.rows.values():
            epochs = f"{row.metrics.epoch}/{row.spec.recipe.epochs}"
            table.add_row(row.spec.recipe.name, row.state, epochs, *format_metrics(row.metrics), str(row.restarts))
        return table

    def _estimate_seconds(self) -> tuple[float | None, float | None, float | None]:
        """Return the seconds left of training, of scoring, and of both."""
        slots = self._slots()
        training = self._progress.estimate_training_seconds(slots)
        scoring = self._progress.estimate_scoring_seconds(slots)
        return training, scoring, None if training is None or scoring is None else training + scoring

    def _format_headline(self) -> str:
        rows = self._progress.rows.values()
        concurrent = self._progress.count_concurrent(self._slots())
        ended = sum(row.status not in ("waiting", "running") for row in rows)
        waves = math.ceil(len(rows) / concurrent)
        _, scoring, total = self._estimate_seconds()
        scores = f", scoring up to {format_duration(scoring)} of it" if scoring else ""
        wave = f"wave {min(waves, ended // concurrent + 1)} of {waves}, " if waves > 1 else ""
        return f"{wave}{concurrent} at a time, {format_duration(total)} left{scores}, done at about {format_eta(total)}"

    def _format_eta_line(self) -> str:
        training, scoring, total = self._estimate_seconds()
        if scoring == 0:
            return f"all done in about {format_duration(training)}, at {format_eta(training)}"
        return (
            f"all trained in about {format_duration(training)}, at {format_eta(training)}, and scored up to "
            f"{format_duration(scoring)} later, at {format_eta(total)}"
        )

    def refresh(self) -> None:
        """Update the table, or print a line for each new event."""
        news = self._progress.poll()
        if self._live is not None:
            for row, event in news:
                if event.kind == "weights":
                    self._print_line(row, row.format_event(event))
            self._live.update(self.build_table(), refresh=True)
            return
        for row in self._progress.rows.values():
            if row.state == "WAITING" and row.spec.name not in self._reported_waiting:
                self._reported_waiting.add(row.spec.name)
                own = ", or this job's own --entrypoint-num-cpus or -gpus hold them" if get_submission_id() else ""
                self._print_line(row, f"WAITING for workers: others use the cluster, or it lost nodes{own}")
        for row, event in news:
            if (line := row.format_event(event)) is not None:
                self._print_line(row, f"{line}, {self._format_eta_line()}")

    def _print_line(self, row: RunProgress, text: str | None) -> None:
        self._console.print(f"{row.spec.name}: {text}", highlight=False, markup=False)
