"""Equal hashes are found wherever they are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import index


@given(st.lists(st.lists(st.integers(2**64 - 6, 2**64 - 1), max_size=6), max_size=6))
def test_pairs_link_all_equals(columns: list[list[int]]) -> None:
    arrays = [np.array(column, dtype=np.uint64) for column in columns]
    flat = [value for column in columns for value in column]
    pairs = index.find_equal_pairs(arrays)
    assert all(flat[first] == flat[second] and first < second for first, second in pairs.tolist())
    assert len(pairs) == len(flat) - len(set(flat)), "each with its next equal"
    column, row = index.locate_rows(list(map(len, arrays)), pairs)
    assert [
        [columns[c][r] for c, r in zip(*both, strict=True)] for both in zip(column.tolist(), row.tolist(), strict=True)
    ] == [[flat[first], flat[second]] for first, second in pairs.tolist()]
