"""Validation with exact counts: every sample of the split once, over all ranks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from orchestrator.data import sample_audit
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BadSample, BatchLoader
from orchestrator.data.dataset import ReadStats
from orchestrator.models.network import Logits, Network
from orchestrator.recipe.metrics import ErrorCounts, count_errors
from orchestrator.recipe.normalize import Normalizer
from orchestrator.training.delivered_samples import gather_first_error
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.epoch_meter import EpochMeter
from orchestrator.training.run_context import RunContext

VALIDATION_BATCH_SIZE = 256  # images of a forward pass; does not change the counts


def count_validation_errors(
    model: Network, weights: dict[str, dict[str, Tensor]], loader: BatchLoader, counts: tuple[int, ...],
    normalise: Normalizer, world: DistributedContext, max_bad_share: float,
) -> dict[str, ErrorCounts]:  # fmt: skip
    """Centre-crop counts over the whole split for each named set of weights (empty set: the model's own).

    Every rank must call it. Images are decoded once for all sets. Raises RuntimeError when samples
    are missing; DataError, on every rank alike, when a rank cannot read its data or too many images are broken.
    """
    local = {name: ErrorCounts() for name in weights}
    bad: list[BadSample] = []
    trouble: str | None = None
    model.eval()
    try:
        with torch.inference_mode():
            for batch in loader.iter_evaluation(counts, VALIDATION_BATCH_SIZE, world.rank, world.workers):
                images = normalise(batch.images.to(world.device, non_blocking=True))
                labels, sample_weights = batch.labels.to(world.device), batch.weights.to(world.device)
                bad += batch.bad
                for name, override in weights.items():
                    logits: Logits = functional_call(model, override, (images,))
                    local[name] = local[name] + count_errors(logits, labels, sample_weights)
    except DataError as error:
        trouble = str(error)  # told below: the other ranks are on their way to that collective
    model.train()
    flat = [float(value) for each in local.values() for value in (each.samples, each.wrong_top1, each.wrong_top5)]
    *summed, all_bad, failed = world.all_reduce_values([*flat, float(len(bad)), float(trouble is not None)])
    if failed:
        raise DataError(gather_first_error(world, trouble))
    if all_bad > sample_audit.compute_bad_limit(max_bad_share, sum(counts)):
        first = f"{bad[0].key!r} at byte {bad[0].offset} of {bad[0].source}: {bad[0].reason}" if bad else None
        raise DataError(
            f"data: {all_bad:g} of the {sum(counts)} images of the validation split cannot be read, more than "
            f"max_bad_share {max_bad_share:g} allows; the first: {gather_first_error(world, first)}"
        )
    whole = iter(int(value) for value in summed)
    found = {name: ErrorCounts(next(whole), next(whole), next(whole)) for name in weights}
    for name, counted in found.items():
        if counted.samples + int(all_bad) != sum(counts):
            raise RuntimeError(f"validation of {name} saw {counted.samples} samples of {sum(counts)}")
        if counted.samples == 0:
            raise DataError(f"data: all {int(all_bad)} images of the validation split are broken")
    return found


def end_epoch(parts: RunContext, trained: dict[str, float]) -> dict[str, float]:
    """Validate if this epoch is due for it, record and report; the epoch's metrics. Every rank must call it."""
    progress, cadence = parts.state.progress, parts.job.cadence
    last = progress.epoch == parts.job.recipe.epochs
    bad = parts.state.audit_record.get_epoch(progress.epoch - 1).bad
    metrics = {"train/epoch": float(progress.epoch), "train/bad_samples": float(len(bad))} | trained
    if last or progress.epoch % cadence.validate_epochs == 0:
        with parts.watchdog.watch_phase("evaluation", cadence.limits.evaluation_seconds):
            metrics |= _compute_validation_metrics(parts)
        if parts.best_checkpoint is not None:
            parts.best_checkpoint.save_if_best(parts.state, metrics)
    metrics["train/goodput"] = parts.goodput.productive_share
    parts.journal_logger.log_epoch_metrics(progress, metrics)
    parts.launcher.report({"epoch": progress.epoch, "samples": progress.samples, **metrics})
    return metrics


def compute_train_metrics(parts: RunContext, meter: EpochMeter, loss: float, weight: float) -> dict[str, float]:
    """Of the steps of an epoch: loss and weight are sums over all ranks."""
    found = {
        "train/loss": loss / max(weight, 1.0),
        "train/rate": parts.learning_rate,
        "train/images_per_second": weight / meter.elapsed_seconds,
        "train/data_wait_share": meter.waited_seconds / meter.elapsed_seconds,
        "train/data_wait_ms_per_step": 1000 * meter.waited_seconds / max(1, meter.steps),
    }
    return found | {f"train/step_ms_p{share}": 1000 * each for share, each in meter.compute_step_percentiles().items()}


def compute_read_metrics(parts: RunContext, before: ReadStats) -> dict[str, float]:
    """What all ranks read since `before`, ahead of the steps by a few batches."""
    after = parts.train_loader.get_read_stats()
    moved = [float(now - then) for now, then in zip(after, before, strict=True)]
    read, requests, retries, hits, misses, off = parts.world.all_reduce_values([*moved[:-1], float(after.cache_off)])
    metrics = {"train/read_mib": read / 2**20, "train/read_requests": requests, "train/read_retries": retries}
    if hits + misses:
        metrics |= {"train/cache_hit_share": hits / (hits + misses), "train/cache_off": off}
    return metrics


def _compute_validation_metrics(parts: RunContext) -> dict[str, float]:
    state = parts.state
    weights: dict[str, dict[str, Tensor]] = {"raw": {}} | (
        {"averaged": state.average.mean} if state.average.mean else {}
    )
    run = partial(count_validation_errors, state.model, weights, parts.val_loader, parts.val_shard_samples)
    counts = run(parts.train_step.normalize, parts.world, parts.job.recipe.max_bad_share)
    seen = max(counted.samples for counted in counts.values())
    found = {"validation/bad_samples": float(sum(parts.val_shard_samples) - seen)}
    for name, counted in counts.items():
        found[f"validation/{name}_top1_error"] = 100 * counted.top1_error
        found[f"validation/{name}_top5_error"] = 100 * counted.top5_error
    return found
