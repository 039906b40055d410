"""One rank's record of its data between syncs, and the report that it packs for the all-reduce."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BadSample, Batch
from orchestrator.data.sample_audit import AuditRecord, hash_plan
from orchestrator.data.sampler import EpochOrder, select_rank_positions
from orchestrator.training import rank_sync
from orchestrator.training.distributed import DistributedContext, pack_numbers, unpack_numbers
from orchestrator.training.rank_sync import SampleTracker, SyncReport
from orchestrator.training.train_state import Progress
from tests.support.runs import ALONE, CPU

ONE_OF_TWO = DistributedContext(1, 2, CPU)


def batch(*ids: int, bad: tuple[BadSample, ...] = ()) -> Batch:
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
def test_a_rank_of_several_goes_on_with_blanks(after: int) -> None:
    found = list(SampleTracker(ONE_OF_TWO, BLANK).guard_batches(failing(after), 5))
    assert len(found) == 5
    assert [one is BLANK for one in found] == [False] * after + [True] * (5 - after)


def test_a_single_worker_ends_at_once() -> None:
    found = SampleTracker(ALONE, BLANK).guard_batches(failing(2), 5)
    next(found), next(found)
    with pytest.raises(DataError, match=r"x\.tar: missing"):
        next(found)


def test_only_trouble_with_data_is_passed_on_to_a_sync() -> None:
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


def test_the_trouble_of_a_single_worker_needs_no_rank() -> None:
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


def test_bad_samples_are_told_in_the_order_of_steps_and_once() -> None:
    one = SampleTracker(ALONE, BLANK)
    late, early = (BadSample(number, f"k{number}", "/d/x.tar", 512, "broken") for number in (3, 7))
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


def test_what_is_kept_of_a_bad_sample_is_bounded_and_has_an_encoding() -> None:
    one = SampleTracker(ALONE, BLANK)
    key = b"caf\xe9".decode(errors="surrogateescape")  # a file name in Latin-1
    one.record_batch(Progress(0, 8, 6), batch(0, bad=(BadSample(0, key, "/d/x.tar", 0, "x" * 10**6),)))
    (found,) = one.sync_ranks(AuditRecord(), 0, SyncReport()).new_bad_samples
    assert found.key == "caf\\udce9"
    assert len(found.reason) == rank_sync.MAX_CHARACTERS


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
