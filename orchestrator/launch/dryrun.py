"""What a job would do, without starting or writing anything."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from orchestrator.data import manifest, order
from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.launch.config import EMBEDDED, EXPERIMENT_VARIABLE, URI_VARIABLE, Destination, Placement
from orchestrator.models.config import label, normalises_batches
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.schedule import rate_at
from orchestrator.storage import files, urls


def show(
    recipes: Sequence[Recipe], destination: Destination, placement: Placement, console: Console
) -> Manifest | None:
    """Print runs, steps, rates, resources and places; the dataset's manifest, None when it is not packed yet."""
    found = _manifest(destination)
    table = Table(title="plan", title_justify="left")
    for name in ("model", "network", "crop area", "epochs", "steps", "rate first", "half-way"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for recipe in recipes:
        steps = "?" if found is None else str(recipe.epochs * _steps(found, recipe))
        low, high = recipe.augmentation.area
        rates = [rate_at(recipe.schedule, share * recipe.epochs, 1, recipe.epochs) for share in (0.0, 0.5)]
        table.add_row(
            recipe.name,
            label(recipe.model),
            f"{low:g} - {high:g}",
            str(recipe.epochs),
            steps,
            *(f"{rate:.5f}" for rate in rates),
        )
    console.print(table)
    gpus = "1 GPU if there is any" if placement.gpus_per_worker is None else f"{placement.gpus_per_worker:g} GPU"
    data = (
        "packed on first use"
        if found is None
        else f"{found.name}, digest {found.digest()}, "
        + ", ".join(f"{found.samples(split)} {split}" for split in sorted(found.splits))
    )
    least = f"{placement.least} to " if placement.elastic else ""
    lines = [
        f"each model: {least}{placement.workers} worker(s) of {placement.cpus_per_worker} CPU and {gpus}",
        f"data:       {urls.redact(destination.data)} ({data})",
        f"storage:    {urls.redact(destination.storage)}",
        f"tracking:   {urls.redact(destination.tracking)}, {_experiment(destination)}",
    ]
    if any(normalises_batches(recipe.model) for recipe in recipes):
        lines.append("exempt:     batch norm sees a worker's own images: another number of workers gives other losses")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return found


def _experiment(destination: Destination) -> str:
    """Return the experiment, and which of MLflow's variables hold what is used."""
    used = {URI_VARIABLE: destination.tracking, EXPERIMENT_VARIABLE: destination.experiment}
    named = [name for name, value in used.items() if os.environ.get(name) == value]
    return f"experiment {destination.experiment}" + (f" (from {' and '.join(named)})" if named else "")


def _steps(found: Manifest, recipe: Recipe) -> int:
    return order.steps_per_epoch(found.samples("train"), recipe.batch_size)


def _manifest(destination: Destination) -> Manifest | None:
    """The dataset's manifest; None for embedded data that is not packed yet. Raises DataError for any other trouble."""
    try:
        return manifest.load(destination.data, allow_elsewhere=destination.allow_elsewhere)
    except DataError:
        packed_on_use = destination.data == Destination(data=EMBEDDED, storage=destination.storage).resolved().data
        if packed_on_use and not files.exists(files.join(destination.data, manifest.NAME)):
            return None
        raise
