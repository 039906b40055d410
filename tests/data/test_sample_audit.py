"""The hash of what was delivered: the same for any number of workers and any cut, another for anything else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.data import sample_audit
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataset import Sample
from orchestrator.data.sample_audit import (
    AuditRecord,
    BadEntry,
    DeliveryHash,
    EpochAudit,
    compare_with_plan,
    hash_plan,
    join_hash,
    split_hash,
)
from orchestrator.data.sampler import EpochOrder, Int64Array, select_rank_positions

numbers = st.integers(0, 2**64 - 1)
orders = st.builds(
    EpochOrder,
    counts=st.lists(st.integers(0, 25), min_size=1, max_size=9).filter(lambda found: sum(found) > 0).map(tuple),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 300),
    lanes=st.integers(1, 9),
    window=st.integers(1, 12),
)
ORDER = EpochOrder((20, 13, 17), 7, 2, 4, 5)


def given_to(order: EpochOrder, batch_size: int, step: int, rank: int, workers: int) -> Int64Array:
    return order.get_sample_ids(*order.locate(select_rank_positions(step, batch_size, order.lanes, rank, workers)))


def by_ranks(order: EpochOrder, batch_size: int, steps: range, workers: int) -> tuple[int, int]:
    """Hash and samples of several ranks, summed as the collective sums them."""
    sums = np.zeros(4)
    samples = 0
    for rank in range(workers):
        one = DeliveryHash()
        for step in steps:
            one.add(order.epoch, step, given_to(order, batch_size, step, rank, workers))
        sums += split_hash(one.hash)
        samples += one.samples
    return join_hash(sums.tolist()), samples


# ------------------------------------------------------------------ the hash
@given(orders, st.integers(1, 12), st.integers(1, 9), st.data())
def test_any_number_of_workers_any_cut_gives_the_plans_hash(
    order: EpochOrder, batch_size: int, workers: int, data: st.DataObject
) -> None:
    steps = order.samples // batch_size
    cut = data.draw(st.integers(0, steps))
    others = data.draw(st.integers(1, 9))
    before, first = by_ranks(order, batch_size, range(cut), workers)
    after, second = by_ranks(order, batch_size, range(cut, steps), others)
    whole = hash_plan(replace(order), batch_size, steps)
    assert ((before + after) % 2**64, first + second) == (whole.hash, whole.samples)
    assert whole.distinct == whole.samples == steps * batch_size
    assert hash_plan(replace(order), batch_size, cut).hash == before


@given(st.lists(numbers, min_size=1, max_size=40))
def test_pieces_add_up_modulo_2_to_the_64(found: list[int]) -> None:
    sums = np.sum([split_hash(one) for one in found], axis=0)
    assert join_hash(sums.tolist()) == sum(found) % 2**64


def test_pieces_are_exact_for_as_many_ranks_as_there_may_be() -> None:
    assert join_hash([65536 * one for one in split_hash(2**64 - 1)]) == 65536 * (2**64 - 1) % 2**64


def test_the_hash_never_changes() -> None:
    """It lies beside the weights of runs: another one for the same samples would call them all wrong."""
    one = DeliveryHash()
    one.add(3, 41, np.array([0, 1, 1_281_166]))
    assert (one.hash, one.samples) == (10995951413438374837, 3)
    one.add(3, 42, np.zeros(0, dtype=np.int64))
    assert one.hash == 10995951413438374837, "a rank without a sample"


def test_large_plans_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hash_plan(ORDER, 3, 16)
    for chunk in (1, 7, 12):
        monkeypatch.setattr(sample_audit, "CHUNK_POSITIONS", chunk)
        assert hash_plan(replace(ORDER), 3, 16) == whole


@given(st.integers(0, 5), st.integers(0, 7), st.data())
def test_another_sample_or_step_or_epoch_has_another_hash(step: int, row: int, data: st.DataObject) -> None:
    whole = hash_plan(ORDER, 8, 6)
    given_ids = [given_to(ORDER, 8, each, 0, 1) for each in range(6)]
    change = data.draw(st.sampled_from(["id", "steps swapped", "epoch"]))
    epoch = ORDER.epoch
    if change == "id":
        other = data.draw(st.integers(0, 10**9))
        assume(other != given_ids[step][row])
        given_ids[step][row] = other
    elif change == "epoch":
        epoch += 1
    else:
        other = (step + 1) % 6
        given_ids[step][row], given_ids[other][row] = int(given_ids[other][row]), int(given_ids[step][row])
    one = DeliveryHash()
    for each, ids in enumerate(given_ids):
        one.add(epoch, each, ids)
    assert one.samples == whole.samples
    assert one.hash != whole.hash


# ------------------------------------------------------------------ the record
def bad(number: int) -> BadEntry:
    return BadEntry(id=number, key=f"k{number}", source="/d/x.tar", offset=512, reason="broken")


def test_a_record_grows_by_epochs_and_names_each_bad_sample_once() -> None:
    one = AuditRecord().add_delivery(0, 2**64 - 1, 8, [bad(5)]).add_delivery(0, 3, 8, [])
    assert one.get_epoch(0) == EpochAudit(epoch=0, hash=f"{2:016x}", samples=16, bad=(5,))
    assert one.select_new([bad(5), bad(6)]) == [bad(6)]
    two = one.add_delivery(1, 7, 8, [bad(6), bad(5)])
    assert [each.epoch for each in two.epochs] == [0, 1]
    assert two.get_epoch(1).bad == (6, 5)
    assert two.bad == (bad(5), bad(6))
    assert two.get_epoch(2) == EpochAudit(epoch=2)
    assert one.epochs[0].samples == 16, "an older record is as it was: a checkpoint may hold it"
    assert sample_audit.parse_record(two.to_dict(), "x") == two


@pytest.mark.parametrize(
    "raw", [None, [], {"epochs": 3}, {"epochs": [{"epoch": 0, "hash": "xyz"}]}, {"what": 1}, {"bad": [{"id": -1}]}]
)
def test_a_damaged_record_is_an_error_with_its_place(raw: object) -> None:
    with pytest.raises(DataError, match=r"^final: no record of what was delivered, or a damaged one"):
        sample_audit.parse_record(raw, "final")


def test_few_bad_samples_are_always_allowed() -> None:
    assert [sample_audit.compute_bad_limit(0.001, samples) for samples in (5, 10_000, 11_000, 1_281_152)] == [
        10,
        10,
        11,
        1281,
    ]
    assert sample_audit.compute_bad_limit(0.0, 10**9) == 10


# ------------------------------------------------------------------ the comparison
def record() -> EpochAudit:
    whole = hash_plan(ORDER, 8, 6)
    return EpochAudit(epoch=2, hash=f"{whole.hash:016x}", samples=48, bad=(3, 9))


def test_what_was_planned_was_delivered() -> None:
    found = compare_with_plan(record(), replace(ORDER), 8, 6)
    assert found.problems == ()
    assert (found.planned, found.delivered, found.exactly_once, found.left_out, found.bad) == (48, 48, 48, 2, 2)
    begun = hash_plan(ORDER, 8, 2)
    found = compare_with_plan(EpochAudit(epoch=2, hash=f"{begun.hash:016x}", samples=16), replace(ORDER), 8, 2)
    assert (found.problems, found.exactly_once, found.left_out) == ((), 16, 34)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 40}, "8 samples were never delivered"),
        ({"samples": 49}, "1 samples were delivered too often"),
        ({"hash": "0" * 16}, "other samples were delivered than planned"),
        ({"bad": (3, 3)}, "bad samples repeat"),
        ({"bad": (50,)}, "none of the split's 50"),
    ],
)
def test_any_other_delivery_is_a_problem(change: dict[str, object], message: str) -> None:
    found = compare_with_plan(record().model_copy(update=change), replace(ORDER), 8, 6)
    assert len(found.problems) == 1
    assert message in found.problems[0]
    assert found.exactly_once == 0, "nothing is proven"


def test_a_plan_that_repeats_a_sample_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpochOrder, "get_sample_ids", lambda _self, _shard, number: np.minimum(number, 3))
    whole = hash_plan(ORDER, 8, 6)
    found = compare_with_plan(EpochAudit(epoch=2, hash=f"{whole.hash:016x}", samples=48), ORDER, 8, 6)
    assert found.problems == ("the plan gives 48 samples, only 4 different ones",)


# ------------------------------------------------------------------ class-balanced epochs
def test_a_balanced_epoch_is_audited_with_its_repeated_samples() -> None:
    order = EpochOrder((20, 12), 3, 1, 4, 5, np.array([0] * 28 + [1] * 4))
    record = AuditRecord()
    for steps in (range(3), range(3, 8)):  # two attempts
        total, samples = by_ranks(order, 4, steps, 2)
        record = record.add_delivery(1, total, samples, [bad(30)] if steps.start else [bad(30), bad(30)])
    verdict = compare_with_plan(record.get_epoch(1), order, 4, 8)
    assert verdict.problems == ()
    assert (verdict.delivered, verdict.left_out) == (32, 32 - (16 + 4))
    other = compare_with_plan(record.get_epoch(1), replace(order, seed=4), 4, 8)
    assert "other samples were delivered than planned" in other.problems[0]


def test_what_is_kept_of_a_bad_sample_is_bounded_and_has_an_encoding() -> None:
    key = b"caf\xe9".decode(errors="surrogateescape")  # a file name in Latin-1
    sample = Sample(key, 0, "/d/x.tar", 512, memoryview(b""))
    entry = sample_audit.describe_bad_sample(3, sample, "x" * 10**6)
    assert (entry.id, entry.key, entry.source, entry.offset) == (3, "caf\\udce9", "/d/x.tar", 512)
    assert len(entry.reason) == sample_audit.MAX_CHARACTERS
