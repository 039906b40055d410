"""Progress of many runs, read from their journals, and the table and log lines that show it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms.multi_crop import NUM_CROPS
from orchestrator.monitor import formatting
from orchestrator.monitor.journal_summary import NO_METRICS, EpochMetrics, parse_epoch_metrics, parse_int
from orchestrator.monitor.run_status import START_GRACE_SECONDS
from orchestrator.ray_backend.ray_env import get_submission_id
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler import run_plan
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.run_plan import RunHistory
from orchestrator.scheduler.scheduler import RunPhase
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.tracking.journal import Cursor
from orchestrator.training.run_dir import get_journal_dir

POLL_SECONDS = 1.0


@dataclass
class RunProgress:
    """Progress of one run."""

    spec: RunSpec
    status: RunPhase = "waiting"
    metrics: EpochMetrics = NO_METRICS  # of the last epoch
    restarts: int = 0
    cursor: Cursor | None = None
    running_since: float | None = None  # unix seconds
    has_started: bool = False  # its workers have begun since then
    samples: int = 0
    samples_per_epoch: int | None = None
    workers: int | None = None  # of the last attempt
    error_curve: list[tuple[float, float]] = field(default_factory=list)  # epoch, top-1 error in percent

    @property
    def state(self) -> str:
        """The status shown: a run whose workers have not begun yet is starting, or waits for a busy cluster."""
        if self.status != "running" or self.has_started or self.running_since is None:
            return self.status
        return "starting" if time.time() - self.running_since < START_GRACE_SECONDS else "WAITING"

    def apply(self, event: Event) -> None:
        """Take in an event of the journal."""
        self.samples = self.samples if event.samples is None else event.samples
        if event.kind == "incident":
            self.restarts += 1
        elif event.kind == "started":
            self.has_started = True
            self.workers = parse_int(event.values.get("workers")) or self.workers
            self.samples_per_epoch = parse_int(event.values.get("samples_per_epoch"))
        elif event.kind == "epoch":
            self.metrics = parse_epoch_metrics(event)
            if self.metrics.top1_error is not None:
                # After a restart epochs may come again.
                self.error_curve = [point for point in self.error_curve if point[0] < self.metrics.epoch]
                self.error_curve.append((float(self.metrics.epoch), self.metrics.top1_error))

    def format_event(self, event: Event) -> str | None:
        """Return the log line of an event that has one."""
        if event.kind == "epoch":
            metrics = parse_epoch_metrics(event)
            loss, top1, _, speed = formatting.format_metrics(metrics)
            epoch = f"epoch {metrics.epoch}/{self.spec.recipe.epochs}"
            return f"{epoch}, loss {loss}, top-1 error {top1}%, {speed} images/s"
        if event.kind == "incident":
            return f"RESTARTED: {event.values.get('cause')}; {event.values.get('samples_replayed')} samples to replay"
        if event.kind == "weights":
            return str(event.values.get("loaded"))
        if event.kind == "started" and event.values.get("resumed"):
            return f"resumed after {event.samples} samples"
        return None


class ProgressMonitor:
    """The progress of some runs, and estimates of the time left; `poll` brings it up to date."""

    def __init__(
        self,
        specs: Sequence[RunSpec],
        scored_images: int = 0,
        manifest: Manifest | None = None,
        config: PlanConfig | None = None,
    ) -> None:
        """scored_images: of each run when all are trained, on all crops. manifest: needed for estimates."""
        self.rows = {spec.name: RunProgress(spec) for spec in specs}
        self._scored_images, self._manifest, self._config = scored_images, manifest, config or PlanConfig()

    def update_phase(self, spec: RunSpec, status: RunPhase) -> None:
        """Record that a run changed its phase."""
        row = self.rows[spec.name]
        row.status = status
        if status == "running":
            row.running_since, row.has_started = time.time(), False

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
                row.apply(event)
                news.append((row, event))
        return news

    def get_histories(self) -> dict[str, RunHistory]:
        """Return the facts that estimates need, by name."""
        histories = {}
        for name, row in self.rows.items():
            epochs = row.samples / row.samples_per_epoch if row.samples_per_epoch else row.metrics.epoch
            speed = row.metrics.images_per_second
            histories[name] = RunHistory(epochs, speed, row.workers, row.status == "finished")
        return histories

    def count_concurrent(self, slots: int) -> int:
        """Return how many runs are trained at the same time on so many slots, at least 1."""
        return max(1, run_plan.count_concurrent([row.spec for row in self.rows.values()], slots))

    def estimate_training_seconds(self, slots: int) -> float | None:
        """Estimate the seconds until the last run ends on so many slots; None before a speed is known."""
        histories = self.get_histories()
        measured = any(history.images_per_second for history in histories.values())
        durations, in_seconds = run_plan.estimate_durations(
            [row.spec for row in self.rows.values()],
            histories,
            self._manifest,
            None if measured else self._config.images_per_second,
        )
        if not in_seconds:
            return None
        ends, waiting = [], []
        for row, duration in zip(self.rows.values(), durations, strict=True):
            if row.status == "waiting":
                waiting.append(self._config.start_seconds + duration)
            elif row.status == "running":
                ends.append(duration + (0.0 if row.has_started else self._config.start_seconds))
        waiting.sort(reverse=True)
        starts = run_plan.compute_start_times(waiting, self.count_concurrent(slots), ends)
        return max([*ends, *map(sum, zip(starts, waiting, strict=True))], default=0.0)

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
        forward_images = self._scored_images * NUM_CROPS * run_plan.VALIDATION_SHARE
        return sum(forward_images / speeds.get(name, usual) for name in self.rows) / max(1, slots)


class ProgressTable:
    """A table of the progress in a terminal, lines in a log, refreshed in a thread while its `with` block runs."""

    def __init__(self, progress: ProgressMonitor, slots: Callable[[], int], console: Console) -> None:
        """slots: returns the workers that fit on the cluster now."""
        self._progress, self._slots, self._console = progress, slots, console
        self._reported_waiting: set[str] = set()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.refresh()
        if self._live is not None:
            self._live.stop()

    def _run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self.refresh()

    def build_table(self) -> Table:
        """Build the table; it fits 100 columns."""
        table = formatting.make_progress_table("restarts", self._format_headline())
        for row in self._progress.rows.values():
            name, epochs = row.spec.recipe.name, f"{row.metrics.epoch}/{row.spec.recipe.epochs}"
            table.add_row(name, row.state, epochs, *formatting.format_metrics(row.metrics), str(row.restarts))
        return table

    def _format_headline(self) -> str:
        rows = self._progress.rows.values()
        concurrent = self._progress.count_concurrent(self._slots())
        ended = sum(row.status not in ("waiting", "running") for row in rows)
        waves = math.ceil(len(rows) / concurrent)
        wave = f"wave {min(waves, ended // concurrent + 1)} of {waves}, " if waves > 1 else ""
        return f"{wave}{concurrent} at a time, {self._format_time_left()}"

    def _format_time_left(self) -> str:
        slots = self._slots()
        training = self._progress.estimate_training_seconds(slots)
        scoring = self._progress.estimate_scoring_seconds(slots)
        total = None if training is None or scoring is None else training + scoring
        scores = f", scoring up to {formatting.format_duration(scoring)} of it" if scoring else ""
        return f"{formatting.format_duration(total)} left{scores}, done at about {formatting.format_eta(total)}"

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
                self._print_line(row, f"{line}; {self._format_time_left()}")

    def _print_line(self, row: RunProgress, text: str | None) -> None:
        formatting.print_line(self._console, f"{row.spec.name}: {text}")
