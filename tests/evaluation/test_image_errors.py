from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.evaluation import image_errors, score_store
from tests.support.oracles import compute_errors

ONE = int(np.float16(2**15).view(np.uint16))  # 1.0 as it is stored
NAN = int(np.float16(np.nan).view(np.uint16))


def decoded(bits: NDArray[np.int64]) -> NDArray[np.float32]:
    return score_store.decode_float16(bits.astype(np.uint16).view(np.float16))


def few_levels(draw: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return draw.choice(draw.integers(0, ONE + 1, 3), shape)


def anything(draw: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return draw.integers(0, ONE + 1, shape)


def next_to_each_other(draw: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Classes a step of float16 apart, so that whatever float32 sums lose decides between them."""
    bits = draw.integers(0, ONE + 1, (*shape[:2], 1)) + draw.integers(-1, 2, shape)
    return np.asarray(np.clip(bits, 0, ONE))


def not_all_numbers(draw: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.where(draw.random(shape) < 0.2, NAN, few_levels(draw, shape))


KINDS = (few_levels, anything, next_to_each_other, not_all_numbers)


@settings(max_examples=60)
@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_classes_a_float32_step_apart_are_compared(members: int, seed: int) -> None:
    """Sums round such a step away, and a tie counts against the true class."""
    draw = np.random.default_rng(seed)
    flat = np.full((members, 6, 9), 1e-3, dtype=np.float32).view(np.int32) + draw.integers(-2, 3, (members, 6, 9))
    scores, labels = list(flat.astype(np.int32).view(np.float32)), draw.integers(0, 9, 6)
    for subset, wrong in image_errors.iter_errors(scores, labels, image_errors.list_subsets(members)):
        plain = compute_errors(np.sum([scores[member] for member in subset], axis=0, dtype=np.float32), labels)
        np.testing.assert_array_equal(wrong, plain, err_msg=str(subset))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=60)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_every_ensembles_errors_are_those_of_its_sums(kind, members, images, classes, seed) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(seed)
    scores = list(decoded(kind(draw, (members, images, classes))))
    labels = draw.integers(0, classes, images)
    everyone = image_errors.list_subsets(members)
    found = dict(image_errors.iter_errors(scores, labels, everyone))
    assert list(found) == sorted(everyone)
    for subset in everyone:
        plain = compute_errors(np.sum([scores[member] for member in subset], axis=0, dtype=np.float32), labels)
        np.testing.assert_array_equal(found[subset], plain, err_msg=str(subset))


def test_images_without_competing_classes_and_shards_without_images() -> None:
    sure = np.array([[0.9, 0.1], [0.9, 0.1]], dtype=np.float32)
    ((_, wrong),) = image_errors.iter_errors([sure], np.array([0, 0]), [(0,)])
    assert wrong.tolist() == [[False, False]] * 2
    ((_, wrong),) = image_errors.iter_errors([sure[:0]], np.zeros(0, dtype=np.int64), [(0,)])
    assert wrong.shape == (0, 2)


def test_subsets_in_any_order_share_partial_sums() -> None:
    draw = np.random.default_rng(3)
    scores = list(decoded(anything(draw, (5, 40, 8))))
    labels = draw.integers(0, 8, 40)
    asked = [(2, 4), (0, 1, 2), (0, 1, 4), (0, 4), (1,), (0, 1, 2, 3)]
    found = dict(image_errors.iter_errors(scores, labels, asked))
    assert set(found) == set(asked)
    for subset in asked:
        np.testing.assert_array_equal(found[subset], compute_errors(sum(scores[member] for member in subset), labels))


# ------------------------------------------------------------------ which subsets
def test_all_subsets_of_few_members() -> None:
    assert image_errors.list_subsets(1) == [(0,)]
    assert image_errors.list_subsets(3) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert len(image_errors.list_subsets(7)) == 127
    assert (
        len(set(image_errors.list_subsets(image_errors.MAX_EXHAUSTIVE_MEMBERS)))
        == 2**image_errors.MAX_EXHAUSTIVE_MEMBERS - 1
    )


@pytest.mark.parametrize("members", [image_errors.MAX_EXHAUSTIVE_MEMBERS + 1, 20])
def test_of_many_members_single_ones_all_but_one_and_all(members: int) -> None:
    everyone = range(members)
    expected = [*combinations(everyone, 1), *combinations(everyone, members - 1), tuple(everyone)]
    assert image_errors.list_subsets(members) == expected
