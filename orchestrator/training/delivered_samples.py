"""What step() was really given, and trouble with the data: noted on each rank, agreed on by all of them at a pulse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BadSample, Batch
from orchestrator.data.sample_audit import AuditRecord, BadEntry, DeliveryHash, join_hash, split_hash
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.train_state import Progress

MAX_CHARACTERS = 1000  # of what is kept of a bad sample's key, source or reason


@dataclass(frozen=True)
class SampleSyncResult:
    """What all ranks know after a pulse; the same on each."""

    sums: list[float]  # of what the caller gave
    record: AuditRecord  # up to now
    new_bad_samples: list[BadEntry]  # samples that were not known to be bad before


class SampleTracker:
    """One rank's samples, bad samples and trouble since the last pulse."""

    def __init__(self, world: DistributedContext, blank: Batch) -> None:
        """blank: a batch without a sample that counts."""
        self._world, self._blank = world, blank
        self._delivered = DeliveryHash()
        self._bad: list[tuple[int, BadSample]] = []  # with their step
        self._trouble: str | None = None

    def guard_batches(self, batches: Iterator[Batch], steps: int) -> Iterator[Batch]:
        """The same batches, `steps` in all; after a DataError blank ones.

        So a rank that cannot read its data comes to the next pulse, where all ranks end alike, instead of leaving the
        others in a collective. A single worker raises the DataError at once.
        """
        given = 0
        try:
            for batch in batches:
                given += 1
                yield batch
        except DataError as error:
            if self._world.workers == 1:
                raise
            self._trouble = str(error)
        while given < steps:
            given += 1
            yield self._blank

    def record_batch(self, progress: Progress, batch: Batch) -> None:
        """A batch that step() was given at this progress."""
        self._delivered.add(progress.epoch, progress.step_in_epoch, batch.ids.numpy())
        self._bad.extend((progress.step, one) for one in batch.bad)

    def sync_ranks(self, record: AuditRecord, epoch: int, values: list[float]) -> SampleSyncResult:
        """Sum `values` over the ranks and add what they were given of `epoch` to the record; all ranks must call it.

        Raises DataError, on every rank alike, when a rank could not read its data.
        """
        delivered = self._delivered
        own = [float(self._trouble is not None), len(self._bad), delivered.samples, *split_hash(delivered.hash)]
        summed = self._world.all_reduce_values([*values, *own])
        sums, (failed, num_bad, samples, *hashes) = summed[: len(values)], summed[len(values) :]
        if failed:
            raise DataError(gather_first_error(self._world, self._trouble))
        bad = self._gather_bad_samples() if num_bad else []
        self._delivered, self._bad = DeliveryHash(), []
        return SampleSyncResult(
            sums, record.add_delivery(epoch, join_hash(hashes), int(samples), bad), record.select_new(bad)
        )

    def _gather_bad_samples(self) -> list[BadEntry]:
        """The bad samples of all ranks in the order of their steps, whichever rank had them."""
        told = self._world.all_gather_text(json.dumps([(step, *astuple(one)) for step, one in self._bad]))
        rows = sorted(row for text in told for row in json.loads(text))
        return [
            BadEntry(id=id_, key=_to_printable(key), source=_to_printable(at), offset=offset, reason=_to_printable(why))
            for _, id_, key, at, offset, why in rows
        ]


def gather_first_error(world: DistributedContext, trouble: str | None) -> str:
    """The trouble of the first rank that has any, on every rank; all must call it, at least one with trouble."""
    told = world.all_gather_text(trouble or "")
    rank, message = next((rank, text) for rank, text in enumerate(told) if text)
    return message if world.workers == 1 else f"{message} (told by rank {rank} of {world.workers})"


def _to_printable(text: str) -> str:
    """The text, bounded, without the half characters that file names of unknown encoding bring (no UTF-8 has them)."""
    return text[:MAX_CHARACTERS].encode(errors="backslashreplace").decode()
