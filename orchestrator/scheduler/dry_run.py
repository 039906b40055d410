"""What a job that trains models would do, take and cost, without starting or writing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config import redaction
from orchestrator.config.overrides import flatten_config
from orchestrator.data import manifest, sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.models.config import format_label, has_batch_norm
from orchestrator.monitor.formatting import format_bytes, format_duration, format_eta
from orchestrator.monitor.run_status import inspect_run
from orchestrator.ray_backend import cluster
from orchestrator.ray_backend.cluster import ClusterCapacity, Node
from orchestrator.ray_backend.launch_errors import ClusterError
from orchestrator.ray_backend.ray_env import has_existing_cluster
from orchestrator.ray_backend.run_spec import (
    EMBEDDED_DATASET,
    EXPERIMENT_VARIABLE,
    TRACKING_URI_VARIABLE,
    Destination,
    JobConfig,
    Placement,
    RunSpec,
)
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.scheduler import estimate
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.estimate import NO_HISTORY, RunHistory
from orchestrator.scheduler.run_plan import RunPlan, plan_runs
from orchestrator.storage import file_io

_PLACEHOLDER = "-"
_DEFAULT_CLASSES = 1000  # where the dataset is not there yet


def print_dry_run(config: JobConfig, recipes: Sequence[Recipe], about: PlanConfig, console: Console) -> None:
    """Print runs, steps, rates and places; then who trains when, and what it takes.

    Raises DataError, ConfigError for places, ClusterError when the cluster does not answer or holds not one run.
    """
    destination = config.destination.resolve()
    found = print_run_table(recipes, destination, config.placement, console)
    digest = found.digest() if found is not None else "0" * 16
    specs = [config.build_run_spec(recipe, destination, digest) for recipe in recipes]
    seen = {} if found is None else _read_histories(specs, console)
    capacity, told = resolve_capacity(about)
    gpus = cluster.resolve_gpus_per_worker(config.placement, capacity)
    todo = [spec for spec in specs if not seen.get(spec.name, NO_HISTORY).finished]
    lines = [f"cluster:    {told}"]
    if found is not None and (warning := specs[0].dataset_warning) is not None:
        lines.append(f"warning:    {warning}")
    if len(todo) < len(specs):
        lines.append(f"finished:   {len(specs) - len(todo)} of {len(specs)} models")
    if todo:
        everything = estimate.estimate_durations(specs, seen, found, about)
        expected = {spec.name: value for spec, value in zip(specs, everything.values, strict=True)}
        pace = estimate.make_scaling_model(about, everything.in_seconds)
        try:
            made = plan_runs(todo, capacity, gpus, [expected[spec.name] for spec in todo], pace)
        except ValueError as error:
            raise ClusterError(f"{error}; the plan is for {told}") from None
        console.print(build_plan_table(made, recipes, everything.in_seconds), soft_wrap=False)
        lines += _format_totals(made, capacity, gpus, about, everything.in_seconds)
        lines += _format_storage(made, seen, found, everything.in_seconds)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def resolve_capacity(about: PlanConfig) -> tuple[ClusterCapacity, str]:
    """The cluster to plan for, and what it is: as stated, else the one at hand, else this machine."""
    if about.nodes is not None and about.cpus_per_node is not None:
        nodes = (Node(about.cpus_per_node, about.gpus_per_node),) * about.nodes
        return ClusterCapacity(nodes), f"{_describe_nodes(nodes)}, as stated"
    if has_existing_cluster():
        with cluster.connect_cluster() as capacity:
            return capacity, f"{_describe_nodes(capacity.nodes)}, as it is now"
    import torch  # two seconds, which other commands need not wait for

    gpus = torch.cuda.device_count()
    nodes = (Node(float(len(os.sched_getaffinity(0))), float(gpus)),)
    return ClusterCapacity(nodes), f"this machine, {_describe_nodes(nodes)}; for another one give --plan.nodes"


def _describe_nodes(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs in all"


def _read_histories(specs: Sequence[RunSpec], console: Console) -> dict[str, RunHistory]:
    """What the storage knows of the runs; said when it does not tell."""
    found = {}
    for spec in specs:
        try:
            now = inspect_run(spec.folder)
        except OSError as error:
            console.print(f"storage does not tell what is trained: {error}", highlight=False, markup=False)
            return {}
        found[spec.name] = RunHistory(now.epoch or 0.0, now.images_per_second, now.workers, now.state == "finished")
    return found


# ------------------------------------------------------------------ who trains when
def build_plan_table(made: RunPlan, recipes: Sequence[Recipe], in_seconds: bool) -> Table:
    """A row for each run in starting order; fits 100 columns. Times are relative where no speed is known."""
    unit = _get_time_unit(made)
    differs = describe_differences(recipes)
    shown = Table(title="order", title_justify="left")
    shown.add_column("model", overflow="fold")
    shown.add_column("what differs", overflow="fold")
    for name in ("workers", "wave", "start", "takes", "end"):
        shown.add_column(name, justify="right", no_wrap=True)
    for number, run in enumerate(made.runs):
        times = (run.start, run.end - run.start, run.end)
        shown.add_row(
            Text(run.spec.recipe.name),
            Text(differs[run.spec.recipe.name]),
            str(run.spec.placement.workers),
            str(1 + number // made.max_concurrent),
            *(format_duration(time) if in_seconds else f"{time / unit:.2f}" for time in times),
        )
    return shown


def _get_time_unit(made: RunPlan) -> float:
    """The shortest run's duration: what durations without seconds are told in."""
    return min(run.end - run.start for run in made.runs) or 1.0


