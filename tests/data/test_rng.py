"""Keyed randomness: the same numbers for ever, and each draw by itself."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import rng

ids = st.lists(st.integers(0, 2**62), min_size=1, max_size=20)
keys = st.integers(0, 2**64 - 1)


def test_mix_is_splitmix64() -> None:
    # The first outputs of the published generator started at 0; its state grows by GAMMA.
    gamma = 0x9E3779B97F4A7C15
    counters = np.array([(n * gamma) % 2**64 for n in range(3)], dtype=np.uint64)
    assert rng.mix_bits(counters).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_draws_never_change() -> None:
    """A change of these changes every run's order and augmentation: it needs a new format version."""
    base = rng.derive_key(1409, "augment", 4)
    assert base == 16260813893426777111
    assert rng.uniform(base, np.array([0, 4842]), 3).tolist() == [
        [0.04950617495273435, 0.8500877853930888, 0.888820336735055],
        [0.3012440154399827, 0.6622194315545346, 0.4687058154721423],
    ]
    assert rng.permutation(base, 10).tolist() == [8, 6, 3, 7, 2, 4, 1, 0, 5, 9]


def test_keys_differ_by_every_part() -> None:
    parts: list[tuple[int, str, tuple[int, ...]]] = [
        (0, "order", ()), (1, "order", ()), (-1, "order", ()), (0, "augment", ()), (0, "order", (0,)),
        (0, "order", (1,)), (0, "order", (1, 0)), (0, "order", (0, 1)), (0, "order", (11,)),
    ]  # fmt: skip
    found = [rng.derive_key(seed, purpose, *numbers) for seed, purpose, numbers in parts]
    assert len(set(found)) == len(parts)
    assert all(0 <= key < 2**64 for key in found)


@given(keys, ids, st.integers(1, 6))
def test_a_row_does_not_depend_on_what_stands_beside_it(base: int, chosen: list[int], draws: int) -> None:
    together = rng.uniform(base, np.array(chosen, dtype=np.int64), draws)
    assert together.shape == (len(chosen), draws)
    assert ((together >= 0) & (together < 1)).all()
    for row, one in zip(together, chosen, strict=True):
        assert np.array_equal(row, rng.uniform(base, np.array([one]), draws)[0])
        assert np.array_equal(row, rng.uniform(base, np.array([one]), draws + 2)[0, :draws]), "nor on later draws"


@given(keys, st.integers(0, 300))
def test_permutations_are_permutations(base: int, length: int) -> None:
    assert sorted(rng.permutation(base, length).tolist()) == list(range(length))


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    table = rng.uniform(rng.derive_key(0, "test"), np.arange(20_000), 4)
    assert np.abs(table.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(table.var(axis=0) - 1 / 12).max() < 0.003
    for other in (
        rng.uniform(rng.derive_key(1, "test"), np.arange(20_000), 4),
        np.roll(table, 1, axis=0),
        table[:, ::-1],
    ):
        assert np.abs(np.corrcoef(table[:, 0], other[:, 0])[0, 1]) < 0.04


def test_permutations_leave_no_place_preferred() -> None:
    first = [rng.permutation(rng.derive_key(seed, "test"), 10)[0] for seed in range(5000)]
    assert np.abs(np.bincount(first, minlength=10) - 500).max() < 6 * 500**0.5
