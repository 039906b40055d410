"""The order of an epoch: exactly once, the same for any number of workers, and cheap at a billion samples."""

import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.sampler import EpochOrder, Int64Array, check_workers, count_steps, select_rank_positions

shard_counts = st.lists(st.integers(0, 25), min_size=1, max_size=9).filter(lambda found: sum(found) > 0).map(tuple)
orders = st.builds(
    EpochOrder,
    counts=shard_counts,
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 300),
    lanes=st.integers(1, 9),
    window=st.integers(1, 12),
)


def ids_at(order: EpochOrder, positions: Int64Array) -> list[int]:
    return [int(found) for found in order.get_sample_ids(*order.locate(positions))]


@given(orders)
def test_every_sample_exactly_once(order: EpochOrder) -> None:
    shard, number = order.locate(np.arange(order.samples))
    counts = np.array(order.counts)
    assert ((number >= 0) & (number < counts[shard])).all()
    assert sorted(zip(shard.tolist(), number.tolist(), strict=True)) == [
        (at, n) for at, count in enumerate(order.counts) for n in range(count)
    ]
    assert sorted(order.get_sample_ids(shard, number).tolist()) == list(range(order.samples)), "ids number them all"


@given(orders, st.randoms(use_true_random=False))
def test_a_position_is_found_wherever_one_starts(order: EpochOrder, random: object) -> None:
    whole = ids_at(order, np.arange(order.samples))
    shuffled = np.array(sorted(range(order.samples), key=lambda _: random.random()), dtype=np.int64)  # type: ignore[attr-defined]
    fresh = replace(order)
    assert ids_at(fresh, shuffled) == [whole[p] for p in shuffled.tolist()]
    assert ids_at(fresh, np.arange(0)) == []


@given(orders, st.integers(1, 12))
def test_lanes_are_contiguous_and_shuffled_within_their_windows_only(order: EpochOrder, _: int) -> None:
    start_of = {}
    first = 0
    for at in order.shard_order.tolist():
        start_of[at] = first
        first += order.counts[at]
    shard, number = order.locate(np.arange(order.samples))
    sequence = [start_of[at] + n for at, n in zip(shard.tolist(), number.tolist(), strict=True)]
    expected = 0
    for lane in range(order.lanes):
        read = sequence[lane :: order.lanes]
        at = 0
        while at < len(read):
            begin, end = order.find_window(lane, at)
            assert begin == at < end <= at + order.window
            window = read[begin:end]
            assert sorted(window) == list(range(expected, expected + len(window)))
            # The same samples as places in shards.
            shards, numbers = order.locate_places(np.arange(begin, end) + order.lane_starts[lane])
            found = [start_of[at_shard] + n for at_shard, n in zip(shards.tolist(), numbers.tolist(), strict=True)]
            assert found == sorted(window)
            expected, at = expected + len(window), end
    assert expected == order.samples


@given(orders, st.integers(1, 20))
@settings(max_examples=60)
def test_workers_partition_the_same_global_batches(order: EpochOrder, batch_size: int) -> None:
    steps = count_steps(order.samples, batch_size)
    dropped = order.samples - steps * batch_size
    assert 0 <= dropped < batch_size
    everything = ids_at(order, np.arange(order.samples))
    for workers in range(1, order.lanes + 1):
        lanes_of: dict[int, set[int]] = {}
        for step in range(steps):
            parts = [select_rank_positions(step, batch_size, order.lanes, rank, workers) for rank in range(workers)]
            together = np.concatenate(parts)
            assert sorted(together.tolist()) == list(range(step * batch_size, (step + 1) * batch_size))
            assert {*ids_at(order, together)} == {*everything[step * batch_size : (step + 1) * batch_size]}
            for rank, part in enumerate(parts):
                assert (np.diff(part) > 0).all()
                lanes_of.setdefault(rank, set()).update((part % order.lanes).tolist())
        owned = [lane for lanes in lanes_of.values() for lane in lanes]
        assert len(owned) == len(set(owned)), "a lane is read by one rank only"


def test_ranks_differ_by_at_most_a_lane_per_round() -> None:
    for workers in range(1, 7):
        sizes = [len(select_rank_positions(0, 64, 64, rank, workers)) for rank in range(workers)]
        assert max(sizes) - min(sizes) <= 1


def test_the_dropped_tail_changes_from_epoch_to_epoch() -> None:
    tails = []
    for epoch in range(40):
        order = EpochOrder((10, 10, 10, 7), 3, epoch, 4, 5)
        used = count_steps(37, 8) * 8
        tails.append(frozenset(ids_at(order, np.arange(used, 37))))
    assert {len(tail) for tail in tails} == {5}
    assert len(set(tails)) >= 30
    assert len(frozenset.union(*tails)) > 25, "so over time every sample is seen"


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}, {"epoch": 7, "seed": 5}])
def test_epochs_and_seeds_differ_in_shards_and_windows(change: dict[str, int]) -> None:
    first = EpochOrder((40,) * 10, 0, 0, 4, 40)
    other = replace(first, **change)  # type: ignore[arg-type]
    same = sum(map(int.__eq__, ids_at(first, np.arange(400)), ids_at(other, np.arange(400))))
    assert same < 20, "about one of 400 falls on its old place by chance"
    assert first.shard_order.tolist() != other.shard_order.tolist()
    # With one shard only the windows are left to differ.
    one, two = (EpochOrder((400,), o.seed, o.epoch, 4, 40) for o in (first, other))
    assert ids_at(one, np.arange(400)) != ids_at(two, np.arange(400))
    assert ids_at(first, np.arange(400)) == ids_at(replace(first), np.arange(400))


