"""What runs will take: time from stated or measured speeds, hours of hardware, money, bytes. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.data import sampler
from orchestrator.data.manifest import Manifest
from orchestrator.models.config import AnyModelConfig
from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.run_plan import RunPlan, ScalingModel, count_multiply_adds

# Forward alone, of forward and both products of backward.
VALIDATION_SHARE = 1 / 3
_FLOAT_BYTES = 4
# A checkpoint holds weights, momentum and average; final and best weights are raw, averaged, and exported averaged.
_CHECKPOINT_COPIES, _WEIGHTS_COPIES = 3, 3


@dataclass(frozen=True)
class RunHistory:
    """What the storage knows of a run."""

    epochs: float = 0.0  # that it has behind it
    images_per_second: float | None = None  # in training, of its last epoch
    workers: int | None = None  # that it had then
    finished: bool = False


@dataclass(frozen=True)
class Durations:
    """How long the training of each run still takes: in seconds, or where no speed is known in units of work."""

    values: tuple[float, ...]
    in_seconds: bool


NO_HISTORY = RunHistory()


def make_scaling_model(config: PlanConfig, in_seconds: bool = True) -> ScalingModel:
    """What the plan goes by. Where no speed is known a start, which is in seconds, cannot be counted."""
    return ScalingModel(config.start_seconds if in_seconds else 0.0, config.most_workers, config.serial_share)


def estimate_durations(
    specs: Sequence[RunSpec], seen: Mapping[str, RunHistory], manifest: Manifest | None, config: PlanConfig
) -> Durations:
    """How long each takes with its placement's workers: by the stated speed, else its own, else that of the others.

    Speeds of other networks follow by their multiply-adds. manifest: None when the data is not packed yet.
    """
    known = [seen.get(spec.name, NO_HISTORY) for spec in specs]
    left = [max(0.0, spec.recipe.epochs - one.epochs) for spec, one in zip(specs, known, strict=True)]
    # A run alone is not compared with any; to measure a network takes a second or two.
    costs = [float(count_multiply_adds(spec)) for spec in specs] if len(specs) > 1 else [1.0] * len(specs)
    rates = _estimate_throughputs(specs, known, costs, config)
    if manifest is None or any(rate is None for rate in rates):
        return Durations(tuple(epochs * cost for epochs, cost in zip(left, costs, strict=True)), False)
    return Durations(
        tuple(
            _count_images(spec, epochs, manifest) / rate
            for spec, epochs, rate in zip(specs, left, rates, strict=True)
            if rate is not None
        ),
        True,
    )


def _estimate_throughputs(
    specs: Sequence[RunSpec], known: Sequence[RunHistory], costs: Sequence[float], config: PlanConfig
) -> list[float | None]:
    """Images a second of each in training with its placement's workers."""
    if config.images_per_second is not None:
        return [config.images_per_second * costs[0] / cost for cost in costs]
    by_law = make_scaling_model(config)
    own = [
        one.images_per_second
        / by_law.scale_duration(1.0, one.workers or spec.placement.workers, spec.placement.workers)
        if one.images_per_second
        else None
        for spec, one in zip(specs, known, strict=True)
    ]
    measured = [rate * cost for rate, cost in zip(own, costs, strict=True) if rate is not None]
    usual = sum(measured) / len(measured) if measured else None
    return [
        rate if rate is not None else (usual / cost if usual is not None else None)
        for rate, cost in zip(own, costs, strict=True)
    ]


def _count_images(spec: RunSpec, epochs: float, manifest: Manifest) -> float:
    """Images that `epochs` train, those of validations counted by their arithmetic."""
    batch = spec.recipe.batch_size
    trained = sampler.count_steps(manifest.count_samples("train"), batch) * batch
    validated = manifest.count_samples("validation") if "validation" in manifest.splits else 0
    return epochs * (trained + VALIDATION_SHARE * validated / spec.cadence.validate_epochs)


# ------------------------------------------------------------------ cost
@dataclass(frozen=True)
class CostEstimate:
    """What a plan in seconds costs. Hours are of GPUs where runs have any, else of CPUs."""

    hours: float  # that runs use
    held_hours: float  # of the whole cluster until the last run ends
    money: float | None
    held_money: float | None


def estimate_cost(plan: RunPlan, capacity: ClusterCapacity, gpus: float, price_per_hour: float | None) -> CostEstimate:
    """Hours and money of a plan whose durations are in seconds; gpus: of each worker."""
    placement = plan.runs[0].spec.placement
    each, there = (gpus, capacity.gpus) if gpus > 0 else (placement.cpus_per_worker, capacity.cpus)
    hours = sum((run.end - run.start) * run.spec.placement.workers * each for run in plan.runs) / 3600
    held = max(hours, plan.makespan * there / 3600)
    if price_per_hour is None:
        return CostEstimate(hours, held, None, None)
    return CostEstimate(hours, held, hours * price_per_hour, held * price_per_hour)


@dataclass(frozen=True)
class StorageEstimate:
    """Of one run. At most: caches read less, and training that waits for storage writes less."""

    checkpoint: float
    kept: float  # when it is finished: checkpoints, best and final weights
    written: float | None  # None where no speed is known
    read: float


def estimate_storage(
    spec: RunSpec, classes: int, seconds: float | None, epochs: float, manifest: Manifest | None
) -> StorageEstimate:
    """Bytes of a run that trains `epochs` more in `seconds`."""
    trained, used = _count_params(spec.recipe.model, classes)
    checkpoint, weights = (
        float(_CHECKPOINT_COPIES * _FLOAT_BYTES * trained),
        float(_WEIGHTS_COPIES * _FLOAT_BYTES * used),
    )
    written = None
    if seconds is not None:
        saves = math.ceil(seconds / spec.cadence.checkpoint_seconds)
        # The best so far may be found at every validation.
        written = saves * checkpoint + (1 + math.ceil(epochs / spec.cadence.validate_epochs)) * weights
    read = 0.0
    if manifest is not None:
        sizes = {split: sum(shard.bytes for shard in shards) for split, shards in manifest.splits.items()}
        read = epochs * (sizes.get("train", 0) + sizes.get("validation", 0) / spec.cadence.validate_epochs)
    return StorageEstimate(checkpoint, spec.cadence.keep_checkpoints * checkpoint + 2 * weights, written, read)


@lru_cache(maxsize=256)
def _count_params(model: AnyModelConfig, classes: int) -> tuple[int, int]:
    """Parameters in training, and without the auxiliary heads."""
    from orchestrator.models import flops  # torch takes two seconds to import

    rows = flops.measure_row_costs(model, classes)
    return flops.sum_costs(rows, heads=True).params, flops.sum_costs(rows).params
