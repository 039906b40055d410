"""The dataset of a run: its manifest, checked, and the loaders of both splits."""

from __future__ import annotations

from orchestrator.config import redaction
from orchestrator.data import manifest as manifests
from orchestrator.data import sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.training.config import TrainJob

TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"


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
