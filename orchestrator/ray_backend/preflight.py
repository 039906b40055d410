"""Everything that can be known to be wrong before work starts, found in seconds and told at once."""

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
from orchestrator.ray_backend.launch_errors import PreflightError
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.plugin_code import check_plugins
from orchestrator.storage import file_io, urls
from orchestrator.tracking import connect
from orchestrator.tracking.tracker import TrackingError

NODE_CHECK_SECONDS = 60.0  # a cold start of Python over a network file system takes its time
MAX_ERROR_LENGTH = 400  # characters of an error of Ray's
# A dataset of at most this many bytes is read whole before anything starts: a second of disk, less of a network.
CHECKSUM_LIMIT_BYTES = 64 * 2**20
TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"


def prepare_dataset(asked: Destination, resolved: Destination) -> Manifest:
    """The dataset's manifest; the embedded digits are packed on first use.

    Raises PreflightError when it is missing or damaged.
    """
    try:
        if asked.data == EMBEDDED_DATASET and not _has_manifest(resolved.data):
            from orchestrator.data.build.sources import digits  # scikit-learn takes a second to import

            digits.pack_digits(resolved.data)
        found = _check_dataset(resolved)
        _check_content(resolved.data, found)
    except (DataError, OSError) as error:
        raise PreflightError([str(error)]) from None
    return found


def check_trainable(found: Manifest, url: str, recipes: Sequence[Recipe], workers: int) -> None:
    """Raise PreflightError when the workers of one of these recipes would refuse the dataset."""
    problems = []
    for recipe in recipes:
        try:
            if TRAIN_SPLIT not in found.splits:
                raise DataError(
                    f"data: {redaction.redact(url)}: it has no {TRAIN_SPLIT} split; pack or index one, and try again"
                )
            counts = [shard.samples for shard in found.shards(TRAIN_SPLIT)]
            sampler.check_workers(counts, recipe.order.lanes, recipe.batch_size, workers)
            pipeline.build_fill(recipe.augmentation, 0, 0, len(found.classes))
            check_plugins(recipe, len(found.classes))
        except (DataError, ConfigError) as error:
            problems.append(str(error))
    if problems:
        raise PreflightError(list(dict.fromkeys(problems)))


def check_destination(asked: Destination, recipes: Sequence[Recipe] = (), workers: int = 1) -> None:
    """Look at all places without writing, for a dry run. Raises PreflightError with all that a start would refuse."""
    destination, problems = asked.resolve(), list[str]()
    if (problem := file_io.predict_write_problem(destination.storage)) is not None:
        problems.append(f"storage: {problem}")
    packed_on_use = asked.data == EMBEDDED_DATASET and not _has_manifest(destination.data)
    try:
        if not packed_on_use:
            check_trainable(_check_dataset(destination), destination.data, recipes, workers)
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


def _check_dataset(destination: Destination) -> Manifest:
    """Return the manifest of a dataset that is whole as far as a look tells. Raises DataError and OSError."""
    url = destination.data
    found = manifest.load(url, allow_elsewhere=destination.allow_elsewhere)
    if VALIDATION_SPLIT not in found.splits or found.count_samples(VALIDATION_SPLIT) == 0:
        raise DataError(
            f"data: {redaction.redact(url)}: it has no {VALIDATION_SPLIT} split, so no error could be "
            "computed; pack it with some "
            f"images held out (--source.holdout 0.1), or index one (--{VALIDATION_SPLIT})"
        )
    _check_shards(url, found)
    return found


def _has_manifest(url: str) -> bool:
    """Whether a manifest of this code's format is there."""
    try:
        manifest.load(url, allow_elsewhere=True)
    except DataError:
        return False
    return True


class _ShardLabels(Sequence[NDArray[np.int64]]):
    """The labels of each shard, read when they are asked for."""

    def __init__(self, url: str, shards: Sequence[Shard]) -> None:
        self._url, self._shards = url, shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, shard: Any) -> Any:
        return index.load(self._url, self._shards[shard]).labels


def check_label_mixing(url: str, found: Manifest, recipe: Recipe) -> str | None:
    """What is to be said of shards whose labels are poorly mixed; None when they are not, or cannot be read."""
    try:
        told = mix.measure_shuffle_quality(_ShardLabels(url, found.shards("train")), recipe.order, recipe.batch_size)
    except (DataError, OSError):
        return None  # the run itself tells what is wrong with the data
    return told.format_message() if told.is_poor else None


def check_storage_writable(destination: Destination) -> str | None:
    """A problem with the storage as this process sees it."""
    problem = file_io.find_write_problem(destination.storage)
    return f"storage: {problem}" if problem else None


def check_exclusive_create(destination: Destination) -> str | None:
    """What is to be said of a storage that lets two drivers have the same run; None when it does not."""
    found = file_io.find_conditional_create_problem(destination.storage)
    return f"storage: {found}" if found else None