def test_a_batch_mixes_lanes_and_so_distant_shards() -> None:
    order = EpochOrder((100,) * 64, 0, 0, 64, 16)
    shard, _ = order.locate(np.arange(64))
    assert len(set(shard.tolist())) == 64


def test_a_billion_samples_plan_in_little_memory() -> None:
    counts = (100_000,) * 10_000
    tracemalloc.start()
    try:
        order = EpochOrder(counts, 0, 3, 64, 256)
        assert order.samples == 10**9
        found = ids_at(order, np.array([0, 1, 499_999_999, 999_999_999]))
        planned = tracemalloc.get_traced_memory()[1]
        # Walk 40 windows of all lanes: closed windows must not pile up.
        seen: set[int] = set()
        for row in range(40):
            start = (1000 + row) * 256 * 64
            for step in (0, 255):
                seen.update(ids_at(order, np.arange(start + step * 64, start + (step + 1) * 64)))
        walked = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(set(found)) == 4
    assert len(seen) == 40 * 2 * 64
    assert planned < 3_000_000, "some arrays over the shards and the windows that were asked for"
    assert walked < 3_000_000 + 64 * 256 * 8 + 200 * len(seen)
    assert order._open_windows[1].shape == (64, 256)


def test_a_window_of_a_billion_samples_holds_each_of_its_samples_once() -> None:
    order = EpochOrder((100_000,) * 10_000, 9, 1, 64, 256)
    begin, end = order.find_window(5, 256 * 12_345)
    shard, number = order.locate(np.arange(begin, end) * 64 + 5)
    assert end - begin == 256
    assert len(set(shard.tolist())) == 1
    assert sorted(number.tolist()) == list(range(number.min(), number.min() + 256)), "a window lies in one place"


def test_lanes_take_turns_to_open_windows() -> None:
    """So that reading is spread over time, and memory is."""
    order = EpochOrder((1000,) * 10, 0, 0, 10, 100)
    opened = [order.find_window(lane, 500)[0] for lane in range(10)]
    assert sorted(begin % 100 for begin in opened) == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91]
    assert EpochOrder((50,) * 10, 0, 0, 10, 100).find_window(3, 0) == (0, 50), "a lane of one window stays whole"


@pytest.mark.parametrize(
    ("counts", "lanes", "batch_size", "workers", "said"),
    [((50,), 4, 10, 5, r"workers must be at most order.lanes \(4\), got 5"),
     ((50,), 64, 10, 11, r"workers must be at most batch_size \(10\), got 11"),
     ((5, 4), 4, 10, 2, "batch_size must be at most the 9 samples of the split, got 10")],
)  # fmt: skip
def test_too_many_workers_are_an_error(
    counts: tuple[int, ...], lanes: int, batch_size: int, workers: int, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        check_workers(counts, lanes, batch_size, workers)


def test_the_largest_worker_count_is_the_number_of_lanes() -> None:
    def is_accepted(workers: int) -> bool:
        try:
            check_workers((5, 5), 4, 10, workers)
        except DataError:
            return False
        return True

    assert [workers for workers in range(1, 12) if is_accepted(workers)] == [1, 2, 3, 4]


# ------------------------------------------------------------------ class-balanced epochs
balanced_labels = st.lists(st.integers(0, 4), min_size=3, max_size=60)


@given(balanced_labels, st.integers(0, 3), st.integers(1, 5), st.integers(1, 7))
@settings(max_examples=60)
def test_each_class_is_equally_often_in_a_balanced_epoch(
    labels: list[int], epoch: int, lanes: int, window: int
) -> None:
    counts = (len(labels) // 3, 0, len(labels) - len(labels) // 3)
    order = EpochOrder(counts, 3, epoch, lanes, window, np.array(labels, dtype=np.int32))
    positions = np.arange(order.samples)
    ids = np.array(ids_at(order, positions))
    times = Counter(labels[id] for id in ids.tolist())
    assert set(times) == set(labels)
    assert max(times.values()) - min(times.values()) <= 1
    # Within a class no sample is used again before all others are.
    uses = Counter(ids.tolist())
    for label in times:
        own = [uses[id] for id, other in enumerate(labels) if other == label]
        assert max(own) - min(own) <= 1
    draw_ids = order.get_draw_ids(positions, ids)
    assert len(set(draw_ids.tolist())) == order.samples, "each repetition has draws of its own"
    assert (draw_ids % order.samples).tolist() == ids.tolist()
    spans = sampler.plan_epoch(order, order.samples, range(1), 0, 1)
    read = Counter((span.shard, number) for span in spans for number in span.numbers.tolist() if not span.is_single)
    assert read == Counter(zip(*(part.tolist() for part in order.locate(positions)), strict=True))


def test_balanced_epochs_differ_and_repeat_by_seed() -> None:
    labels = np.array([0] * 40 + [1] * 8, dtype=np.int32)
    ids = [ids_at(EpochOrder((24, 24), seed, epoch, 4, 6, labels), np.arange(48)) for seed, epoch in
           ((1, 0), (1, 0), (1, 1), (2, 0))]  # fmt: skip
    np.testing.assert_array_equal(ids[0], ids[1])
    assert not np.array_equal(ids[0], ids[2])
    assert not np.array_equal(ids[0], ids[3])
    assert set(ids[0]) != set(ids[2]), "another choice of the frequent class in each epoch"
