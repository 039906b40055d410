"""Estimates of runs: time from stated or measured speeds, hours of hardware, money, bytes. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.data import sampler
from orchestrator.data.manifest import Manifest
from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.run_plan import RunPlan

# Validation is a forward pass; training is that and the two products of backward.
VALIDATION_SHARE = 1 / 3
_FLOAT_BYTES = 4
# A checkpoint holds weights, momentum and average; final and best weights are raw, averaged, and exported averaged.
_CHECKPOINT_COPIES, _WEIGHTS_COPIES = 3, 3


@dataclass(frozen=True)
class RunHistory:
    """Records of a run in the storage."""

    epochs: float = 0.0  # trained
    images_per_second: float | None = None  # in training, of its last epoch
    workers: int | None = None  # during that epoch
    finished: bool = False


NO_HISTORY = RunHistory()


@dataclass(frozen=True)
class Durations:
    """Training time that each run still needs: in seconds, or in units of work where no speed is known."""

    values: tuple[float, ...]
    in_seconds: bool


def estimate_durations(
    specs: Sequence[RunSpec], histories: Mapping[str, RunHistory], manifest: Manifest | None, config: PlanConfig
) -> Durations:
    """Estimate by the stated speed, else by each run's own, else by that of the others, scaled by multiply-adds.

    manifest: None when the data is not packed yet.
    """
    known = [histories.get(spec.name, NO_HISTORY) for spec in specs]
    epochs_left = [max(0.0, spec.recipe.epochs - run.epochs) for spec, run in zip(specs, known, strict=True)]
    # A single run is compared with none, and measuring a network takes a second or two.
    costs = [float(count_multiply_adds(spec)) for spec in specs] if len(specs) > 1 else [1.0] * len(specs)
    speeds = _estimate_speeds(specs, known, costs, config)
    if manifest is None or speeds is None:
        return Durations(tuple(epochs * cost for epochs, cost in zip(epochs_left, costs, strict=True)), False)
    images = [_count_images(spec, epochs, manifest) for spec, epochs in zip(specs, epochs_left, strict=True)]
    return Durations(tuple(count / speed for count, speed in zip(images, speeds, strict=True)), True)


def _estimate_speeds(
    specs: Sequence[RunSpec], known: Sequence[RunHistory], costs: Sequence[float], config: PlanConfig
) -> list[float] | None:
    """Return images per second of each in training with its placement's workers; None without any speed."""
    if config.images_per_second is not None:
        return [config.images_per_second * costs[0] / cost for cost in costs]
    # Speeds are taken to grow with the workers; what differs by more is measured within an epoch.
    own = [
        run.images_per_second * spec.placement.workers / (run.workers or spec.placement.workers)
        if run.images_per_second
        else None
        for spec, run in zip(specs, known, strict=True)
    ]
    measured = [speed * cost for speed, cost in zip(own, costs, strict=True) if speed is not None]
    if not measured:
        return None
    usual = sum(measured) / len(measured)
    return [usual / cost if speed is None else speed for speed, cost in zip(own, costs, strict=True)]


def _count_images(spec: RunSpec, epochs: float, manifest: Manifest) -> float:
    """Count the images that `epochs` train; those of validations count by their arithmetic."""
    batch = spec.recipe.batch_size
    trained = sampler.count_steps(manifest.count_samples("train"), batch) * batch
    validated = manifest.count_samples("validation") if "validation" in manifest.splits else 0
    return epochs * (trained + VALIDATION_SHARE * validated / spec.cadence.validate_epochs)


def count_multiply_adds(spec: RunSpec) -> int:
    """Count the multiply-adds of one image's forward pass through a run's network in training."""
    from orchestrator.models import cost  # torch takes two seconds to import

    return cost.measure_cost(spec.recipe.model)[1]


@dataclass(frozen=True)
class CostEstimate:
    """Cost of a plan in seconds. Hours are of GPUs where runs have any, else of CPUs."""

    hours: float  # that runs use
    held_hours: float  # of the whole cluster until the last run ends


def estimate_cost(plan: RunPlan, capacity: ClusterCapacity, gpus: float) -> CostEstimate:
    """Estimate the hours of a plan whose durations are in seconds; gpus: of each worker."""
    placement = plan.order[0].placement
    per_worker, available = (gpus, capacity.gpus) if gpus > 0 else (placement.cpus_per_worker, capacity.cpus)
    hours = sum((run.end - run.start) * run.spec.placement.workers * per_worker for run in plan.runs) / 3600
    return CostEstimate(hours, max(hours, plan.makespan * available / 3600))


@dataclass(frozen=True)
class StorageEstimate:
    """Bytes of one run, at most: caches read less, and training that waits for storage writes less."""

    checkpoint: float
    kept: float  # when it is finished: checkpoints, best and final weights
    written: float | None  # None where no speed is known
    read: float


def estimate_storage(
    spec: RunSpec, classes: int, seconds: float | None, epochs: float, manifest: Manifest | None
) -> StorageEstimate:
    """Estimate the bytes of a run that trains `epochs` more in `seconds`."""
    from orchestrator.models import cost  # torch takes two seconds to import

    in_training, in_inference = (cost.measure_cost(spec.recipe.model, classes, each)[0] for each in (True, False))
    checkpoint = float(_CHECKPOINT_COPIES * _FLOAT_BYTES * in_training)
    weights = float(_WEIGHTS_COPIES * _FLOAT_BYTES * in_inference)
    written = None
    if seconds is not None:
        saves = math.ceil(seconds / spec.cadence.checkpoint_seconds)
        # Every validation may find the best weights so far.
        written = saves * checkpoint + (1 + math.ceil(epochs / spec.cadence.validate_epochs)) * weights
    read = 0.0
    if manifest is not None:
        sizes = {split: sum(shard.bytes for shard in shards) for split, shards in manifest.splits.items()}
        read = epochs * (sizes.get("train", 0) + sizes.get("validation", 0) / spec.cadence.validate_epochs)
    return StorageEstimate(checkpoint, spec.cadence.keep_checkpoints * checkpoint + 2 * weights, written, read)
