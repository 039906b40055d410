"""The one collective of every so many steps: what all ranks must know of each other."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import redaction
from orchestrator.data import sample_audit
from orchestrator.data.data_errors import DataError
from orchestrator.training.epoch_meter import EpochMeter
from orchestrator.training.run_context import RunContext


@dataclass(frozen=True)
class RankSyncResult:
    """What all ranks agree on; the same on each."""

    loss_sum: float  # summed over the epoch so far
    num_samples: float  # samples of it
    should_stop: bool
    should_save: bool  # before the stop
    is_superseded: bool
    is_preempted: bool  # a rank was told since the last pulse


def sync_ranks(parts: RunContext, epoch: int, meter: EpochMeter) -> RankSyncResult:
    """Agree with the other ranks on what happened since the last pulse; every rank must call it.

    Only here the record of what was delivered is that of all ranks, so only here the state may be saved.
    Raises DataError, on every rank alike, when a rank cannot read its data or too many samples are broken.
    """
    state, watch = parts.state, parts.stop_monitor
    wish = "go-on" if watch is None else watch.request
    notice = parts.launcher.has_preemption_notice()
    flags = (wish in ("stop", "save-and-stop"), wish == "save-and-stop", wish == "superseded", notice)
    agreed = parts.sample_tracker.sync_ranks(
        state.audit_record, epoch, [meter.read_loss_sum(), meter.weight, *map(float, flags)]
    )
    state.audit_record = agreed.record
    if watch is not None:
        watch.samples = state.progress.samples
    parts.journal_logger.log_bad_samples(state.progress, agreed.new_bad_samples)
    _check_bad_samples(parts, epoch)
    loss, weight, *summed = agreed.sums
    stop, save, superseded, preempted = (value > 0 for value in summed)
    first, parts.preemption_handled = preempted and not parts.preemption_handled, preempted
    return RankSyncResult(loss, weight, stop, save, superseded, first)


def _check_bad_samples(parts: RunContext, epoch: int) -> None:
    job, state = parts.job, parts.state
    bad, samples = state.audit_record.get_epoch(epoch).bad, state.progress.steps_per_epoch * job.recipe.batch_size
    limit = sample_audit.compute_bad_limit(job.recipe.max_bad_share, samples)
    if len(bad) > limit:
        first = next(one for one in state.audit_record.bad if one.id == bad[0])
        raise DataError(
            f"data: {redaction.redact(job.data)}: {len(bad)} of the {samples} images of epoch {epoch + 1} "
            "cannot be read, "
            f"more than the {limit} that max_bad_share {job.recipe.max_bad_share:g} allows; the first: {first.key!r} "
            f"at byte {first.offset} of {first.source}: {first.reason}"
        )
