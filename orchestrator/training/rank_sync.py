"""Sums over an epoch's steps, and the sync of the ranks every few steps: one all-reduce of all they agree on."""

from __future__ import annotations

import json
import math
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import Batch
from orchestrator.data.dataset import ReadStats
from orchestrator.data.sample_audit import AuditRecord, BadEntry, DeliveryHash, join_hash, split_hash
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.train_state import Progress

T = TypeVar("T")


class StepSums(NamedTuple):
    """Sums over a rank's samples of one step, as scalars on the device."""

    loss: Tensor
    correct: Tensor  # samples of weight 1 whose best class is right


class EpochMeter:
    """Sums over the steps of an epoch; they stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.start_time = time.perf_counter()
        self.waited_seconds = 0.0
        self.weight = 0.0
        self.steps = 0
        self._last_sums = (0.0, 0.0)
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._step_seconds = array("f")

    def time_batches(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same batches; add up the wait for each, and record the time between them."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                received = time.perf_counter()
                self.waited_seconds += received - asked
            yield batch
            self._step_seconds.append(time.perf_counter() - received)

    def record_step(self, sums: StepSums, weight: float) -> None:
        """Add a step's sums and its number of samples."""
        self._loss += sums.loss
        self._correct += sums.correct
        self.weight += weight
        self.steps += 1

    def read_sums(self) -> tuple[float, float]:
        """Return the summed loss and the correct samples; waits for the device."""
        return float(self._loss), float(self._correct)

    def compute_mean_since_last(self, loss: float, weight: float) -> float:
        """Return the mean loss since the last call, or the start, from the sums over all ranks at this moment."""
        before, self._last_sums = self._last_sums, (loss, weight)
        return (loss - before[0]) / max(weight - before[1], 1.0)

    def compute_metrics(self, loss: float, weight: float, correct: float, learning_rate: float) -> dict[str, float]:
        """Return an epoch's training metrics; loss, weight and correct are sums over all ranks.

        Step times leave the wait for data out. On a GPU steps are only enqueued, and syncs wait for the queue's end:
        there the median says little.
        """
        seconds, durations = time.perf_counter() - self.start_time, np.frombuffer(self._step_seconds, dtype=np.float32)
        shown = (50, 90, 99) if len(durations) else ()
        percentiles = {f"train/step_ms_p{n}": 1000 * float(np.percentile(durations, n)) for n in shown}
        return {
            "train/loss": loss / max(weight, 1.0),
            "train/top1_accuracy": 100 * correct / max(weight, 1.0),
            "train/rate": learning_rate,
            "train/images_per_second": weight / seconds,
            "train/data_wait_share": self.waited_seconds / seconds,
            "train/data_wait_ms_per_step": 1000 * self.waited_seconds / max(1, self.steps),
            **percentiles,
        }


def compute_read_metrics(world: DistributedContext, before: ReadStats, after: ReadStats) -> dict[str, float]:
    """Return what all ranks read between two moments, a few batches ahead of the steps; every rank must call it."""
    own = ReadStats(*(now - then for now, then in zip(after, before, strict=True)))
    sums = world.all_reduce_sums(own._replace(cache_off=after.cache_off))
    metrics = {
        "train/read_mib": sums.bytes / 2**20,
        "train/read_requests": float(sums.requests),
        "train/read_retries": float(sums.retries),
    }
    if lookups := sums.cache_hits + sums.cache_misses:
        metrics |= {"train/cache_hit_share": sums.cache_hits / lookups, "train/cache_off": float(sums.cache_off)}
    return metrics


class SyncReport(NamedTuple):
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
        """Sum the reports of all ranks and add the samples of `epoch` to the record. Raises DataError on every rank."""
        delivered = self._delivered
        own = report._replace(
            has_failed=self._error is not None,
            bad=len(self._bad),
            delivered=delivered.samples,
            delivery_hash=tuple(split_hash(delivered.hash)),
        )
        sums = self._world.all_reduce_sums(own)
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
