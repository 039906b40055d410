"""Checks before work starts, which find in seconds what would fail later, and report it together."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import NodeDiedError, RayError, RuntimeEnvSetupError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import index, manifest, sampler
from orchestrator.data import shuffle_quality as mix
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms import pipeline
from orchestrator.ray_backend.launch_errors import PreflightError, shorten_error
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination
from orchestrator.recipe.config import Recipe, check_plugins
from orchestrator.storage import file_io, urls
from orchestrator.tracking import connect
from orchestrator.tracking.tracker import TrackingError

NODE_CHECK_SECONDS = 60.0  # a cold start of Python over a network file system takes its time
# A dataset of at most this many bytes is read whole before anything starts: a second of disk, less of a network.
CHECKSUM_LIMIT_BYTES = 64 * 2**20
TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"


def prepare_dataset(asked: Destination, resolved: Destination) -> Manifest:
    """Return the dataset's manifest; the embedded digits are packed on first use.

    Raises PreflightError when it is missing or damaged.
    """
    try:
        if asked.data == EMBEDDED_DATASET and not _has_manifest(resolved.data):
            from orchestrator.data.build.sources import digits  # scikit-learn takes a second to import

            digits.pack_digits(resolved.data)
        dataset = _load_dataset(resolved)
        _check_content(resolved.data, dataset)
    except (DataError, OSError) as error:
        raise PreflightError([str(error)]) from None
    return dataset


def check_trainable(dataset: Manifest, url: str, recipes: Sequence[Recipe], workers: int) -> None:
    """Raise PreflightError when so many workers cannot train one of these recipes on the dataset."""
    problems = []
    for recipe in recipes:
        try:
            if TRAIN_SPLIT not in dataset.splits:
                raise DataError(
                    f"data: {redaction.redact(url)}: it has no {TRAIN_SPLIT} split; pack or index one, and retry"
                )
            counts = [shard.samples for shard in dataset.shards(TRAIN_SPLIT)]
            sampler.check_workers(counts, recipe.order.lanes, recipe.batch_size, workers)
            pipeline.build_fill(recipe.augmentation, 0, 0, len(dataset.classes))
            check_plugins(recipe, len(dataset.classes))
        except (DataError, ConfigError) as error:
            problems.append(str(error))
    if problems:
        raise PreflightError(list(dict.fromkeys(problems)))


def check_destination(asked: Destination, recipes: Sequence[Recipe] = (), workers: int = 1) -> None:
    """Check all places without writing, for a dry run. Raises PreflightError with all that is wrong."""
    destination, problems = asked.resolve(), list[str]()
    if (problem := file_io.predict_write_problem(destination.storage)) is not None:
        problems.append(f"storage: {problem}")
    packed_on_use = asked.data == EMBEDDED_DATASET and not _has_manifest(destination.data)
    try:
        if not packed_on_use:
            check_trainable(_load_dataset(destination), destination.data, recipes, workers)
    except PreflightError as error:
        problems.extend(error.problems)
    except (DataError, OSError) as error:
        problems.append(str(error))
    try:
        if not connect.will_create_database(destination.tracking, destination.tracker):
            connect.open_tracker(destination.tracking, destination.experiment, destination.tracker).check_readable()
    except (TrackingError, ConfigError) as error:
        problems.append(f"tracking: {error}")
    if problems:
        raise PreflightError(problems)


def _load_dataset(destination: Destination) -> Manifest:
    """Return the manifest of a dataset with all its files. Raises DataError and OSError."""
    url = destination.data
    dataset = manifest.load(url, allow_elsewhere=destination.allow_elsewhere)
    if VALIDATION_SPLIT not in dataset.splits or dataset.count_samples(VALIDATION_SPLIT) == 0:
        raise DataError(
            f"data: {redaction.redact(url)}: it has no {VALIDATION_SPLIT} split, so no error could be "
            "computed; pack it with some "
            f"images held out (--source.holdout 0.1), or index one (--{VALIDATION_SPLIT})"
        )
    _check_shards(url, dataset)
    return dataset


def _has_manifest(url: str) -> bool:
    """Return whether there is a manifest that this code can read."""
    try:
        manifest.load(url, allow_elsewhere=True)
    except DataError:
        return False
    return True


class _ShardLabels(Sequence[NDArray[np.int64]]):
    """The labels of each shard, read on demand."""

    def __init__(self, url: str, shards: Sequence[Shard]) -> None:
        self._url, self._shards = url, shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, shard: Any) -> Any:
        return index.load(self._url, self._shards[shard]).labels


def check_label_mixing(url: str, dataset: Manifest, recipe: Recipe) -> str | None:
    """Return a warning when the shards' labels are poorly mixed; None when they are not, or cannot be read."""
    labels = _ShardLabels(url, dataset.shards(TRAIN_SPLIT))
    try:
        quality = mix.measure_shuffle_quality(labels, recipe.order, recipe.batch_size)
    except (DataError, OSError):
        return None  # the run itself reports what is wrong with the data
    return quality.format_message() if quality.is_poor else None


