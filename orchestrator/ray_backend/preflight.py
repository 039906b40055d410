"""Checks before work starts, which find in seconds what would fail later, and report it together."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, RayTaskError, RuntimeEnvSetupError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import check_source_digests
from orchestrator.data import index, manifest, sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import pipeline
from orchestrator.ray_backend.cluster import list_live_nodes
from orchestrator.ray_backend.launch_errors import PreflightError, get_last_line
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination, Placement
from orchestrator.recipe.config import Recipe, check_plugins, collect_code
from orchestrator.storage import file_io, urls
from orchestrator.tracking import connect
from orchestrator.tracking.tracker import TrackingError
from orchestrator.training.callbacks.callback import create_user_callbacks

NODE_CHECK_SECONDS = 60.0  # a cold start of Python over a network file system takes its time
# A dataset of at most this many bytes is read whole before anything starts: a second of disk, less of a network.
CHECKSUM_LIMIT_BYTES = 64 * 2**20
MAX_ERROR_LENGTH = 400
TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"


def prepare_dataset(asked: Destination, resolved: Destination) -> Manifest:
    """Return the manifest; the digits are packed on first use. Raises PreflightError for missing or damaged data."""
    try:
        if asked.data == EMBEDDED_DATASET and not _has_manifest(resolved.data):
            from orchestrator.data.build.sources import digits  # scikit-learn takes a second to import

            digits.pack_digits(resolved.data)
        return _load_dataset(resolved)
    except (DataError, OSError) as error:
        raise PreflightError(str(error)) from None


def check_storage(destination: Destination) -> None:
    """Raise PreflightError when this process cannot write to the storage."""
    if (problem := file_io.find_write_problem(destination.storage)) is not None:
        raise PreflightError(f"storage: {problem}")


def check_trainable(dataset: Manifest, url: str, recipes: Sequence[Recipe], placement: Placement) -> None:
    """Raise PreflightError when one of these recipes cannot be trained so on the dataset, here or on a node."""
    problems = _find_training_problems(dataset, url, recipes, placement)
    if not problems and (code := collect_code(placement.execution, *recipes)):
        nodes = [node for node in list_live_nodes() if node["Resources"].get("CPU")]
        problems = _query_nodes(nodes, check_source_digests, code)
    if problems:
        raise PreflightError(*problems)


def check_destination(asked: Destination, recipes: Sequence[Recipe] = (), placement: Placement | None = None) -> None:
    """Check all places without writing, for a dry run. Raises PreflightError with all that is wrong."""
    destination, problems = asked.resolve(), list[str]()
    if (problem := file_io.predict_write_problem(destination.storage)) is not None:
        problems.append(f"storage: {problem}")
    try:
        if asked.data != EMBEDDED_DATASET or _has_manifest(destination.data):
            dataset = _load_dataset(destination)
            problems += _find_training_problems(dataset, destination.data, recipes, placement or Placement())
    except (DataError, OSError) as error:
        problems.append(str(error))
    try:
        if not connect.will_create_database(destination.tracking, destination.tracker):
            connect.open_tracker(destination.tracking, destination.experiment, destination.tracker).check_readable()
    except (TrackingError, ConfigError) as error:
        problems.append(f"tracking: {error}")
    if problems:
        raise PreflightError(*problems)


def _find_training_problems(dataset: Manifest, url: str, recipes: Iterable[Recipe], placement: Placement) -> list[str]:
    """Return what keeps recipes from being trained; their plug-ins and those of the execution are built and tried."""
    problems, classes = list[str](), len(dataset.classes)
    for recipe in recipes:
        try:
            if TRAIN_SPLIT not in dataset.splits:
                raise DataError(
                    f"data: {redaction.redact(url)}: it has no {TRAIN_SPLIT} split; pack or index one, and retry"
                )
            counts = [shard.samples for shard in dataset.shards(TRAIN_SPLIT)]
            sampler.check_workers(counts, recipe.order.lanes, recipe.batch_size, placement.workers)
            pipeline.build_fill(recipe.augmentation, 0, 0, classes)
            check_plugins(recipe, classes)
            create_user_callbacks(placement.execution.callbacks)
            if placement.execution.metrics:
                from orchestrator.recipe import metrics  # torch takes two seconds to import

                metrics.check_metrics(placement.execution.metrics, classes)
        except (DataError, ConfigError) as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


# ------------------------------------------------------------------ as the nodes see it
def check_nodes(destination: Destination) -> None:
    """Raise PreflightError for problems of data or storage as one of several nodes sees them."""
    nodes = list_live_nodes()
    if len(nodes) < 2:
        return
    probe = file_io.join(destination.storage, f"probe-shared-{time.time_ns()}")
    file_io.write_bytes(probe, b"seen")
    try:
        problems = _query_nodes(nodes, _check_places_on_node, destination.to_dict(), probe)
    finally:
        file_io.remove(probe)
    if problems:
        raise PreflightError("; ".join(problems))


def _query_nodes(nodes: Sequence[dict[str, Any]], check: Callable[..., None], *arguments: Any) -> list[str]:
    """Run a check on each node; return its errors, and what kept it from running, a line for each node."""
    node_of = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(check).options(num_cpus=0, scheduling_strategy=strategy)
        node_of[task.remote(*arguments)] = node
    done, late = ray.wait(list(node_of), num_returns=len(node_of), timeout=NODE_CHECK_SECONDS)
    found = [(node_of[reference], _get_node_problem(reference, node_of[reference])) for reference in done]
    problems = [f"node {node['NodeManagerAddress']}: {problem}" for node, problem in found if problem is not None]
    return problems + ([f"{len(late)} node(s) did not answer within {NODE_CHECK_SECONDS:g} s"] if late else [])


def _get_node_problem(reference: Any, node: dict[str, Any]) -> str | None:
    """Return what a node found wrong; None also when it was lost: Ray lists a lost node until it detects that."""
    try:
        ray.get(reference)
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, DataError | ConfigError | OSError):
            return str(error.cause)
        is_listed = node["NodeID"] in {live["NodeID"] for live in list_live_nodes()}
        if isinstance(error, TaskUnschedulableError | NodeDiedError) or not is_listed:
            return None
        text = get_last_line(error)[-MAX_ERROR_LENGTH:]
        fix = " (is there room on the disk of Ray's temp dir there?)" if isinstance(error, RuntimeEnvSetupError) else ""
        return f"{type(error).__name__}: {text}{fix}"
    return None


def _check_places_on_node(destination_values: dict[str, Any], probe: str) -> None:
    """Raise DataError or OSError for what is wrong with data or storage on this node."""
    destination = Destination.from_dict(destination_values)
    if not file_io.exists(probe):
        raise DataError(
            f"storage {redaction.redact(destination.storage)} is not the driver's: use a URL or a file system that all "
            "nodes share"
        )
    dataset = manifest.load(destination.data, allow_elsewhere=destination.allow_elsewhere)
    for shards in dataset.splits.values():
        for shard in shards[:1]:
            file_io.get_size(dataset.tar_url(destination.data, shard))
    if (problem := file_io.find_write_problem(destination.storage)) is not None:
        raise DataError(f"storage: {problem}")


# ------------------------------------------------------------------ files of a dataset
def _load_dataset(destination: Destination) -> Manifest:
    """Return the manifest of a dataset with all its files. Raises DataError and OSError."""
    url = destination.data
    dataset = manifest.load(url, allow_elsewhere=destination.allow_elsewhere)
    if VALIDATION_SPLIT not in dataset.splits or dataset.count_samples(VALIDATION_SPLIT) == 0:
        raise DataError(
            f"data: {redaction.redact(url)}: it has no {VALIDATION_SPLIT} split, so no error could be computed; pack "
            f"it with some images held out (--source.holdout 0.1), or index one (--{VALIDATION_SPLIT})"
        )
    _check_files(url, dataset)
    return dataset


def _has_manifest(url: str) -> bool:
    try:
        manifest.load(url, allow_elsewhere=True)
    except DataError:
        return False
    return True


def _check_files(url: str, dataset: Manifest) -> None:
    """Raise DataError for a tar or index that is missing, cut or, of a small dataset, damaged."""
    shards = [shard for split in dataset.splits.values() for shard in split]
    tars = [(dataset.tar_url(url, shard), shard.bytes, shard.sha256) for shard in shards]
    indexes = [(file_io.join(url, shard.name + index.SUFFIX), None, shard.index_sha256) for shard in shards]
    sizes = _list_sizes([file for file, _, _ in (*tars, *indexes)])
    is_small = sum(shard.bytes for shard in shards) <= CHECKSUM_LIMIT_BYTES  # larger ones are checked as they are read
    for file, size, sha256 in (*tars, *indexes):
        if file not in sizes:
            problem = "missing, the manifest lists it"
        elif size is not None and sizes[file] != size:
            problem = f"{sizes[file]} bytes, the manifest says {size}: cut or replaced"
        elif is_small and hashlib.sha256(file_io.read_bytes(file)).hexdigest() != sha256:
            problem = "damaged: not the checksum that the manifest names"
        else:
            continue
        raise DataError(f"data: {redaction.redact(file)}: {problem}; pack or index the dataset again")


def _list_sizes(files: Sequence[str]) -> dict[str, int]:
    """Return the bytes of each file that exists, by URL; each folder is listed once."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folders.setdefault(file.rpartition("/")[0], []).append(urls.get_basename(file))
    return {
        file_io.join(folder, name): size
        for folder, names in folders.items()
        for name, size in file_io.list_sizes(folder, names).items()
    }
