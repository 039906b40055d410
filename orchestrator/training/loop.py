"""The training loop, top to bottom."""

from __future__ import annotations

import math

from torch import nn

from orchestrator.data.order import EpochOrder
from orchestrator.recipe.schedule import gentler
from orchestrator.training.epoch_end import end_epoch, read_metrics, trained_metrics
from orchestrator.training.job import Outcome
from orchestrator.training.meter import Meter
from orchestrator.training.parts import Parts
from orchestrator.training.pulse import Pulse, pulse


def train(parts: Parts) -> Outcome:
    """Train to the last epoch, or until asked to stop or diverged. Every rank returns the same status.

    Raises DataError, on every rank alike, when a rank cannot read its data or too many samples are broken.
    """
    job, state = parts.job, parts.state
    metrics: dict[str, float] = {}
    if state.progress.samples > 0 and state.progress.step_in_epoch == 0:
        # Resumed from between an epoch's last step and its validation.
        metrics = end_epoch(parts, {})
    while state.progress.epoch < job.recipe.epochs:
        meter, epoch, traffic = Meter(parts.world.device), state.progress.epoch, parts.training.traffic()
        ended = _run_epoch(parts, epoch, meter)
        if ended is not None:
            return ended
        last = pulse(parts, epoch, meter)
        trained = trained_metrics(parts, meter, last.loss, last.weight)
        ended = _after(parts, last)
        if ended is not None:
            return ended
        metrics = end_epoch(parts, trained | read_metrics(parts, traffic))
        if state.progress.epoch < job.recipe.epochs and not parts.context.wanted():
            return _unwanted(parts)
    return _finished(parts, metrics)


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
        parts.watchdog.step()
        # At the epoch's last step the pulse is its end's.
        if state.progress.step % cadence.pulse_steps == 0 and state.progress.epoch == epoch:
            found = pulse(parts, epoch, meter)
            ended = _after(parts, found)
            if ended is not None:
                return ended
            if state.progress.step % cadence.log_steps < cadence.pulse_steps:  # a point was due since the last pulse
                parts.recorder.point(state.progress, meter.mean_since(found.loss, found.weight), parts.rate)
    return None


def _after(parts: Parts, found: Pulse) -> Outcome | None:
    """Do what a pulse asks for; an Outcome when it asks for the end. Only here the state may be saved."""
    samples = parts.state.progress.samples
    if not math.isfinite(found.loss):
        return Outcome(status="diverged", message=_diverged(parts), samples=samples)
    if found.superseded:
        return Outcome(status="stopped", message="a later attempt, or another driver, took this run over")
    parts.recorder.reached(parts.state.progress)
    if found.stop:
        parts.watchdog.stopping()
        if found.save and parts.world.leads:
            parts.saver.save(parts.state)
            parts.saver.wait()
        return Outcome(status="stopped", message="asked to stop", samples=samples)
    if parts.world.leads and (found.preempted or parts.saver.due(samples)):
        parts.saver.save(parts.state)
    if found.preempted:
        parts.recorder.noted("preempted", parts.state.progress)
    return None


def _unwanted(parts: Parts) -> Outcome:
    """The end between two epochs, from where the run could go on."""
    if parts.world.leads:
        parts.saver.save(parts.state)
        parts.saver.wait()
    return Outcome(status="stopped", message="no more of it is wanted", samples=parts.state.progress.samples)


def _finished(parts: Parts, metrics: dict[str, float]) -> Outcome:
    parts.saver.wait()
    if not finite(parts.state.model):  # the last update's doing, equal on all ranks: no loss has shown it
        return Outcome(status="diverged", message=_diverged(parts), samples=parts.state.progress.samples)
    return Outcome(status="finished", samples=parts.state.progress.samples, metrics=metrics)


def finite(model: nn.Module) -> bool:
    """Whether no weight and no buffer is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def _diverged(parts: Parts) -> str:
    progress = parts.state.progress
    return (
        f"the loss, or a weight, is not finite after {progress.samples} samples at learning rate {parts.rate:g}: "
        f"{gentler(parts.job.recipe.schedule, progress.epochs_done)}"
    )