def describe_differences(recipes: Sequence[Recipe]) -> dict[str, str]:
    """What sets each recipe apart from the others, by name, in few words."""
    leaves = [flatten_config(recipe) for recipe in recipes]
    shared = set.intersection(*(set(one) for one in leaves))
    varied = {path for path in shared if any(one[path] != leaves[0][path] for one in leaves)}
    varied |= set.union(*(set(one) for one in leaves)) - shared
    return {recipe.name: _describe_recipe(recipe, one, varied) for recipe, one in zip(recipes, leaves, strict=True)}


def _describe_recipe(recipe: Recipe, leaves: Mapping[str, object], varied: set[str]) -> str:
    parts = []
    if any(path.startswith("model.") for path in varied):
        network = format_label(recipe.model)
        parts.append(network if "model.kind" in varied else network.removeprefix(f"{recipe.model.kind} "))
    if "augmentation.area" in varied:
        parts.append("crops {:g}-{:g}".format(*recipe.augmentation.area))
    if seeds := sorted(path for path in varied if path.startswith("seeds.")):
        values = [str(leaves[path]) for path in seeds]
        parts.append("seeds " + (values[0] if len(set(values)) == 1 else "/".join(values)))
    others = varied - {"name", "augmentation.area", *seeds}
    parts += [f"{path} {leaves[path]}" for path in sorted(others) if not path.startswith("model.") and path in leaves]
    return ", ".join(parts) or _PLACEHOLDER


# ------------------------------------------------------------------ what it takes
def _format_totals(
    made: RunPlan, capacity: ClusterCapacity, gpus: float, about: PlanConfig, in_seconds: bool
) -> list[str]:
    beyond = 100 * (made.makespan / made.min_makespan - 1) if made.min_makespan > 0 else 0.0
    if not in_seconds:
        why = (
            "once the data is packed" if about.images_per_second else "give --plan.images-per-second, or train an epoch"
        )
        unit = _get_time_unit(made)
        return [
            f"time:       {made.makespan / unit:.2f}, in times of the shortest model; no plan takes less than "
            f"{made.min_makespan / unit:.2f} (+{beyond:.1f} %)",
            f"            for hours {why}",
        ]
    what = "GPU" if gpus > 0 else "CPU"
    cost = estimate.estimate_cost(made, capacity, gpus, about.price_per_hour)
    lines = [
        f"time:       {format_duration(made.makespan)}, until {format_eta(made.makespan)} if started now; "
        "no plan takes less than "
        f"{format_duration(made.min_makespan)} (+{beyond:.1f} %)",
        f"hours:      {cost.hours:.4g} {what}-hours used, {cost.held_hours:.4g} of the cluster until the end",
    ]
    if cost.money is not None and cost.held_money is not None:
        lines.append(
            f"money:      {cost.money:,.2f} for those used, {cost.held_money:,.2f} for the cluster, at "
            f"{about.price_per_hour:g} for a {what}-hour"
        )
    return lines