def check_nodes(destination: Destination) -> str | None:
    """A problem with data or storage as the cluster's nodes see them; nothing to ask on a single node."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len(nodes) < 2:
        return None
    mark = file_io.join(destination.storage, f"probe-shared-{time.time_ns()}")
    file_io.write_bytes(mark, b"seen")
    try:
        asked = {
            ray.remote(_check_on_node)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(destination.to_dict(), mark, node["NodeManagerAddress"]): node
            for node in nodes
        }
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_CHECK_SECONDS)
        problems = [problem for one in done if (problem := _get_node_problem(one, asked[one])) is not None]
        if late:
            problems.append(f"{len(late)} node(s) did not answer within {NODE_CHECK_SECONDS:g} s")
    finally:
        file_io.remove(mark)
    return "; ".join(problems) or None


def _get_node_problem(reference: Any, node: dict[str, Any]) -> str | None:
    """What a node found wrong; nothing when it has gone: Ray lists a lost node until it misses it."""
    try:
        found: str | None = ray.get(reference)
    except RayError as error:
        gone = isinstance(error, TaskUnschedulableError | NodeDiedError) or node["NodeID"] not in {
            one["NodeID"]
            for one in ray.nodes()  # type: ignore[no-untyped-call]
            if one["Alive"]
        }
        fix = " (is there room on the disk of Ray's temp dir there?)" if isinstance(error, RuntimeEnvSetupError) else ""
        return (
            None if gone else f"node {node['NodeManagerAddress']}: {type(error).__name__}: {_shorten_error(error)}{fix}"
        )
    return found


def _shorten_error(error: Exception) -> str:
    """Its first and its last words: Ray puts the cause at the end of a long text."""
    words = " ".join(str(error).split())
    return (
        words
        if len(words) <= MAX_ERROR_LENGTH
        else f"{words[: MAX_ERROR_LENGTH // 4]} ... {words[-3 * MAX_ERROR_LENGTH // 4 :]}"
    )


def _check_on_node(raw: dict[str, Any], mark: str, node: str) -> str | None:
    destination = Destination.from_dict(raw)
    try:
        if not file_io.exists(mark):
            return (
                f"node {node}: storage {redaction.redact(destination.storage)} is not the driver's: use a "
                "URL or a file "
                "system that all nodes share"
            )
        found = manifest.load(destination.data, allow_elsewhere=destination.allow_elsewhere)
        for shard in [shards[0] for shards in found.splits.values() if shards]:
            file_io.get_size(found.tar_url(destination.data, shard))
    except (DataError, OSError) as error:
        return f"node {node}: {error}"
    problem = file_io.find_write_problem(destination.storage)
    return f"node {node}: storage: {problem}" if problem else None


def _check_shards(url: str, found: Manifest) -> None:
    """Raise DataError when a tar or index that the manifest lists is missing, or a tar has another size."""
    pairs = [
        (shard, found.tar_url(url, shard), file_io.join(url, shard.name + index.SUFFIX))
        for shards in found.splits.values()
        for shard in shards
    ]
    sizes = _list_sizes([place for _, *places in pairs for place in places])
    for shard, tar, listing in pairs:
        for place in (tar, listing):
            if place not in sizes:
                raise DataError(f"data: {redaction.redact(place)}: missing, the manifest lists it")
        if sizes[tar] != shard.bytes:
            raise DataError(
                f"data: {redaction.redact(tar)}: {sizes[tar]} bytes, the manifest says {shard.bytes}: cut or replaced; "
                "pack or index the dataset again"
            )


def _list_sizes(places: Sequence[str]) -> dict[str, int]:
    """Return the bytes of each object that is there, by URL; each folder is listed once."""
    folders: dict[str, list[str]] = {}
    for place in places:
        folders.setdefault(place.rpartition("/")[0], []).append(urls.get_basename(place))
    return {
        file_io.join(folder, last): size
        for folder, names in folders.items()
        for last, size in file_io.list_sizes(folder, names).items()
    }


def _check_content(url: str, found: Manifest) -> None:
    """Raise DataError when a shard or index of a small dataset is altered; large ones are checked as they are read."""
    if sum(shard.bytes for shards in found.splits.values() for shard in shards) > CHECKSUM_LIMIT_BYTES:
        return
    for shard in (shard for shards in found.splits.values() for shard in shards):
        listing = file_io.join(url, shard.name + index.SUFFIX)
        for where, sha256 in ((found.tar_url(url, shard), shard.sha256), (listing, shard.index_sha256)):
            if hashlib.sha256(file_io.read_bytes(where)).hexdigest() != sha256:
                raise DataError(
                    f"data: {redaction.redact(where)}: damaged: not the checksum that the manifest names; "
                    "pack or index the "
                    "dataset again"
                )
