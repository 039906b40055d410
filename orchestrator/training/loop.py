"""The training loop, top to bottom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from orchestrator.data import audit
from orchestrator.data.errors import DataError
from orchestrator.data.loader import Loader
from orchestrator.data.order import EpochOrder
from orchestrator.data.reader import Traffic
from orchestrator.recipe.schedule import rate_at
from orchestrator.storage import urls
from orchestrator.training.delivery import Delivery
from orchestrator.training.job import Context, Outcome, TrainJob
from orchestrator.training.meter import Meter
from orchestrator.training.recorder import Recorder
from orchestrator.training.saver import Saver
from orchestrator.training.state import TrainState
from orchestrator.training.step import Stepper
from orchestrator.training.validate import validate
from orchestrator.training.world import World


@dataclass
class Parts:
    """What the loop works with; built by entry.py."""

    job: TrainJob
    world: World
    context: Context
    state: TrainState
    stepper: Stepper
    training: Loader
    validation: Loader
    training_counts: tuple[int, ...]
    validation_counts: tuple[int, ...]
    delivery: Delivery
    recorder: Recorder
    saver: Saver


def train(parts: Parts) -> Outcome:
    """Train to the last epoch, or until asked to stop or diverged. Every rank returns the same status.

    Raises DataError, on every rank alike, when a rank cannot read its data or too many samples are broken.
    """
    job, world, state = parts.job, parts.world, parts.state
    metrics: dict[str, float] = {}
    if state.progress.samples > 0 and state.progress.step_in_epoch == 0:
        # Resumed from between an epoch's last step and its validation.
        metrics = _end_epoch(parts, {})
    while state.progress.epoch < job.recipe.epochs:
        meter, epoch, traffic = Meter(world.device), state.progress.epoch, parts.training.traffic()
        status = _run_epoch(parts, epoch, meter)
        if status is not None:
            return status
        trained = _epoch_metrics(parts, epoch, meter)
        if not math.isfinite(trained["train/loss"]):
            return Outcome(status="diverged", message=_diverged(parts), samples=state.progress.samples)
        _save_if_due(parts)
        metrics = _end_epoch(parts, trained | _read_metrics(parts, traffic))
    parts.saver.wait()
    return Outcome(status="finished", samples=state.progress.samples, metrics=metrics)


def _run_epoch(parts: Parts, epoch: int, meter: Meter) -> Outcome | None:
    """The rest of an epoch; an Outcome when the run must end before it does."""
    job, world, state = parts.job, parts.world, parts.state
    recipe, cadence = job.recipe, job.cadence
    order = EpochOrder(parts.training_counts, recipe.seeds.order, epoch, recipe.order.lanes, recipe.order.window)
    steps = range(state.progress.step_in_epoch, state.progress.steps_per_epoch)
    batches = parts.training.training(
        order, recipe.augmentation, recipe.seeds.augmentation, recipe.batch_size, steps, world.rank, world.workers
    )
    for batch in meter.timed(parts.delivery.through(batches, len(steps))):
        before = state.progress
        meter.add(parts.stepper(batch), float(batch.weights.sum()))
        parts.delivery.add(before, batch)
        if state.progress.step % cadence.pulse_steps == 0:
            loss, weight, stop = _pulse(parts, epoch, meter)
            if not math.isfinite(loss):
                return Outcome(status="diverged", message=_diverged(parts), samples=state.progress.samples)
            if stop:
                return _stop(parts)
            _save_if_due(parts)
            if state.progress.step % cadence.log_steps < cadence.pulse_steps:  # a point was due since the last pulse
                parts.recorder.point(state.progress, loss / max(weight, 1.0), _rate(parts))
    return None


def _pulse(parts: Parts, epoch: int, meter: Meter) -> tuple[float, float, float]:
    """Agree with the other ranks on what happened since the last pulse: summed loss, weight, wishes to stop.

    Only here the record of what was delivered is that of all ranks, so only here the state may be saved.
    """
    job, state = parts.job, parts.state
    values = [meter.loss(), meter.weight, float(parts.recorder.stop_requested())]
    agreed = parts.delivery.agree(state.record, epoch, values)
    state.record = agreed.record
    parts.recorder.bad_samples(state.progress, agreed.news)
    bad, samples = state.record.of_epoch(epoch).bad, state.progress.steps_per_epoch * job.recipe.batch_size
    limit = audit.most_bad(job.recipe.max_bad_share, samples)
    if len(bad) > limit:
        first = next(one for one in state.record.bad if one.id == bad[0])
        raise DataError(
            f"data: {urls.redact(job.data)}: {len(bad)} of the {samples} images of epoch {epoch + 1} cannot be read, "
            f"more than the {limit} that max_bad_share {job.recipe.max_bad_share:g} allows; the first: {first.key!r} "
            f"at byte {first.offset} of {first.source}: {first.reason}"
        )
    loss, weight, stop = agreed.sums
    return loss, weight, stop


def _save_if_due(parts: Parts) -> None:
    if parts.world.leads and parts.saver.due():
        parts.saver.save(parts.state)


def _end_epoch(parts: Parts, trained: dict[str, float]) -> dict[str, float]:
    """Validate if this epoch is due for it, record and report; the epoch's metrics."""
    progress, cadence = parts.state.progress, parts.job.cadence
    last = progress.epoch == parts.job.recipe.epochs
    bad = parts.state.record.of_epoch(progress.epoch - 1).bad
    metrics = {"train/epoch": float(progress.epoch), "train/bad_samples": float(len(bad))} | trained
    if last or progress.epoch % cadence.validate_epochs == 0:
        metrics |= _validate(parts)
    parts.recorder.epoch(progress, metrics)
    parts.context.report({"epoch": progress.epoch, "samples": progress.samples, **metrics})
    return metrics


def _epoch_metrics(parts: Parts, epoch: int, meter: Meter) -> dict[str, float]:
    loss, weight, _ = _pulse(parts, epoch, meter)
    return {
        "train/loss": loss / max(weight, 1.0),
        "train/rate": _rate(parts),
        "train/images_per_second": weight / meter.seconds,
        "train/data_wait_share": meter.waited_seconds / meter.seconds,
        "train/data_wait_ms_per_step": 1000 * meter.waited_seconds / max(1, meter.steps),
    }


def _read_metrics(parts: Parts, before: Traffic) -> dict[str, float]:
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


def _stop(parts: Parts) -> Outcome:
    """Save and say that the run was asked to stop."""
    if parts.world.leads:
        parts.saver.save(parts.state)
        parts.saver.wait()
    return Outcome(status="stopped", message="asked to stop", samples=parts.state.progress.samples)


def _rate(parts: Parts) -> float:
    recipe = parts.job.recipe
    return rate_at(recipe.schedule, parts.state.progress.epochs_done, recipe.epochs)


def _diverged(parts: Parts) -> str:
    return (
        f"the loss is not finite after {parts.state.progress.samples} samples at learning rate {_rate(parts):g}: "
        "lower schedule.base_rate or lengthen schedule.warmup_epochs"
    )
