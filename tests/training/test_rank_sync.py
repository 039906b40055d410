"""One rank's record of its data between syncs, and the report that it packs for the all-reduce."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import Batch
from orchestrator.data.sample_audit import AuditRecord, BadEntry, hash_plan
from orchestrator.data.sampler import EpochOrder, select_rank_positions
from orchestrator.training.distributed import DistributedContext, pack_numbers, unpack_numbers
from orchestrator.training.rank_sync import EpochMeter, SampleTracker, StepSums, SyncReport
from orchestrator.training.train_state import Progress
from tests.support.runs import ALONE, CPU

ONE_OF_TWO = DistributedContext(1, 2, CPU)


def batch(*ids: int, bad: tuple[BadEntry, ...] = ()) -> Batch:
    samples = len(ids)
    images = torch.zeros((samples, 3, 2, 2), dtype=torch.uint8)
    labels = torch.zeros(samples, dtype=torch.int64)
    return Batch(images, labels, torch.ones(samples), torch.tensor(ids, dtype=torch.int64), bad)


BLANK = batch(0)


def failing(after: int) -> Iterator[Batch]:
    for number in range(after):
        yield batch(number)
    raise DataError("data: x.tar: missing")


# ------------------------------------------------------------------ trouble with the data
@pytest.mark.parametrize("after", [0, 3, 5])
def test_a_rank_of_several_continues_with_blank_batches(after: int) -> None:
    found = list(SampleTracker(ONE_OF_TWO, BLANK).guard_batches(failing(after), 5))
    assert len(found) == 5
    assert [one is BLANK for one in found] == [False] * after + [True] * (5 - after)


def test_a_single_worker_ends_immediately() -> None:
    found = SampleTracker(ALONE, BLANK).guard_batches(failing(2), 5)
    next(found), next(found)
    with pytest.raises(DataError, match=r"x\.tar: missing"):
        next(found)


def test_only_data_errors_are_passed_on_to_a_sync() -> None:
    def broken() -> Iterator[Batch]:
        yield batch(1)
        raise OSError("the network is down")

    found = SampleTracker(ONE_OF_TWO, BLANK).guard_batches(broken(), 5)
    next(found)
    with pytest.raises(OSError, match="network"):
        next(found)


def test_healthy_batches_pass_unchanged() -> None:
    given = [batch(1), batch(2)]
    assert [id(one) for one in SampleTracker(ONE_OF_TWO, BLANK).guard_batches(iter(given), 2)] == [
        id(one) for one in given
    ]


def test_the_error_of_a_single_worker_needs_no_rank() -> None:
    assert ALONE.gather_first_error("data: x") == "data: x"


# ------------------------------------------------------------------ what was delivered
def test_a_sync_adds_what_came_since_the_last() -> None:
    order = EpochOrder((20, 13, 17), 7, 0, 4, 5)
    one = SampleTracker(ALONE, BLANK)
    progress = Progress(0, 8, 6)
    record = AuditRecord()
    for step in range(6):
        ids = order.get_sample_ids(*order.locate(select_rank_positions(step, 8, 4, 0, 1)))
        one.record_batch(progress, batch(*ids.tolist()))
        progress = progress.advance()
        if step in (1, 5):
            agreed = one.sync_ranks(record, 0, SyncReport(loss=1.5, samples=float(step)))
            record = agreed.record
            assert (agreed.sums.loss, agreed.sums.samples) == (1.5, float(step))
    again = one.sync_ranks(record, 0, SyncReport())
    assert again.record == record, "nothing is counted twice"
    whole = hash_plan(order, 8, 6)
    assert (record.get_epoch(0).samples, int(record.get_epoch(0).hash, 16)) == (48, whole.hash)


def test_bad_samples_are_reported_in_the_order_of_steps_and_once() -> None:
    one = SampleTracker(ALONE, BLANK)
    late, early = (
        BadEntry(id=number, key=f"k{number}", source="/d/x.tar", offset=512, reason="broken") for number in (3, 7)
    )
    progress = Progress(8, 8, 6)
    one.record_batch(progress, batch(7, bad=(early,)))
    one.record_batch(progress.advance(), batch(3, bad=(late,)))
    first = one.sync_ranks(AuditRecord(), 0, SyncReport())
    assert [entry.id for entry in first.new_bad_samples] == [7, 3]
    assert first.record.get_epoch(0).bad == (7, 3)
    assert first.record.bad == tuple(first.new_bad_samples)
    one.record_batch(Progress(48, 8, 6), batch(7, bad=(early,)))
    second = one.sync_ranks(first.record, 1, SyncReport())
    assert second.new_bad_samples == []
    assert second.record.get_epoch(1).bad == (7,)
    assert second.record.bad == first.record.bad


# ------------------------------------------------------------------ the message
class Part(NamedTuple):
    a: float
    b: tuple[float, ...]


class Whole(NamedTuple):
    parts: dict[str, Part]
    last: float


def test_a_message_packs_and_unpacks_in_the_order_of_its_fields() -> None:
    message = Whole({"x": Part(1.0, (2.0, 3.0)), "y": Part(4.0, ())}, True)
    assert pack_numbers(message) == [1.0, 2.0, 3.0, 4.0, 1.0]
    assert unpack_numbers(message, iter([10.0, 20.0, 30.0, 40.0, 50.0])) == Whole(
        {"x": Part(10.0, (20.0, 30.0)), "y": Part(40.0, ())}, 50.0
    )


# ------------------------------------------------------------------ sums over the steps of an epoch
def sums(loss: float, correct: int = 0) -> StepSums:
    return StepSums(torch.tensor(loss), torch.tensor(correct))


def test_steps_add_up() -> None:
    meter = EpochMeter(torch.device("cpu"))
    for loss, correct, weight in ((1.5, 2, 3.0), (2.5, 1, 4.0)):
        meter.record_step(sums(loss, correct), weight)
    assert (meter.read_sums(), meter.weight, meter.steps) == ((4.0, 3.0), 7.0, 2)


def test_metrics_of_an_epoch_are_means_over_its_samples() -> None:
    metrics = EpochMeter(torch.device("cpu")).compute_metrics(loss=8.0, weight=16.0, correct=4.0, learning_rate=0.1)
    assert (metrics["train/loss"], metrics["train/top1_accuracy"], metrics["train/rate"]) == (0.5, 25.0, 0.1)


def test_waiting_is_counted_and_working_is_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    meter = EpochMeter(torch.device("cpu"))
    for _ in meter.time_batches(slow()):
        time.sleep(0.05)
    assert meter.waited_seconds >= 0.06
    assert meter.waited_seconds + 0.15 <= time.perf_counter() - meter.start_time


def test_the_batches_are_the_same_and_errors_pass() -> None:
    def ending() -> Iterator[int]:
        yield 1
        raise OSError("lost")

    meter = EpochMeter(torch.device("cpu"))
    assert list(meter.time_batches(iter([3, 1, 2]))) == [3, 1, 2]
    seen = meter.time_batches(ending())
    assert next(seen) == 1
    with pytest.raises(OSError, match="lost"):
        next(seen)


def test_a_loss_that_is_not_finite_stays_so() -> None:
    meter = EpochMeter(torch.device("cpu"))
    meter.record_step(sums(float("nan")), 1.0)
    meter.record_step(sums(1.0), 1.0)
    assert math.isnan(meter.read_sums()[0])


def test_percentiles_of_the_steps_leave_waiting_out() -> None:
    def slow() -> Iterator[int]:
        for number in range(11):
            time.sleep(0.02)
            yield number

    meter = EpochMeter(torch.device("cpu"))
    assert "train/step_ms_p50" not in meter.compute_metrics(1.0, 1.0, 1.0, 0.1)
    for number in meter.time_batches(slow()):
        time.sleep(0.2 if number == 10 else 0.001)
    found = meter.compute_metrics(1.0, 1.0, 1.0, 0.1)
    assert found["train/step_ms_p50"] < 20
    assert found["train/step_ms_p90"] <= found["train/step_ms_p99"]
    assert found["train/step_ms_p99"] > 100
