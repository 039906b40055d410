"""The start of an attempt: its number, the run's dataset, and the checkpoint that it resumes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.checkpoint import CheckpointError, LoadedCheckpoint
from orchestrator.config import redaction
from orchestrator.data import manifest as manifests
from orchestrator.data import sample_audit, sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.training import attempts
from orchestrator.training.attempts import Attempt
from orchestrator.training.callbacks.checkpointer import PRODUCTIVE_SECONDS_KEY
from orchestrator.training.config import TrainJob
from orchestrator.training.distributed import DistributedContext, RankSums
from orchestrator.training.run_dir import get_attempts_dir, get_checkpoints_dir
from orchestrator.training.train_state import TrainState

TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"


@dataclass(frozen=True)
class ResumeInfo:
    """The start of an attempt: from a checkpoint, or from nothing."""

    skipped_checkpoints: list[str]  # newer checkpoints that could not be used, and why
    productive_seconds: float = 0.0  # seconds of the run that led there


@dataclass(frozen=True)
class _AttemptStart(RankSums):
    """The attempt that rank 0 created; zeros on the other ranks."""

    number: float = 0.0
    start_time: float = 0.0  # unix seconds


@dataclass(frozen=True)
class _ResumePoint(RankSums):
    """The checkpoint that rank 0 chose; zeros on the other ranks, and when there is none."""

    exists: float = 0.0
    samples: float = 0.0
    attempt: float = 0.0


def start_attempt(job: TrainJob, world: DistributedContext) -> Attempt:
    """Create an attempt, whose number rank 0 takes for all; every rank must call it."""
    created = attempts.create_attempt(job.folder, world.workers) if world.is_rank_zero else None
    own = _AttemptStart(created.number, created.start_time) if created is not None else _AttemptStart()
    start = world.all_reduce_sums(own)
    return created or Attempt(get_attempts_dir(job.folder), int(start.number), start.start_time)


def load_manifest(job: TrainJob, workers: int) -> Manifest:
    """Load the manifest of the run's dataset. Raises DataError when it is another one, or cannot train this run."""
    manifest = manifests.load(job.data, allow_elsewhere=job.allow_elsewhere)
    if manifest.digest() != job.dataset_digest:
        raise DataError(
            f"data: {redaction.redact(job.data)}: its digest is {manifest.digest()}, the run was started on "
            f"{job.dataset_digest}: the dataset changed; give the old one, or start anew with --new"
        )
    counts = count_shard_samples(manifest, TRAIN_SPLIT)
    sampler.check_workers(counts, job.recipe.order.lanes, job.recipe.batch_size, workers)
    if manifest.count_samples(VALIDATION_SPLIT) == 0:
        raise DataError(
            f"data: {redaction.redact(job.data)}: its {VALIDATION_SPLIT} split is empty; pack the dataset with "
            "validation images"
        )
    return manifest


def count_shard_samples(manifest: Manifest, split: str) -> tuple[int, ...]:
    """Return the samples of each shard of a split."""
    return tuple(shard.samples for shard in manifest.shards(split))


def build_dataloaders(job: TrainJob, manifest: Manifest, workers: int, *, pin: bool) -> tuple[BatchLoader, BatchLoader]:
    """Return the loaders for training and validation. Raises DataError when this process cannot use them."""
    training, validation = (
        BatchLoader(
            SampleReader(job.data, manifest, split, job.reading), job.recipe.model.image_size, job.threads, pin=pin
        )
        for split in (TRAIN_SPLIT, VALIDATION_SPLIT)
    )
    training.check_config(job.recipe.order, job.recipe.augmentation, workers)
    return training, validation


def resume_from_checkpoint(job: TrainJob, world: DistributedContext, state: TrainState) -> ResumeInfo:
    """Restore the newest complete checkpoint that is valid, which rank 0 picks for all; every rank must call it.

    Raises CheckpointError, on every rank, for one of another recipe.
    """
    folder, device = get_checkpoints_dir(job.folder), str(world.device)

    def load() -> LoadedCheckpoint:
        if not world.is_rank_zero:
            return LoadedCheckpoint(None, {}, [])
        return checkpoint_format.load_newest(folder, device, attempts.load_stale_checkpoint_check(job.folder))

    newest = world.check_on_all_ranks(load)
    # Only rank 0 contributes, so the sum is its choice on every rank.
    own = _ResumePoint()
    if newest.checkpoint is not None:
        own = _ResumePoint(1.0, newest.checkpoint.samples, newest.checkpoint.attempt)
    point = world.all_reduce_sums(own)
    if not point.exists:
        return ResumeInfo(newest.skipped)
    url = checkpoint_dir.make_checkpoint_url(folder, int(point.samples), int(point.attempt))
    # A rank that does not see it must crash: to start at the beginning would train on other weights.
    content = world.check_on_all_ranks(lambda: _load_matching_checkpoint(job, url, newest.state, device))
    state.restore(content, redaction.redact(url))
    return ResumeInfo(newest.skipped, float(content.get(PRODUCTIVE_SECONDS_KEY, 0.0)))


def _load_matching_checkpoint(job: TrainJob, url: str, loaded: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the checkpoint at `url`, which rank 0 has loaded. Raises CheckpointError when it is of another recipe."""
    saved = loaded or checkpoint_format.load(url, device)
    if saved.get("recipe") != job.recipe.to_dict():
        raise CheckpointError(f"{redaction.redact(url)}: is of another recipe; start anew with --new")
    try:
        sample_audit.parse_record(saved.get("audit"), redaction.redact(url))
    except DataError as error:
        raise CheckpointError(f"{error}; start anew with --new") from None
    return saved
