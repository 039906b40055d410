"""The one collective of every so many steps: what all ranks must know of each other."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.data import audit
from orchestrator.data.errors import DataError
from orchestrator.storage import urls
from orchestrator.training.meter import Meter
from orchestrator.training.parts import Parts


@dataclass(frozen=True)
class Pulse:
    """What all ranks agree on; the same on each."""

    loss: float  # summed over the epoch so far
    weight: float  # samples of it
    stop: bool
    save: bool  # before the stop
    superseded: bool
    preempted: bool  # a rank was told since the last pulse


def pulse(parts: Parts, epoch: int, meter: Meter) -> Pulse:
    """Agree with the other ranks on what happened since the last pulse; every rank must call it.

    Only here the record of what was delivered is that of all ranks, so only here the state may be saved.
    Raises DataError, on every rank alike, when a rank cannot read its data or too many samples are broken.
    """
    state, watch = parts.state, parts.watch
    wish = "go-on" if watch is None else watch.wish
    notice = parts.context.preempted()
    flags = (wish in ("stop", "save-and-stop"), wish == "save-and-stop", wish == "superseded", notice)
    agreed = parts.delivery.agree(state.record, epoch, [meter.loss(), meter.weight, *map(float, flags)])
    state.record = agreed.record
    if watch is not None:
        watch.samples = state.progress.samples
    parts.recorder.bad_samples(state.progress, agreed.news)
    _check_bad(parts, epoch)
    loss, weight, *summed = agreed.sums
    stop, save, superseded, preempted = (value > 0 for value in summed)
    first, parts.preempted = preempted and not parts.preempted, preempted
    return Pulse(loss, weight, stop, save, superseded, first)


def _check_bad(parts: Parts, epoch: int) -> None:
    job, state = parts.job, parts.state
    bad, samples = state.record.of_epoch(epoch).bad, state.progress.steps_per_epoch * job.recipe.batch_size
    limit = audit.most_bad(job.recipe.max_bad_share, samples)
    if len(bad) > limit:
        first = next(one for one in state.record.bad if one.id == bad[0])
        raise DataError(
            f"data: {urls.redact(job.data)}: {len(bad)} of the {samples} images of epoch {epoch + 1} cannot be read, "
            f"more than the {limit} that max_bad_share {job.recipe.max_bad_share:g} allows; the first: {first.key!r} "
            f"at byte {first.offset} of {first.source}: {first.reason}"
        )
