"""Report what a job that trains models would do, take and cost, without starting or writing anything."""

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
from orchestrator.models.config import ModelPlugin, format_label, has_batch_norm
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
from orchestrator.tracking.connect import MLFLOW

_PLACEHOLDER = "-"
_DEFAULT_CLASSES = 1000  # of a dataset that is not packed yet


def print_dry_run(config: JobConfig, recipes: Sequence[Recipe], options: PlanConfig, console: Console) -> None:
    """Print runs, steps, rates and places; then the order of the runs, and what it takes.

    Raises DataError, ConfigError for places, ClusterError when the cluster does not answer or has no room for a run.
    """
    destination = config.destination.resolve()
    dataset = print_run_table(recipes, destination, config.placement, console)
    digest = dataset.digest() if dataset is not None else "0" * 16
    specs = [config.build_run_spec(recipe, destination, digest) for recipe in recipes]
    histories = {} if dataset is None else _read_histories(specs, console)
    capacity, cluster_text = resolve_capacity(options)
    gpus = cluster.resolve_gpus_per_worker(config.placement, capacity)
    todo = [spec for spec in specs if not histories.get(spec.name, NO_HISTORY).finished]
    lines = [f"cluster:    {cluster_text}"]
    if len(todo) < len(specs):
        lines.append(f"finished:   {len(specs) - len(todo)} of {len(specs)} models")
    if todo:
        expected = estimate.estimate_durations(specs, histories, dataset, options)
        durations = {spec.name: duration for spec, duration in zip(specs, expected.values, strict=True)}
        start_seconds = options.start_seconds if expected.in_seconds else 0.0
        try:
            plan = plan_runs(todo, capacity, gpus, [durations[spec.name] for spec in todo], start_seconds)
        except ValueError as error:
            raise ClusterError(f"{error}; the plan is for {cluster_text}") from None
        console.print(build_plan_table(plan, recipes, expected.in_seconds), soft_wrap=False)
        lines += _format_totals(plan, capacity, gpus, options, expected.in_seconds)
        lines += _format_storage(plan, histories, dataset, expected.in_seconds)
    _print_lines(lines, console)