def _format_storage(
    made: RunPlan, seen: Mapping[str, RunHistory], found: Manifest | None, in_seconds: bool
) -> list[str]:
    classes = len(found.classes) if found is not None else _DEFAULT_CLASSES
    each = []
    for run in made.runs:
        epochs = max(0.0, run.spec.recipe.epochs - seen.get(run.spec.name, NO_HISTORY).epochs)
        seconds = run.end - run.start if in_seconds else None
        each.append(estimate.estimate_storage(run.spec, classes, seconds, epochs, found))
    largest, kept = max(one.checkpoint for one in each), sum(one.kept for one in each)
    written = [one.written for one in each if one.written is not None]
    wrote = f", up to {format_bytes(sum(written))} written" if written else ""
    lines = [f"weights:    {format_bytes(kept)} kept{wrote}; a checkpoint takes up to {format_bytes(largest)}"]
    if found is not None:
        lines.append(
            f"reading:    up to {format_bytes(sum(one.read for one in each))} of data; a cache on the nodes saves most"
        )
    return lines


def print_run_table(
    recipes: Sequence[Recipe], destination: Destination, placement: Placement, console: Console
) -> Manifest | None:
    """Print runs, steps, rates, resources and places; the dataset's manifest, None when it is not packed yet."""
    found = _load_manifest_if_packed(destination)
    table = Table(title="plan", title_justify="left")
    for name in ("model", "network", "crop area", "epochs", "steps", "rate first", "half-way"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for recipe in recipes:
        steps = "?" if found is None else str(recipe.epochs * _count_steps_per_epoch(found, recipe))
        low, high = recipe.augmentation.area
        rates = [compute_lr(recipe.schedule, share * recipe.epochs, 1, recipe.epochs) for share in (0.0, 0.5)]
        table.add_row(
            recipe.name,
            format_label(recipe.model),
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
        + ", ".join(f"{found.count_samples(split)} {split}" for split in sorted(found.splits))
    )
    least = f"{placement.fewest_workers} to " if placement.is_elastic else ""
    lines = [
        f"each model: {least}{placement.workers} worker(s) of {placement.cpus_per_worker} CPU and {gpus}",
        f"data:       {redaction.redact(destination.data)} ({data})",
        f"storage:    {redaction.redact(destination.storage)}",
        f"tracking:   {redaction.redact(destination.tracking)}, {_describe_experiment(destination)}",
    ]
    if any(has_batch_norm(recipe.model) for recipe in recipes):
        lines.append("exempt:     batch norm sees a worker's own images: another number of workers gives other losses")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return found


def _describe_experiment(destination: Destination) -> str:
    """Return the experiment, and which of MLflow's variables hold what is used."""
    used = {TRACKING_URI_VARIABLE: destination.tracking, EXPERIMENT_VARIABLE: destination.experiment}
    named = [name for name, value in used.items() if os.environ.get(name) == value]
    return f"experiment {destination.experiment}" + (f" (from {' and '.join(named)})" if named else "")


def _count_steps_per_epoch(found: Manifest, recipe: Recipe) -> int:
    return sampler.count_steps(found.count_samples("train"), recipe.batch_size)


def _load_manifest_if_packed(destination: Destination) -> Manifest | None:
    """The dataset's manifest; None for embedded data that is not packed yet. Raises DataError for any other trouble."""
    try:
        return manifest.load(destination.data, allow_elsewhere=destination.allow_elsewhere)
    except DataError:
        packed_on_use = (
            destination.data == Destination(data=EMBEDDED_DATASET, storage=destination.storage).resolve().data
        )
        if packed_on_use and not file_io.exists(file_io.join(destination.data, manifest.FILE_NAME)):
            return None
        raise
