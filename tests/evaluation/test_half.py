"""Loss of float16 against float32."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.evaluation import score_store
from tests.support.oracles import compute_errors

Floats = NDArray[np.float32]


def softmax(seed: int, rows: int, classes: int, spread: float) -> Floats:
    """Rows of probabilities of normal logits; the larger the spread, the more confident."""
    logits = np.random.default_rng(seed).normal(0, spread, (rows, classes))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)


def test_encoded_values_take_two_bytes_and_keep_their_shape() -> None:
    stored = score_store.encode_float16(softmax(0, 6, 5, 1.0).reshape(2, 3, 5))
    assert stored.dtype == np.float16
    assert stored.shape == (2, 3, 5)
    assert score_store.decode_float16(stored).dtype == np.float32


def test_plain_values_come_back_exactly() -> None:
    values = np.array([[0.0, 1.0, 0.5, 2**-30, 3 * 2**-12, 2**-39]], dtype=np.float32)
    np.testing.assert_array_equal(score_store.decode_float16(score_store.encode_float16(values)), values)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([3, 10, 1000]), st.sampled_from([0.01, 1.0, 3.0, 12.0]))
def test_the_order_is_that_of_float32(seed: int, classes: int, spread: float) -> None:
    values = softmax(seed, 20, classes, spread)
    back = score_store.decode_float16(score_store.encode_float16(values))
    order = np.argsort(values, axis=1, kind="stable")
    ranked, stored = np.take_along_axis(values, order, axis=1), np.take_along_axis(back, order, axis=1)
    np.testing.assert_array_equal(ranked[:, 1:] > ranked[:, :-1], stored[:, 1:] > stored[:, :-1])


def test_equal_values_stay_equal() -> None:
    back = score_store.decode_float16(score_store.encode_float16(np.full((1, 4), 0.25, dtype=np.float32)))
    np.testing.assert_array_equal(back, np.full((1, 4), 0.25))


def test_neighbours_are_kept_apart_by_the_smallest_step() -> None:
    first = np.float32(0.3)
    second = np.nextafter(first, np.float32(1))
    third = np.nextafter(second, np.float32(1))
    back = score_store.decode_float16(
        score_store.encode_float16(np.array([[third, first, second, 0.1]], dtype=np.float32))
    )[0]
    assert back[1] < back[2] < back[0]
    np.testing.assert_allclose(back[:3], 0.3, rtol=3 / 1024)


def test_values_below_float16s_range_keep_their_order() -> None:
    """The fifth place of a confident network lies where float16 itself has only zeros."""
    values = np.array([[1.0, 3e-9, 2e-9, 1e-9, 8e-10, 5e-10, 4e-10]], dtype=np.float32)
    fifth, sixth = np.array([4]), np.array([5])
    assert (values.astype(np.float16)[0, 1:] == 0).all()
    back = score_store.decode_float16(score_store.encode_float16(values))
    assert compute_errors(back, fifth)[0].tolist() == [1, 0]
    assert compute_errors(back, sixth)[0].tolist() == [1, 1]
    np.testing.assert_allclose(back, values, rtol=1e-2)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_values_are_near(spread: float) -> None:
    values = softmax(1, 300, 1000, spread)
    back = score_store.decode_float16(score_store.encode_float16(values))
    off = np.abs(back - values) / values
    first = values >= np.sort(values, axis=1)[:, -10:-9]  # where ranks are decided
    assert np.quantile(off[first], 0.95) <= 2**-11
    assert off[first].max() < 4 * 2**-11
    assert off[values > 2e-9].max() < 2**-6


@pytest.mark.parametrize("spread", [0.1, 0.3, 20.0])
def test_no_error_of_a_single_model_changes(spread: float) -> None:
    values = softmax(2, 3000, 1000, spread)
    # Classes that are often among the first: where a tie would change an error.
    labels = np.argsort(-values, axis=1)[np.arange(3000), np.random.default_rng(3).integers(0, 7, 3000)]
    exact = compute_errors(values, labels)
    np.testing.assert_array_equal(
        compute_errors(score_store.decode_float16(score_store.encode_float16(values)), labels), exact
    )
    assert (compute_errors(values.astype(np.float16).astype(np.float32), labels) != exact).any()  # a plain cast's ties


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.5])
def test_scores_other_than_probabilities_are_an_error(bad: float) -> None:
    values = softmax(0, 3, 4, 1.0)
    values[1, 2] = bad
    with pytest.raises(ValueError, match="got other or non-finite values"):
        score_store.encode_float16(values)


def test_no_rows_encode_to_no_rows() -> None:
    assert score_store.encode_float16(np.zeros((0, 8, 5), dtype=np.float32)).shape == (0, 8, 5)
