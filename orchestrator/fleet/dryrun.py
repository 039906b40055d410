"""What a job that trains models would do, take and cost, without starting or writing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config.overrides import paths
from orchestrator.data.manifest import Manifest
from orchestrator.fleet import forecast
from orchestrator.fleet.config import PlanConfig
from orchestrator.fleet.figures import duration, moment, size
from orchestrator.fleet.forecast import NEW, Seen
from orchestrator.fleet.plan import Plan, plan
from orchestrator.fleet.standing import standing
from orchestrator.launch import cluster, dryrun
from orchestrator.launch.cluster import Capacity, ClusterError, Node
from orchestrator.launch.config import JobConfig, RunSpec
from orchestrator.launch.environment import is_submitted
from orchestrator.models.config import label
from orchestrator.recipe.config import Recipe

_UNKNOWN = "-"
_CLASSES = 1000  # where the dataset is not there yet


def show(config: JobConfig, recipes: Sequence[Recipe], about: PlanConfig, console: Console) -> None:
    """Print runs, steps, rates and places; then who trains when, and what it takes.

    Raises DataError, ConfigError for places, ClusterError when the cluster does not answer or holds not one run.
    """
    destination = config.destination.resolved()
    found = dryrun.show(recipes, destination, config.placement, console)
    digest = found.digest() if found is not None else "0" * 16
    specs = [config.spec(recipe, destination, digest) for recipe in recipes]
    seen = {} if found is None else _seen(specs, console)
    capacity, told = capacity_of(about)
    gpus = cluster.gpus_per_worker(config.placement, capacity)
    todo = [spec for spec in specs if not seen.get(spec.name, NEW).finished]
    lines = [f"cluster:    {told}"]
    if found is not None and (warning := specs[0].moved) is not None:
        lines.append(f"warning:    {warning}")
    if len(todo) < len(specs):
        lines.append(f"finished:   {len(specs) - len(todo)} of {len(specs)} models")
    if todo:
        everything = forecast.durations(specs, seen, found, about)
        expected = {spec.name: value for spec, value in zip(specs, everything.values, strict=True)}
        pace = forecast.pace(about, everything.in_seconds)
        try:
            made = plan(todo, capacity, gpus, [expected[spec.name] for spec in todo], pace)
        except ValueError as error:
            raise ClusterError(f"{error}; the plan is for {told}") from None
        console.print(table(made, recipes, everything.in_seconds), soft_wrap=False)
        lines += _totals(made, capacity, gpus, about, everything.in_seconds)
        lines += _bytes(made, seen, found, everything.in_seconds)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def capacity_of(about: PlanConfig) -> tuple[Capacity, str]:
    """The cluster to plan for, and what it is: as stated, else the one at hand, else this machine."""
    if about.nodes is not None and about.cpus_per_node is not None:
        nodes = (Node(about.cpus_per_node, about.gpus_per_node),) * about.nodes
        return Capacity(nodes), f"{_nodes(nodes)}, as stated"
    if is_submitted():
        with cluster.connected() as capacity:
            return capacity, f"{_nodes(capacity.nodes)}, as it is now"
    gpus: int = import_module("torch").cuda.device_count()
    nodes = (Node(float(len(os.sched_getaffinity(0))), float(gpus)),)
    return Capacity(nodes), f"this machine, {_nodes(nodes)}; for another one give --plan.nodes"


def _nodes(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs in all"


def _seen(specs: Sequence[RunSpec], console: Console) -> dict[str, Seen]:
    """What the storage knows of the runs; said when it does not tell."""
    found = {}
    for spec in specs:
        try:
            now = standing(spec.folder)
        except OSError as error:
            console.print(f"storage does not tell what is trained: {error}", highlight=False, markup=False)
            return {}
        found[spec.name] = Seen(now.epoch or 0.0, now.images_per_second, now.workers, now.state == "finished")
    return found


# ------------------------------------------------------------------ who trains when
def table(made: Plan, recipes: Sequence[Recipe], in_seconds: bool) -> Table:
    """A row for each run in starting order; fits 100 columns. Times are relative where no speed is known."""
    unit = _unit(made)
    differs = differences(recipes)
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
            str(1 + number // made.at_once),
            *(duration(time) if in_seconds else f"{time / unit:.2f}" for time in times),
        )
    return shown


def _unit(made: Plan) -> float:
    """The shortest run's duration: what durations without seconds are told in."""
    return min(run.end - run.start for run in made.runs) or 1.0


