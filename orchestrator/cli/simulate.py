"""Preview a recipe's learning-rate schedule and augmented images, without training."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.cli.config import SimulateConfig
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest, sampler
from orchestrator.data.build.sources import digits
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.monitor.formatting import print_line
from orchestrator.ray_backend import previews
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.storage import file_io, urls

MAX_ROWS = 26


def run_simulate(config: SimulateConfig, console: Console) -> int:
    """Print the schedule; with `out` draw it, and a contact sheet of the data; return the exit status.

    Raises ConfigError for impossible values.
    """
    recipe = config.recipe
    out = urls.require_absolute(config.out, "out") if config.out else ""
    with tempfile.TemporaryDirectory(prefix="simulate-") as temporary:
        url, dataset = _load_dataset(config, os.path.join(temporary, "digits"))
        samples = config.samples if dataset is None else dataset.count_samples(previews.TRAIN_SPLIT)
        steps = sampler.count_steps(samples, recipe.batch_size)
        if steps == 0:
            raise ConfigError(
                f"batch_size: must be at most the {samples} training images, got {recipe.batch_size}; lower it"
            )
        console.print(_build_table(recipe, steps))
        if not out:
            return 0
        schedule, sheet = Path(temporary, previews.SCHEDULE_FILE), Path(temporary, previews.CONTACT_SHEET_FILE)
        previews.draw_schedule(recipe, steps, str(schedule))
        if dataset is None:
            print_line(console, "no contact sheet: set --data to a dataset")
        elif not previews.draw_contact_sheet(recipe, url, dataset, str(sheet)):
            print_line(console, "no contact sheet: none of the selected images can be decoded")
        for picture in Path(temporary).glob("*.png"):
            where = file_io.join(out, picture.name)
            file_io.write_bytes(where, picture.read_bytes())
            print_line(console, f"written: {redaction.redact(where)}")
    return 0


def _load_dataset(config: SimulateConfig, scratch: str) -> tuple[str, Manifest | None]:
    """Return URL and manifest of the data, None without data; unpacked digits are packed in the folder `scratch`."""
    if not config.data:
        return "", None
    # A tracking URI, which is not used, must not be demanded.
    url = Destination(data=config.data, tracking="none", allow_elsewhere=config.allow_elsewhere).resolve().data
    try:
        return url, manifest.load(url, allow_elsewhere=config.allow_elsewhere)
    except DataError as error:
        if config.data != EMBEDDED_DATASET:
            raise ConfigError(str(error)) from None
    return scratch, digits.pack_digits(scratch)


def _build_table(recipe: Recipe, steps_per_epoch: int) -> Table:
    """Return the schedule at whole epochs, at the end of the warm-up and at the last step."""
    last = recipe.epochs * steps_per_epoch - 1
    warm = min(last, round(recipe.schedule.warmup_epochs * steps_per_epoch))
    # Epochs between rows: 1, 2 or 5 times a power of ten, for at most MAX_ROWS rows.
    strides = (each * int(10**power) for power in range(9) for each in (1, 2, 5))
    stride = next(stride for stride in strides if recipe.epochs <= stride * MAX_ROWS)
    chosen = {epoch * steps_per_epoch for epoch in range(0, recipe.epochs, stride)}
    title = (
        f"{recipe.name}: {recipe.schedule.kind} schedule, batches of {recipe.batch_size}, the last row its last step"
    )
    table = Table(title=title, title_justify="left")
    for name in ("epochs done", "step", "samples", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in sorted({*chosen, warm, last}):
        rate = compute_lr(recipe.schedule, step, steps_per_epoch, recipe.epochs)
        table.add_row(f"{step / steps_per_epoch:.6g}", f"{step:,}", f"{step * recipe.batch_size:,}", f"{rate:.6g}")
    return table