def check_storage_writable(destination: Destination) -> str | None:
    """Return why this process cannot write to the storage; None when it can."""
    problem = file_io.find_write_problem(destination.storage)
    return f"storage: {problem}" if problem else None


def check_exclusive_create(destination: Destination) -> str | None:
    """Return a warning when the storage cannot keep two drivers from running the same run; None when it can."""
    problem = file_io.find_conditional_create_problem(destination.storage)
    return f"storage: {problem}" if problem else None


def check_nodes(destination: Destination) -> str | None:
    """Return the problems of data or storage as the cluster's nodes see them; None when all is well or on one node."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len(nodes) < 2:
        return None
    probe = file_io.join(destination.storage, f"probe-shared-{time.time_ns()}")
    file_io.write_bytes(probe, b"seen")
    try:
        node_of = {
            ray.remote(_check_on_node)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(destination.to_dict(), probe, node["NodeManagerAddress"]): node
            for node in nodes
        }
        done, late = ray.wait(list(node_of), num_returns=len(node_of), timeout=NODE_CHECK_SECONDS)
        problems = [problem for ref in done if (problem := _get_node_problem(ref, node_of[ref])) is not None]
        if late:
            problems.append(f"{len(late)} node(s) did not answer within {NODE_CHECK_SECONDS:g} s")
    finally:
        file_io.remove(probe)
    return "; ".join(problems) or None


def _get_node_problem(reference: Any, node: dict[str, Any]) -> str | None:
    """Return what a node found wrong; None also when it was lost: Ray lists a lost node until it detects that."""
    try:
        problem: str | None = ray.get(reference)
    except RayError as error:
        gone = isinstance(error, TaskUnschedulableError | NodeDiedError) or node["NodeID"] not in {
            one["NodeID"]
            for one in ray.nodes()  # type: ignore[no-untyped-call]
            if one["Alive"]
        }
        fix = " (is there room on the disk of Ray's temp dir there?)" if isinstance(error, RuntimeEnvSetupError) else ""
        return (
            None if gone else f"node {node['NodeManagerAddress']}: {type(error).__name__}: {shorten_error(error)}{fix}"
        )
    return problem


def _check_on_node(destination_values: dict[str, Any], probe: str, node: str) -> str | None:
    """Return what is wrong with data or storage on this node; None when nothing is."""
    destination = Destination.from_dict(destination_values)
    try:
        if not file_io.exists(probe):
            return (
                f"node {node}: storage {redaction.redact(destination.storage)} is not the driver's: use a URL or a "
                "file system that all nodes share"
            )
        dataset = manifest.load(destination.data, allow_elsewhere=destination.allow_elsewhere)
        for shard in [shards[0] for shards in dataset.splits.values() if shards]:
            file_io.get_size(dataset.tar_url(destination.data, shard))
    except (DataError, OSError) as error:
        return f"node {node}: {error}"
    problem = file_io.find_write_problem(destination.storage)
    return f"node {node}: storage: {problem}" if problem else None


def _check_shards(url: str, dataset: Manifest) -> None:
    """Raise DataError when a tar or index that the manifest lists is missing, or a tar has another size."""
    files = [
        (shard, dataset.tar_url(url, shard), file_io.join(url, shard.name + index.SUFFIX))
        for shards in dataset.splits.values()
        for shard in shards
    ]
    sizes = _list_sizes([file for _, *pair in files for file in pair])
    for shard, tar, listing in files:
        for file in (tar, listing):
            if file not in sizes:
                raise DataError(f"data: {redaction.redact(file)}: missing, the manifest lists it")
        if sizes[tar] != shard.bytes:
            raise DataError(
                f"data: {redaction.redact(tar)}: {sizes[tar]} bytes, the manifest says {shard.bytes}: cut or replaced; "
                "pack or index the dataset again"
            )


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


def _check_content(url: str, dataset: Manifest) -> None:
    """Raise DataError when a file of a small dataset is damaged; large datasets are checked as they are read."""
    shards = [shard for split in dataset.splits.values() for shard in split]
    if sum(shard.bytes for shard in shards) > CHECKSUM_LIMIT_BYTES:
        return
    for shard in shards:
        listing = file_io.join(url, shard.name + index.SUFFIX)
        for file, sha256 in ((dataset.tar_url(url, shard), shard.sha256), (listing, shard.index_sha256)):
            if hashlib.sha256(file_io.read_bytes(file)).hexdigest() != sha256:
                raise DataError(
                    f"data: {redaction.redact(file)}: damaged: not the checksum that the manifest names; pack or index "
                    "the dataset again"
                )