def differences(recipes: Sequence[Recipe]) -> dict[str, str]:
    """What sets each recipe apart from the others, by name, in few words."""
    leaves = [paths(recipe) for recipe in recipes]
    shared = set.intersection(*(set(one) for one in leaves))
    varied = {path for path in shared if any(one[path] != leaves[0][path] for one in leaves)}
    varied |= set.union(*(set(one) for one in leaves)) - shared
    return {recipe.name: _told(recipe, one, varied) for recipe, one in zip(recipes, leaves, strict=True)}


def _told(recipe: Recipe, leaves: Mapping[str, object], varied: set[str]) -> str:
    parts = []
    if any(path.startswith("model.") for path in varied):
        network = label(recipe.model)
        parts.append(network if "model.kind" in varied else network.removeprefix(f"{recipe.model.kind} "))
    if "augmentation.area" in varied:
        parts.append("crops {:g}-{:g}".format(*recipe.augmentation.area))
    if seeds := sorted(path for path in varied if path.startswith("seeds.")):
        values = [str(leaves[path]) for path in seeds]
        parts.append("seeds " + (values[0] if len(set(values)) == 1 else "/".join(values)))
    others = varied - {"name", "augmentation.area", *seeds}
    parts += [f"{path} {leaves[path]}" for path in sorted(others) if not path.startswith("model.") and path in leaves]
    return ", ".join(parts) or _UNKNOWN


# ------------------------------------------------------------------ what it takes
def _totals(made: Plan, capacity: Capacity, gpus: float, about: PlanConfig, in_seconds: bool) -> list[str]:
    beyond = 100 * (made.makespan / made.bound - 1) if made.bound > 0 else 0.0
    if not in_seconds:
        why = (
            "once the data is packed" if about.images_per_second else "give --plan.images-per-second, or train an epoch"
        )
        unit = _unit(made)
        return [
            f"time:       {made.makespan / unit:.2f}, in times of the shortest model; no plan takes less than "
            f"{made.bound / unit:.2f} (+{beyond:.1f} %)",
            f"            for hours {why}",
        ]
    what = "GPU" if gpus > 0 else "CPU"
    cost = forecast.cost(made, capacity, gpus, about.price_per_hour)
    lines = [
        f"time:       {duration(made.makespan)}, until {moment(made.makespan)} if started now; no plan takes less than "
        f"{duration(made.bound)} (+{beyond:.1f} %)",
        f"hours:      {cost.hours:.4g} {what}-hours used, {cost.held_hours:.4g} of the cluster until the end",
    ]
    if cost.money is not None and cost.held_money is not None:
        lines.append(
            f"money:      {cost.money:,.2f} for those used, {cost.held_money:,.2f} for the cluster, at "
            f"{about.price_per_hour:g} for a {what}-hour"
        )
    return lines


def _bytes(made: Plan, seen: Mapping[str, Seen], found: Manifest | None, in_seconds: bool) -> list[str]:
    classes = len(found.classes) if found is not None else _CLASSES
    each = []
    for run in made.runs:
        epochs = max(0.0, run.spec.recipe.epochs - seen.get(run.spec.name, NEW).epochs)
        seconds = run.end - run.start if in_seconds else None
        each.append(forecast.num_bytes(run.spec, classes, seconds, epochs, found))
    largest, kept = max(one.checkpoint for one in each), sum(one.kept for one in each)
    written = [one.written for one in each if one.written is not None]
    wrote = f", up to {size(sum(written))} written" if written else ""
    lines = [f"weights:    {size(kept)} kept{wrote}; a checkpoint takes up to {size(largest)}"]
    if found is not None:
        lines.append(
            f"reading:    up to {size(sum(one.read for one in each))} of data; a cache on the nodes saves most"
        )
    return lines
