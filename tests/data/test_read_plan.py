"""Plans of what to read ahead: all that a rank needs, nothing twice, in the order of first need."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import sampler
from orchestrator.data.sampler import EpochOrder, count_steps, select_rank_positions

orders = st.builds(
    EpochOrder,
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=8).map(tuple).filter(lambda counts: sum(counts) >= 12),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    lanes=st.integers(1, 9),
    window=st.integers(1, 12),
)


@given(orders, st.integers(1, 12), st.integers(1, 4), st.data())
def test_a_plan_holds_all_samples_of_the_rank(
    order: EpochOrder, batch_size: int, workers: int, data: st.DataObject
) -> None:
    workers = min(workers, order.lanes)
    rank = data.draw(st.integers(0, workers - 1))
    last = count_steps(order.samples, batch_size)
    start = data.draw(st.integers(0, last - 1))
    needed: dict[tuple[int, int], int] = {}
    for step in range(start, last):
        shard, number = order.locate(select_rank_positions(step, batch_size, order.lanes, rank, workers))
        needed |= {place: step for place in zip(shard.tolist(), number.tolist(), strict=True)}

    planned: dict[tuple[int, int], int] = {}
    steps = []
    for span in sampler.plan_epoch(order, batch_size, range(start, last), rank, workers):
        assert span.numbers.tolist() == sorted(set(span.numbers.tolist()))
        if not span.is_single:
            steps.append(span.step)
            for number in span.numbers.tolist():
                assert (span.shard, number) not in planned, "a sample in two windows"
                planned[(span.shard, number)] = span.step
        else:
            assert span.step == start
            assert needed[(span.shard, int(span.numbers[0]))] == start
    assert needed.keys() <= planned.keys()
    assert all(planned[place] <= step for place, step in needed.items()), "there before it is needed"
    assert steps == sorted(steps)
    # More than is needed is planned only of windows that the epoch's end cuts.
    assert len(planned) - len(needed) <= len({lane for lane in range(order.lanes)}) * order.window


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 7), st.data())
def test_a_stretch_of_ids_in_order(counts: list[int], batch_size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, sum(counts)))
    past = data.draw(st.integers(first, sum(counts)))
    starts = np.cumsum([0, *counts])
    ids = []
    for span in sampler.plan_id_range(counts, first, past, batch_size):
        found = [int(starts[span.shard]) + number for number in span.numbers.tolist()]
        assert span.step == (found[0] - first) // batch_size
        ids += found
    assert ids == list(range(first, past))
