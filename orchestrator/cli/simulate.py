"""Preview a recipe's learning-rate schedule and augmented images, without training."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.cli.config import SimulateConfig
from orchestrator.cli.exit_status import make_console
from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import flatten_config
from orchestrator.data import manifest, sampler
from orchestrator.data.build.sources import digits
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.ray_backend import previews
from orchestrator.ray_backend.launch_errors import PreflightError
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.storage import file_io
from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.tracker import MetricPoint, TrackedRun, TrackingError

MAX_ROWS = 26
MAX_LOGGED_RATES = 500


def run_simulate(config: SimulateConfig, console: Console | None = None) -> int:
    """Print the schedule; draw it, and a contact sheet of the data, as far as asked for; return the exit status.

    Raises ConfigError for impossible values, PreflightError when MLflow cannot be reached or denies access.
    """
    console = console or make_console()
    try:
        out = config.resolve_output_folder()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="simulate-") as temporary, _open_dataset(config) as (url, dataset):
        steps = _count_steps_per_epoch(config, dataset)
        columns = _tabulate_schedule(config.recipe, steps)
        console.print(_build_table(config.recipe, columns))
        if not (out or config.uses_mlflow):
            return 0
        pictures = _draw_pictures(config.recipe, steps, url, dataset, Path(temporary), console)
        for picture in pictures if out else ():
            where = file_io.join(out, picture.name)
            file_io.write_bytes(where, picture.read_bytes())
            console.print(f"written: {redaction.redact(where)}", highlight=False, soft_wrap=True)
        if config.uses_mlflow:
            where = _log_to_mlflow(config, steps, columns, pictures)
            console.print(f"MLflow:  {where}", highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _open_dataset(config: SimulateConfig) -> Iterator[tuple[str, Manifest | None]]:
    """Yield URL and manifest of the data, None without data; unpacked digits are packed in a temporary folder."""
    if not config.data:
        yield "", None
        return
    url = config.resolve_destination().data
    try:
        yield url, manifest.load(url, allow_elsewhere=config.allow_elsewhere)
        return
    except DataError as error:
        if config.data != EMBEDDED_DATASET:
            raise ConfigError(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="digits-") as temporary:
        yield temporary, digits.pack_digits(temporary)


def _count_steps_per_epoch(config: SimulateConfig, dataset: Manifest | None) -> int:
    samples = config.samples if dataset is None else dataset.count_samples(previews.TRAIN_SPLIT)
    steps = sampler.count_steps(samples, config.recipe.batch_size)
    if steps == 0:
        raise ConfigError(
            f"batch_size: must be at most the {samples} training images, got {config.recipe.batch_size}; lower it"
        )
    return steps


def _tabulate_schedule(recipe: Recipe, steps_per_epoch: int) -> dict[str, list[float]]:
    """Return the schedule at whole epochs, at the end of the warm-up and at the last step, column by column."""
    last = recipe.epochs * steps_per_epoch - 1
    warm = min(last, round(recipe.schedule.warmup_epochs * steps_per_epoch))
    chosen = {epoch * steps_per_epoch for epoch in range(0, recipe.epochs, _choose_stride(recipe.epochs))}
    steps = sorted({*chosen, warm, last})
    return {
        "epochs done": [step / steps_per_epoch for step in steps],
        "step": [float(step) for step in steps],
        "samples": [float(step * recipe.batch_size) for step in steps],
        "rate": [compute_lr(recipe.schedule, step, steps_per_epoch, recipe.epochs) for step in steps],
    }


def _choose_stride(epochs: int) -> int:
    """Return the epochs between rows: 1, 2 or 5 times a power of ten, for at most MAX_ROWS rows."""
    strides = (each * int(10**power) for power in range(9) for each in (1, 2, 5))
    return next(stride for stride in strides if epochs <= stride * MAX_ROWS)


def _build_table(recipe: Recipe, columns: dict[str, list[float]]) -> Table:
    title = (
        f"{recipe.name}: {recipe.schedule.kind} schedule, batches of {recipe.batch_size}, the last row its last step"
    )
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for epochs, step, samples, rate in zip(*columns.values(), strict=True):
        table.add_row(f"{epochs:.6g}", f"{step:,.0f}", f"{samples:,.0f}", f"{rate:.6g}")
    return table


def _draw_pictures(
    recipe: Recipe, steps: int, url: str, dataset: Manifest | None, folder: Path, console: Console
) -> list[Path]:
    """Draw the schedule and, with a dataset, a contact sheet; return the files."""
    schedule, sheet = folder / previews.SCHEDULE_FILE, folder / previews.CONTACT_SHEET_FILE
    previews.draw_schedule(recipe, steps, str(schedule))
    if dataset is None:
        console.print("no contact sheet: set --data to a dataset", highlight=False)
        return [schedule]
    if not previews.draw_contact_sheet(recipe, url, dataset, str(sheet)):
        console.print("no contact sheet: none of the selected images can be decoded", highlight=False)
        return [schedule]
    return [schedule, sheet]


def _log_to_mlflow(config: SimulateConfig, steps: int, columns: dict[str, list[float]], pictures: list[Path]) -> str:
    """Record everything in an MLflow run, the same one at each call; return its URL."""
    recipe, destination = config.recipe, config.resolve_destination()
    key = f"simulate/{recipe.name}-{compute_fingerprint(recipe, steps)}"
    params = {path: str(value) for path, value in flatten_config(recipe).items()}
    try:
        tracker = MlflowTracker(destination.tracking, destination.experiment)
        tracker.check()
        run_id = tracker.open_run(
            TrackedRun(key, f"simulate-{recipe.name}", None, params, {"orchestrator.job": "simulate"})
        )
        points = previews.sample_learning_rates(recipe, steps, MAX_LOGGED_RATES)
        # The metric of a training has the same name, so MLflow draws both in one chart.
        tracker.log_metrics(run_id, [MetricPoint("train/rate", rate, samples, time.time()) for samples, rate in points])
        tracker.log_table(run_id, "schedule.json", columns)
        for picture in pictures:
            tracker.log_file(run_id, str(picture))
        tracker.close_run(run_id, "FINISHED")
        return tracker.get_run_url(run_id)
    except TrackingError as error:
        raise PreflightError(f"tracking: {error}") from None
