"""How an attempt starts: dataset, network, loaders and the newest checkpoint, on all ranks alike or on none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint.format import CheckpointError
from orchestrator.config.errors import ConfigError
from orchestrator.data import audit, order
from orchestrator.data import manifest as manifests
from orchestrator.data.errors import DataError
from orchestrator.data.loader import Batch, Loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.reader import SampleReader
from orchestrator.storage import urls
from orchestrator.training import attempts
from orchestrator.training.attempts import Attempt
from orchestrator.training.delivery import first_trouble
from orchestrator.training.job import TrainJob, checkpoints_of
from orchestrator.training.saver import PRODUCTIVE
from orchestrator.training.state import TrainState
from orchestrator.training.world import World

T = TypeVar("T")

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Resumed:
    """Where an attempt goes on."""

    passed_over: list[str]  # newer checkpoints that could not be used, and why
    productive: float = 0.0  # seconds that led there


def unanimous(world: World, check: Callable[[], T]) -> T:
    """The check's result when it passes on every rank; else its error on every rank, so that none waits for another.

    Raises what the check raised here, or as DataError what it raised on another rank.
    """
    error: DataError | CheckpointError | ConfigError | None = None
    try:
        result = check()
    except (DataError, CheckpointError, ConfigError) as raised:
        error = raised
    if world.sum([float(error is not None)])[0]:
        told = first_trouble(world, None if error is None else str(error))
        raise error or DataError(told)
    return result


def dataset(job: TrainJob, world: World) -> Manifest:
    """The manifest of the run's dataset. Raises DataError when it is another one, or cannot train this run."""
    manifest = manifests.load(job.data, allow_elsewhere=job.allow_elsewhere)
    if manifest.digest() != job.dataset_digest:
        raise DataError(
            f"data: {urls.redact(job.data)}: its digest is {manifest.digest()}, the run was started on "
            f"{job.dataset_digest}: the dataset changed; give the old one, or start anew with --new"
        )
    order.check(counts(manifest, TRAIN), job.recipe.order.lanes, job.recipe.batch_size, world.workers)
    if manifest.samples(VALIDATION) == 0:
        raise DataError(
            f"data: {urls.redact(job.data)}: its {VALIDATION} split is empty, so no error could ever be told"
        )
    return manifest


def counts(manifest: Manifest, split: str) -> tuple[int, ...]:
    """Samples of each shard of a split."""
    return tuple(shard.samples for shard in manifest.shards(split))


def loaders(job: TrainJob, manifest: Manifest, world: World) -> tuple[Loader, Loader]:
    """For training and validation. Raises DataError when this process cannot use them."""
    training = _loader(job, manifest, TRAIN, world)
    training.check(job.recipe.order, job.recipe.augmentation, world.workers)
    return training, _loader(job, manifest, VALIDATION, world)


def blank_batch(job: TrainJob) -> Batch:
    """Two black images of weight 0: batch norms over maps of 1 x 1 have nothing to go by with one."""
    size = job.recipe.model.image_size
    images = torch.zeros((2, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return Batch(images, torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def resume(job: TrainJob, world: World, attempt: Attempt, state: TrainState) -> Resumed:
    """Load the newest complete checkpoint that counts, which rank 0 picks for all."""
    folder, device = checkpoints_of(job.folder), str(world.device)
    saved: dict[str, Any] = {}
    passed_over: list[str] = []
    chosen = [0.0, 0.0, 0.0]
    nothing = checkpoint_format.Newest(None, {}, [])
    void = attempts.void(job.folder)
    found = unanimous(world, lambda: checkpoint_format.newest(folder, device, void) if world.leads else nothing)
    if world.leads:
        saved, passed_over = found.state, found.passed_over
        if found.place is not None:
            chosen = [1.0, float(found.place.samples), float(found.place.attempt)]
    # Only rank 0 contributes, so the sum is its choice on every rank.
    resumed, samples, number = world.sum(chosen)
    if not resumed:
        return Resumed(passed_over)
    url = checkpoint_format.place_of(folder, int(samples), int(number))
    # A rank that does not see it must crash: to start at the beginning would train on other weights.
    content = unanimous(world, lambda: _checked(job, url, saved, device))
    state.restore(content, urls.redact(url))
    return Resumed(passed_over, float(content.get(PRODUCTIVE, 0.0)))


def _checked(job: TrainJob, url: str, loaded: dict[str, Any], device: str) -> dict[str, Any]:
    """The checkpoint at `url`, loaded already on rank 0, if it is of this recipe."""
    saved = loaded or checkpoint_format.load(url, device)
    if saved.get("recipe") != job.recipe.to_dict():
        raise CheckpointError(f"{urls.redact(url)}: is of another recipe; start anew with --new")
    try:
        audit.record_of(saved.get("audit"), urls.redact(url))
    except DataError as error:
        raise CheckpointError(f"{error}; start anew with --new") from None
    return saved


def _loader(job: TrainJob, manifest: Manifest, split: str, world: World) -> Loader:
    reader = SampleReader(job.data, manifest, split, job.reading)
    return Loader(reader, job.recipe.model.image_size, job.threads, pin=world.device.type == "cuda")
