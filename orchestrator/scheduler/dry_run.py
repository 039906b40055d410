"""Report what a job that trains models would do, take and cost, without starting or writing anything."""

from __future__ import annotations

import math
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
from orchestrator.models.config import AnyModelConfig, ModelPlugin, format_label, has_batch_norm
from orchestrator.monitor.formatting import format_bytes, format_duration, format_eta, print_line
from orchestrator.monitor.run_status import inspect_run
from orchestrator.ray_backend import cluster
from orchestrator.ray_backend.cluster import ClusterCapacity, Node
from orchestrator.ray_backend.launch_errors import ClusterError
from orchestrator.ray_backend.ray_env import has_existing_cluster
from orchestrator.ray_backend.run_spec import Destination, JobConfig, Placement, RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.run_plan import NO_HISTORY, RunHistory, RunPlan, plan_unfinished
from orchestrator.storage import file_io
from orchestrator.tracking.connect import MLFLOW

_DEFAULT_CLASSES = 1000  # of a dataset that is not packed yet
_FLOAT_BYTES = 4
# A checkpoint holds weights, momentum and average; final and best weights are raw, averaged, and exported averaged.
_CHECKPOINT_COPIES, _WEIGHTS_COPIES = 3, 3
# Each recipe has these in columns of their own.
_COLUMN_PATHS = ("name", "epochs", "augmentation.area", "model.")


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
    print_line(console, f"cluster:    {cluster_text}")
    if dataset is not None and specs[0].dataset_warning:
        print_line(console, f"warning:    {specs[0].dataset_warning}")
    if finished := sum(history.finished for history in histories.values()):
        print_line(console, f"finished:   {finished} of {len(specs)} models")
    if finished == len(specs):
        return
    try:
        plan = plan_unfinished(specs, histories, dataset, options, capacity, gpus)
    except ValueError as error:
        raise ClusterError(f"{error}; the plan is for {cluster_text}") from None
    console.print(_build_order_table(plan), soft_wrap=False)
    for line in (*_format_totals(plan, capacity, gpus, options), *_format_storage(plan, histories, dataset)):
        print_line(console, line)


def resolve_capacity(options: PlanConfig) -> tuple[ClusterCapacity, str]:
    """Return the cluster to plan for, and its description: as stated, else the connected one, else this machine."""
    if options.nodes is not None and options.cpus_per_node is not None:
        nodes = (Node(options.cpus_per_node, options.gpus_per_node),) * options.nodes
        return ClusterCapacity(nodes), f"{_describe_nodes(nodes)}, as stated"
    if has_existing_cluster():
        with cluster.connect_cluster() as capacity:
            return capacity, f"{_describe_nodes(capacity.nodes)}, as it is now"
    import torch  # two seconds, which other commands need not wait for

    nodes = (Node(float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())),)
    return ClusterCapacity(nodes), f"this machine, {_describe_nodes(nodes)}; set --plan.nodes for another cluster"