def _print_lines(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def resolve_capacity(options: PlanConfig) -> tuple[ClusterCapacity, str]:
    """Return the cluster to plan for, and its description: as stated, else the connected one, else this machine."""
    if options.nodes is not None and options.cpus_per_node is not None:
        nodes = (Node(options.cpus_per_node, options.gpus_per_node),) * options.nodes
        return ClusterCapacity(nodes), f"{_describe_nodes(nodes)}, as stated"
    if has_existing_cluster():
        with cluster.connect_cluster() as capacity:
            return capacity, f"{_describe_nodes(capacity.nodes)}, as it is now"
    import torch  # two seconds, which other commands need not wait for

    gpus = torch.cuda.device_count()
    nodes = (Node(float(len(os.sched_getaffinity(0))), float(gpus)),)
    return ClusterCapacity(nodes), f"this machine, {_describe_nodes(nodes)}; set --plan.nodes for another cluster"


def _describe_nodes(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs in all"


def _read_histories(specs: Sequence[RunSpec], console: Console) -> dict[str, RunHistory]:
    """Read what the storage records of the runs; print a line when it is unreachable."""
    histories = {}
    for spec in specs:
        try:
            run = inspect_run(spec.folder)
        except OSError as error:
            console.print(f"cannot read from storage what is trained: {error}", highlight=False, markup=False)
            return {}
        histories[spec.name] = RunHistory(run.epoch or 0.0, run.images_per_second, run.workers, run.state == "finished")
    return histories


# ------------------------------------------------------------------ order
def build_plan_table(plan: RunPlan, recipes: Sequence[Recipe], in_seconds: bool) -> Table:
    """Build a row for each run in starting order; fits 100 columns. Times are relative where no speed is known."""
    unit = _get_time_unit(plan)
    differences = describe_differences(recipes)
    table = Table(title="order", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("what differs", overflow="fold")
    for name in ("workers", "wave", "start", "takes", "end"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, run in enumerate(plan.runs):
        times = (run.start, run.end - run.start, run.end)
        table.add_row(
            Text(run.spec.recipe.name),
            Text(differences[run.spec.recipe.name]),
            str(run.spec.placement.workers),
            str(1 + number // plan.max_concurrent),
            *(format_duration(time) if in_seconds else f"{time / unit:.2f}" for time in times),
        )
    return table


def _get_time_unit(plan: RunPlan) -> float:
    """Return the shortest run's duration, the unit of times where no speed is known."""
    return min(run.end - run.start for run in plan.runs) or 1.0


def describe_differences(recipes: Sequence[Recipe]) -> dict[str, str]:
    """Describe by name, in a few words, how each recipe differs from the others."""
    leaves = [flatten_config(recipe) for recipe in recipes]
    shared = set.intersection(*(set(paths) for paths in leaves))
    varied = {path for path in shared if any(values[path] != leaves[0][path] for values in leaves)}
    varied |= set.union(*(set(paths) for paths in leaves)) - shared
    return {recipe.name: _describe_recipe(recipe, own, varied) for recipe, own in zip(recipes, leaves, strict=True)}


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


# ------------------------------------------------------------------ totals
def _format_totals(
    plan: RunPlan, capacity: ClusterCapacity, gpus: float, options: PlanConfig, in_seconds: bool
) -> list[str]:
    beyond = 100 * (plan.makespan / plan.min_makespan - 1) if plan.min_makespan > 0 else 0.0
    if not in_seconds:
        stated = options.images_per_second is not None
        advice = "pack the data" if stated else "set --plan.images-per-second, or train an epoch"
        unit = _get_time_unit(plan)
        return [
            f"time:       {plan.makespan / unit:.2f}, in times of the shortest model; no plan takes less than "
            f"{plan.min_makespan / unit:.2f} (+{beyond:.1f} %)",
            f"            for hours {advice}",
        ]
    device, price = "GPU" if gpus > 0 else "CPU", options.price_per_hour
    cost = estimate.estimate_cost(plan, capacity, gpus)
    lines = [
        f"time:       {format_duration(plan.makespan)}, until {format_eta(plan.makespan)} if started now; "
        f"no plan takes less than {format_duration(plan.min_makespan)} (+{beyond:.1f} %)",
        f"hours:      {cost.hours:.4g} {device}-hours used, {cost.held_hours:.4g} of the cluster until the end",
    ]
    if price is not None:
        lines.append(
            f"money:      {cost.hours * price:,.2f} for those used, {cost.held_hours * price:,.2f} for the cluster, at "
            f"{price:g} for a {device}-hour"
        )
    return lines


def _format_storage(
    plan: RunPlan, histories: Mapping[str, RunHistory], dataset: Manifest | None, in_seconds: bool
) -> list[str]:
    classes = len(dataset.classes) if dataset is not None else _DEFAULT_CLASSES
    runs = []
    for run in plan.runs:
        epochs = max(0.0, run.spec.recipe.epochs - histories.get(run.spec.name, NO_HISTORY).epochs)
        seconds = run.end - run.start if in_seconds else None
        runs.append(estimate.estimate_storage(run.spec, classes, seconds, epochs, dataset))
    largest, kept = max(run.checkpoint for run in runs), sum(run.kept for run in runs)
    written = [run.written for run in runs if run.written is not None]
    up_to = f", up to {format_bytes(sum(written))} written" if written else ""
    lines = [f"weights:    {format_bytes(kept)} kept{up_to}; a checkpoint takes up to {format_bytes(largest)}"]
    if dataset is not None:
        read = format_bytes(sum(run.read for run in runs))
        lines.append(f"reading:    up to {read} of data; a cache on the nodes saves most")
    return lines


# ------------------------------------------------------------------ runs
def print_run_table(
    recipes: Sequence[Recipe], destination: Destination, placement: Placement, console: Console
) -> Manifest | None:
    """Print runs, steps, rates, resources and places; return the dataset's manifest, None when it is not packed yet."""
    dataset = _load_manifest_if_packed(destination)
    table = Table(title="plan", title_justify="left")
    for name in ("model", "network", "crop area", "epochs", "steps", "rate first", "half-way"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for recipe in recipes:
        low, high = recipe.augmentation.area
        rates = [compute_lr(recipe.schedule, share * recipe.epochs, 1, recipe.epochs) for share in (0.0, 0.5)]
        table.add_row(
            recipe.name,
            format_label(recipe.model),
            f"{low:g} - {high:g}",
            str(recipe.epochs),
            "?" if dataset is None else str(recipe.epochs * _count_steps_per_epoch(dataset, recipe)),
            *(f"{rate:.5f}" for rate in rates),
        )
    console.print(table)
    gpus = "1 GPU if there is any" if placement.gpus_per_worker is None else f"{placement.gpus_per_worker:g} GPU"
    data = "packed on first use"
    if dataset is not None:
        splits = ", ".join(f"{dataset.count_samples(split)} {split}" for split in sorted(dataset.splits))
        data = f"{dataset.name}, digest {dataset.digest()}, {splits}"
    least = f"{placement.fewest_workers} to " if placement.is_elastic else ""
    lines = [
        f"each model: {least}{placement.workers} worker(s) of {placement.cpus_per_worker} CPU and {gpus}",
        f"data:       {redaction.redact(destination.data)} ({data})",
        f"storage:    {redaction.redact(destination.storage)}",
        f"tracking:   {_describe_tracking(destination)}, {_describe_experiment(destination)}",
    ]
    if any(has_batch_norm(recipe.model) for recipe in recipes):
        lines.append("exempt:     batch norm sees a worker's own images: another number of workers gives other losses")
    if any(isinstance(recipe.model, ModelPlugin) for recipe in recipes):
        lines.append(
            "exempt:     torch's own dropout draws other masks on another number of workers; resume on as many"
        )
    _print_lines(lines, console)
    return dataset


def _describe_tracking(destination: Destination) -> str:
    """Return the tracking URI, after the tracker unless that is MLflow."""
    kind = "" if destination.tracker.kind == MLFLOW else f"{destination.tracker.kind} "
    return f"{kind}{redaction.redact(destination.tracking)}".rstrip()


def _describe_experiment(destination: Destination) -> str:
    """Describe the experiment, and the variables of MLflow that hold what is used."""
    used = {TRACKING_URI_VARIABLE: destination.tracking, EXPERIMENT_VARIABLE: destination.experiment}
    named = [name for name, value in used.items() if os.environ.get(name) == value]
    return f"experiment {destination.experiment}" + (f" (from {' and '.join(named)})" if named else "")


def _count_steps_per_epoch(dataset: Manifest, recipe: Recipe) -> int:
    return sampler.count_steps(dataset.count_samples("train"), recipe.batch_size)


def _load_manifest_if_packed(destination: Destination) -> Manifest | None:
    """Load the dataset's manifest; None for embedded data that is not packed yet. Raises DataError otherwise."""
    try:
        return manifest.load(destination.data, allow_elsewhere=destination.allow_elsewhere)
    except DataError:
        embedded = Destination(data=EMBEDDED_DATASET, storage=destination.storage).resolve().data
        if destination.data == embedded and not file_io.exists(file_io.join(destination.data, manifest.FILE_NAME)):
            return None
        raise
