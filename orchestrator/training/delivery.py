"""What step() was really given, and trouble with the data: noted on each rank, agreed on by all of them at a pulse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from orchestrator.data.audit import AuditRecord, BadEntry, Delivered, joined, pieces
from orchestrator.data.errors import DataError
from orchestrator.data.loader import BadSample, Batch
from orchestrator.training.progress import Progress
from orchestrator.training.world import World

MOST_CHARACTERS = 1000  # of what is kept of a bad sample's key, source or reason


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after a pulse; the same on each."""

    sums: list[float]  # of what the caller gave
    record: AuditRecord  # up to now
    news: list[BadEntry]  # samples that were not known to be bad before


class Delivery:
    """One rank's samples, bad samples and trouble since the last pulse."""

    def __init__(self, world: World, blank: Batch) -> None:
        """blank: a batch without a sample that counts."""
        self._world, self._blank = world, blank
        self._delivered = Delivered()
        self._bad: list[tuple[int, BadSample]] = []  # with their step
        self._trouble: str | None = None

    def through(self, batches: Iterator[Batch], steps: int) -> Iterator[Batch]:
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

    def add(self, progress: Progress, batch: Batch) -> None:
        """A batch that step() was given at this progress."""
        self._delivered.add(progress.epoch, progress.step_in_epoch, batch.ids.numpy())
        self._bad.extend((progress.step, one) for one in batch.bad)

    def agree(self, record: AuditRecord, epoch: int, values: list[float]) -> Agreed:
        """Sum `values` over the ranks and add what they were given of `epoch` to the record; all ranks must call it.

        Raises DataError, on every rank alike, when a rank could not read its data.
        """
        delivered = self._delivered
        own = [float(self._trouble is not None), len(self._bad), delivered.samples, *pieces(delivered.hash)]
        summed = self._world.sum([*values, *own])
        sums, (failed, num_bad, samples, *hashes) = summed[: len(values)], summed[len(values) :]
        if failed:
            raise DataError(first_trouble(self._world, self._trouble))
        bad = self._gathered() if num_bad else []
        self._delivered, self._bad = Delivered(), []
        return Agreed(sums, record.with_delivered(epoch, joined(hashes), int(samples), bad), record.unknown(bad))

    def _gathered(self) -> list[BadEntry]:
        """The bad samples of all ranks in the order of their steps, whichever rank had them."""
        told = self._world.gather(json.dumps([(step, *astuple(one)) for step, one in self._bad]))
        rows = sorted(row for text in told for row in json.loads(text))
        return [
            BadEntry(id=id_, key=_printable(key), source=_printable(at), offset=offset, reason=_printable(why))
            for _, id_, key, at, offset, why in rows
        ]


def first_trouble(world: World, trouble: str | None) -> str:
    """The trouble of the first rank that has any, on every rank; all must call it, at least one with trouble."""
    told = world.gather(trouble or "")
    rank, message = next((rank, text) for rank, text in enumerate(told) if text)
    return message if world.workers == 1 else f"{message} (told by rank {rank} of {world.workers})"


def _printable(text: str) -> str:
    """The text, bounded, without the half characters that file names of unknown encoding bring (no UTF-8 has them)."""
    return text[:MOST_CHARACTERS].encode(errors="backslashreplace").decode()