def _describe_nodes(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs in all"


def _read_histories(specs: Sequence[RunSpec], console: Console) -> dict[str, RunHistory]:
    histories = {}
    for spec in specs:
        try:
            run = inspect_run(spec.folder)
        except OSError as error:
            print_line(console, f"cannot read from storage what is trained: {error}")
            return {}
        histories[spec.name] = RunHistory(run.epoch or 0.0, run.images_per_second, run.workers, run.state == "finished")
    return histories


def _build_order_table(plan: RunPlan) -> Table:
    table = Table(title="order", title_justify="left")
    table.add_column("model", overflow="fold")
    for name in ("workers", "wave", "start", "takes", "end"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, run in enumerate(plan.runs):
        times = (_format_time(plan, time) for time in (run.start, run.end - run.start, run.end))
        wave = 1 + number // plan.max_concurrent
        table.add_row(Text(run.spec.recipe.name), str(run.spec.placement.workers), str(wave), *times)
    return table


def _format_time(plan: RunPlan, time: float) -> str:
    """Format a time, where no speed is known in durations of the shortest run."""
    shortest = min(run.end - run.start for run in plan.runs) or 1.0
    return format_duration(time) if plan.in_seconds else f"{time / shortest:.2f}"


def _format_totals(plan: RunPlan, capacity: ClusterCapacity, gpus: float, options: PlanConfig) -> list[str]:
    total = _format_time(plan, plan.makespan)
    if not plan.in_seconds:
        stated = options.images_per_second is not None
        advice = "pack the data" if stated else "set --plan.images-per-second, or train an epoch"
        return [f"time:       {total}, in times of the shortest model; for hours {advice}"]
    hours, held_hours = estimate_hours(plan, capacity, gpus)
    device, price = "GPU" if gpus > 0 else "CPU", options.price_per_hour
    lines = [
        f"time:       {total}, until {format_eta(plan.makespan)} if started now",
        f"hours:      {hours:.4g} {device}-hours used, {held_hours:.4g} of the cluster until the end",
    ]
    if price is not None:
        lines.append(
            f"money:      {hours * price:,.2f} for those used, {held_hours * price:,.2f} for the cluster, at "
            f"{price:g} for a {device}-hour"
        )
    return lines


def estimate_hours(plan: RunPlan, capacity: ClusterCapacity, gpus: float) -> tuple[float, float]:
    """Return the hours that runs use, and those of the whole cluster until the last run ends.

    They are of GPUs where workers have any (`gpus` each), else of CPUs.
    """
    placement = plan.order[0].placement
    per_worker, available = (gpus, capacity.gpus) if gpus > 0 else (placement.cpus_per_worker, capacity.cpus)
    hours = sum((run.end - run.start) * run.spec.placement.workers * per_worker for run in plan.runs) / 3600
    return hours, max(hours, plan.makespan * available / 3600)


def _format_storage(plan: RunPlan, histories: Mapping[str, RunHistory], dataset: Manifest | None) -> list[str]:
    """Return lines about bytes, at most: caches read less, and training that waits for storage writes less."""
    classes = len(dataset.classes) if dataset is not None else _DEFAULT_CLASSES
    sizes: dict[str, int] = {}
    if dataset is not None:
        sizes = {name: sum(part.bytes for part in dataset.shards(name)) for name in dataset.splits}
    largest = kept = written = read = 0.0
    for run in plan.runs:
        cadence = run.spec.cadence
        checkpoint, weights = estimate_bytes(run.spec.recipe.model, classes)
        epochs = max(0.0, run.spec.recipe.epochs - histories.get(run.spec.name, NO_HISTORY).epochs)
        largest, kept = max(largest, checkpoint), kept + cadence.keep_checkpoints * checkpoint + 2 * weights
        # Every validation may find the best weights so far.
        written += math.ceil((run.end - run.start) / cadence.checkpoint_seconds) * checkpoint
        written += (1 + math.ceil(epochs / cadence.validate_epochs)) * weights
        read += epochs * (sizes.get("train", 0) + sizes.get("validation", 0) / cadence.validate_epochs)
    up_to = f", up to {format_bytes(written)} written" if plan.in_seconds else ""
    lines = [f"weights:    {format_bytes(kept)} kept{up_to}; a checkpoint takes up to {format_bytes(largest)}"]
    if dataset is not None:
        lines.append(f"reading:    up to {format_bytes(read)} of data; a cache on the nodes saves most")
    return lines


def estimate_bytes(model: AnyModelConfig, classes: int) -> tuple[float, float]:
    """Return the bytes of a checkpoint, and of final weights in all their forms."""
    from orchestrator.models import cost  # torch takes two seconds to import

    trained, exported = (cost.measure_cost(model, classes, training)[0] for training in (True, False))
    return float(_CHECKPOINT_COPIES * _FLOAT_BYTES * trained), float(_WEIGHTS_COPIES * _FLOAT_BYTES * exported)


def print_run_table(
    recipes: Sequence[Recipe], destination: Destination, placement: Placement, console: Console
) -> Manifest | None:
    """Print runs, steps, rates, resources and places; return the dataset's manifest, None when it is not packed yet."""
    dataset = _load_manifest_if_packed(destination)
    samples = None if dataset is None else dataset.count_samples("train")
    differences = describe_differences(recipes)
    table = Table(title="plan", title_justify="left")
    names = ("model", "network", "crop area", *["what differs"] * any(differences))
    for name in (*names, "epochs", "steps", "rate first", "half-way"):
        table.add_column(name, justify="left" if name in ("model", "what differs") else "right", overflow="fold")
    for recipe, difference in zip(recipes, differences, strict=True):
        low, high = recipe.augmentation.area
        steps = "?" if samples is None else str(recipe.epochs * sampler.count_steps(samples, recipe.batch_size))
        rates = [compute_lr(recipe.schedule, share * recipe.epochs, 1, recipe.epochs) for share in (0.0, 0.5)]
        cells = [recipe.name, format_label(recipe.model), f"{low:g} - {high:g}", *[difference] * any(differences)]
        table.add_row(*map(Text, cells), str(recipe.epochs), steps, *(f"{rate:.5f}" for rate in rates))
    console.print(table)
    gpus = "1 GPU if there is any" if placement.gpus_per_worker is None else f"{placement.gpus_per_worker:g} GPU"
    data = "packed on first use"
    if dataset is not None:
        splits = ", ".join(f"{dataset.count_samples(split)} {split}" for split in sorted(dataset.splits))
        data = f"{dataset.name}, digest {dataset.digest()}, {splits}"
    least = f"{placement.fewest_workers} to " if placement.is_elastic else ""
    tracker = "" if destination.tracker.kind == MLFLOW else destination.tracker.kind
    tracking = f"{tracker} {redaction.redact(destination.tracking)}".strip()
    for line in (
        f"each model: {least}{placement.workers} worker(s) of {placement.cpus_per_worker} CPU and {gpus}",
        f"data:       {redaction.redact(destination.data)} ({data})",
        f"storage:    {redaction.redact(destination.storage)}",
        f"tracking:   {tracking}, experiment {destination.experiment}",
    ):
        print_line(console, line)
    if any(has_batch_norm(recipe.model) for recipe in recipes):
        print_line(console, "exempt:     batch norm sees a worker's own images: other workers give other losses")
    if any(isinstance(recipe.model, ModelPlugin) for recipe in recipes):
        print_line(console, "exempt:     torch's own dropout draws other masks on other workers; resume on as many")
    return dataset


def describe_differences(recipes: Sequence[Recipe]) -> list[str]:
    """Describe how each recipe differs from the others, except in what `print_run_table` shows in columns."""
    leaves = [flatten_config(recipe) for recipe in recipes]
    paths = {path for each in leaves for path in each if not path.startswith(_COLUMN_PATHS)}
    varied = sorted(path for path in paths if any(each.get(path) != leaves[0].get(path) for each in leaves))
    others = [path for path in varied if not path.startswith("seeds.")]
    texts = []
    for each in leaves:
        parts = [f"{path} {each[path]}" for path in others if path in each]
        if seeds := [str(each[path]) for path in varied if path not in others]:
            parts.append("seeds " + "/".join(seeds if len(set(seeds)) > 1 else seeds[:1]))
        texts.append(", ".join(parts))
    return texts


def _load_manifest_if_packed(destination: Destination) -> Manifest | None:
    try:
        return manifest.load(destination.data, allow_elsewhere=destination.allow_elsewhere)
    except DataError:
        if destination.is_embedded and not file_io.exists(file_io.join(destination.data, manifest.FILE_NAME)):
            return None
        raise
