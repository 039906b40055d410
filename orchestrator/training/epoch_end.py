"""What is measured and reported at the end of an epoch."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from orchestrator.data.reader import Traffic
from orchestrator.training.meter import Meter
from orchestrator.training.parts import Parts
from orchestrator.training.validate import validate


def end_epoch(parts: Parts, trained: dict[str, float]) -> dict[str, float]:
    """Validate if this epoch is due for it, record and report; the epoch's metrics. Every rank must call it."""
    progress, cadence = parts.state.progress, parts.job.cadence
    last = progress.epoch == parts.job.recipe.epochs
    bad = parts.state.record.of_epoch(progress.epoch - 1).bad
    metrics = {"train/epoch": float(progress.epoch), "train/bad_samples": float(len(bad))} | trained
    if last or progress.epoch % cadence.validate_epochs == 0:
        with parts.watchdog.phase("evaluation", cadence.limits.evaluation_seconds):
            metrics |= _validate(parts)
        if parts.best is not None:
            parts.best.offer(parts.state, metrics)
    metrics["train/goodput"] = parts.goodput.share
    parts.recorder.epoch(progress, metrics)
    parts.context.report({"epoch": progress.epoch, "samples": progress.samples, **metrics})
    return metrics


def trained_metrics(parts: Parts, meter: Meter, loss: float, weight: float) -> dict[str, float]:
    """Of the steps of an epoch: loss and weight are sums over all ranks."""
    found = {
        "train/loss": loss / max(weight, 1.0),
        "train/rate": parts.rate,
        "train/images_per_second": weight / meter.seconds,
        "train/data_wait_share": meter.waited_seconds / meter.seconds,
        "train/data_wait_ms_per_step": 1000 * meter.waited_seconds / max(1, meter.steps),
    }
    return found | {f"train/step_ms_p{share}": 1000 * each for share, each in meter.step_percentiles().items()}


def read_metrics(parts: Parts, before: Traffic) -> dict[str, float]:
    """What all ranks read since `before`, ahead of the steps by a few batches."""
    after = parts.training.traffic()
    moved = [float(now - then) for now, then in zip(after, before, strict=True)]
    read, requests, retries, hits, misses, off = parts.world.sum([*moved[:-1], float(after.cache_off)])
    metrics = {"train/read_mib": read / 2**20, "train/read_requests": requests, "train/read_retries": retries}
    if hits + misses:
        metrics |= {"train/cache_hit_share": hits / (hits + misses), "train/cache_off": off}
    return metrics


def _validate(parts: Parts) -> dict[str, float]:
    state = parts.state
    weights: dict[str, dict[str, Tensor]] = {"raw": {}} | (
        {"averaged": state.average.mean} if state.average.mean else {}
    )
    run = partial(validate, state.model, weights, parts.validation, parts.validation_counts)
    counts = run(parts.stepper.normalise, parts.world, parts.job.recipe.max_bad_share)
    seen = max(counted.samples for counted in counts.values())
    found = {"validation/bad_samples": float(sum(parts.validation_counts) - seen)}
    for name, counted in counts.items():
        found[f"validation/{name}_top1_error"] = 100 * counted.top1_error
        found[f"validation/{name}_top5_error"] = 100 * counted.top5_error
    return found
