"""The sync of the ranks every few steps: one all-reduce of loss, stop requests, bad samples and delivered samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import Batch
from orchestrator.data.sample_audit import AuditRecord, BadEntry, DeliveryHash, join_hash, split_hash
from orchestrator.training.distributed import DistributedContext, RankSums
from orchestrator.training.train_state import Progress


@dataclass(frozen=True)
class SyncReport(RankSums):
    """One rank's report at a sync, and the sums of all reports: flags count ranks then."""

    loss: float = 0.0  # sum over the epoch's samples so far
    samples: float = 0.0  # of the epoch so far, those of weight 0 left out
    correct: float = 0.0  # of them, those whose best class was right
    should_stop: float = 0.0
    should_save: float = 0.0  # before the stop
    is_superseded: float = 0.0
    has_preemption_notice: float = 0.0
    has_failed: float = 0.0  # the rank cannot read its data
    bad: float = 0.0  # bad samples since the last sync
    delivered: float = 0.0  # samples since the last sync
    delivery_hash: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class SyncResult:
    """The common knowledge of all ranks after a sync, which callbacks receive."""

    sums: SyncReport
    record: AuditRecord  # of all samples delivered so far
    new_bad_samples: list[BadEntry]  # not known to be bad before
    is_preempted: bool = False  # a rank received its notice since the last sync
    is_epoch_end: bool = False
    error: DataError | None = None  # too many bad samples

    @property
    def is_healthy(self) -> bool:
        """True when the state may be saved: finite loss, few bad samples, and this attempt is still the newest."""
        return self.error is None and math.isfinite(self.sums.loss) and not self.sums.is_superseded


class SampleTracker:
    """One rank's delivered samples, bad samples and data error since the last sync."""

    def __init__(self, world: DistributedContext, blank: Batch) -> None:
        """blank: a batch without a sample that counts."""
        self._world, self._blank = world, blank
        self._delivered = DeliveryHash()
        self._bad: list[tuple[int, BadEntry]] = []  # with their step
        self._error: str | None = None

    def guard_batches(self, batches: Iterator[Batch], steps: int) -> Iterator[Batch]:
        """Yield the same batches, `steps` in all, and blank ones after a DataError.

        So a rank that cannot read its data reaches the next sync, where all ranks end alike, instead of leaving the
        others in a collective. A single worker raises the DataError immediately.
        """
        count = 0
        try:
            for batch in batches:
                count += 1
                yield batch
        except DataError as error:
            if self._world.workers == 1:
                raise
            self._error = str(error)
        for _ in range(count, steps):
            yield self._blank

    def record_batch(self, progress: Progress, batch: Batch) -> None:
        """Record a batch that step() received at this progress."""
        self._delivered.add(progress.epoch, progress.step_in_epoch, batch.ids.numpy())
        self._bad.extend((progress.step, sample) for sample in batch.bad)

    def sync_ranks(self, record: AuditRecord, epoch: int, report: SyncReport) -> SyncResult:
        """Sum the reports of all ranks and add the delivered samples of `epoch` to the record; all ranks must call it.

        Raises DataError, on every rank alike, when a rank could not read its data.
        """
        delivered = self._delivered
        sums = self._world.all_reduce_sums(
            replace(
                report,
                has_failed=float(self._error is not None),
                bad=len(self._bad),
                delivered=delivered.samples,
                delivery_hash=tuple(split_hash(delivered.hash)),
            )
        )
        if sums.has_failed:
            raise DataError(self._world.gather_first_error(self._error))
        bad = self._gather_bad_samples() if sums.bad else []
        self._delivered, self._bad = DeliveryHash(), []
        new_record = record.add_delivery(epoch, join_hash(sums.delivery_hash), int(sums.delivered), bad)
        return SyncResult(sums, new_record, record.select_new(bad))

    def _gather_bad_samples(self) -> list[BadEntry]:
        """Return the bad samples of all ranks in the order of their steps, whichever rank had them."""
        texts = self._world.all_gather_text(
            json.dumps([(step, sample.id, sample.to_dict()) for step, sample in self._bad])
        )
        rows = sorted((row for text in texts for row in json.loads(text)), key=lambda row: row[:2])
        return [BadEntry.from_dict(entry) for _, _, entry in rows]
