import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.evaluation import bootstrap
from orchestrator.evaluation.bootstrap import (
    MIN_P_VALUE,
    NUM_RESAMPLES,
    compute_interval,
    compute_sign_flip_p,
    resample_means,
)


# ------------------------------------------------------------------ the bootstrap
def test_resampled_means_spread_as_theory_says() -> None:
    outcomes = np.zeros((1000, 2))
    outcomes[:300, 0] = 1
    outcomes[200:400, 1] = 1
    means = resample_means(outcomes)
    assert means.shape == (NUM_RESAMPLES, 2)
    assert means.mean(axis=0) == pytest.approx([0.3, 0.2], abs=0.002)
    theory = np.cov(outcomes.T, bias=True) / 1000
    np.testing.assert_allclose(np.cov(means.T), theory, atol=0.12 * theory.max())


def test_multinomial_draws_match_resampling_of_images() -> None:
    draw = np.random.default_rng(1)
    outcomes = draw.integers(0, 8, (400, 1)) / 7
    plain = np.array([outcomes[draw.integers(0, 400, 400)].mean() for _ in range(NUM_RESAMPLES)])
    assert compute_interval(resample_means(outcomes)[:, 0]) == pytest.approx(
        compute_interval(plain), abs=0.1 * plain.std()
    )


def test_columns_see_the_same_resamples() -> None:
    wrong = (np.arange(50) < 20).astype(np.float64)
    means = resample_means(np.stack((wrong, wrong, 1 - wrong), axis=1))
    np.testing.assert_array_equal(means[:, 0], means[:, 1])
    np.testing.assert_allclose(means[:, 0] + means[:, 2], 1)


def test_draws_do_not_depend_on_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = np.random.default_rng(2).integers(0, 2, (60, 6)).astype(np.float64)
    once = resample_means(outcomes)
    np.testing.assert_array_equal(resample_means(outcomes), once)
    monkeypatch.setattr(bootstrap, "_MAX_DRAWN_COUNTS", 100)
    np.testing.assert_array_equal(resample_means(outcomes), once)


def test_constant_outcomes_have_a_point_interval() -> None:
    assert compute_interval(resample_means(np.ones((9, 1)))[:, 0]) == (1, 1)
    assert compute_interval(resample_means(np.zeros((1, 1)))[:, 0]) == (0, 0)


def test_the_interval_is_the_central_95_percent() -> None:
    assert compute_interval(np.arange(1001.0)) == pytest.approx((25, 975))


# ------------------------------------------------------------------ the exact test
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 20), st.sampled_from([1, 2, 7]))
def test_whole_differences_give_mcnemars_exact_test(more: int, less: int, same: int, parts: int) -> None:
    differences = np.array([1.0] * more + [-1.0] * less + [0.0] * same)
    number, least = more + less, min(more, less)
    exact = min(1.0, 2 * sum(math.comb(number, hits) for hits in range(least + 1)) / 2**number)
    assert compute_sign_flip_p(differences, parts) == pytest.approx(max(exact, MIN_P_VALUE), rel=1e-4, abs=1e-14)


@given(st.lists(st.integers(-7, 7), min_size=1, max_size=9))
def test_fractions_give_the_share_of_all_signs(steps: list[int]) -> None:
    sums = [abs(sum(map(math.prod, zip(steps, signs, strict=True)))) for signs in product((1, -1), repeat=len(steps))]
    share = np.mean([one >= abs(sum(steps)) for one in sums])
    assert compute_sign_flip_p(np.array(steps) / 7, 7) == pytest.approx(share)
    assert compute_sign_flip_p(-np.array(steps) / 7, 7) == pytest.approx(share)


@pytest.mark.parametrize(("more", "less"), [(2300, 2000), (20000, 19500), (1, 0), (25000, 25000)])
def test_many_images_keep_it_exact(more: int, less: int) -> None:
    differences = np.array([1.0] * more + [-1.0] * less)
    number, least = more + less, min(more, less)
    logs = [
        math.lgamma(number + 1) - math.lgamma(hits + 1) - math.lgamma(number - hits + 1) for hits in range(least + 1)
    ]
    exact = min(1.0, 2 * sum(math.exp(log - number * math.log(2)) for log in logs))
    assert compute_sign_flip_p(differences, 1) == pytest.approx(exact, rel=1e-6)


def test_fractions_of_many_images_come_near_the_normal_distribution() -> None:
    steps = np.random.default_rng(5).integers(-7, 8, 20000) + (np.arange(20000) % 250 == 0)
    z = abs(steps.sum()) / math.sqrt((steps.astype(np.float64) ** 2).sum())
    assert compute_sign_flip_p(steps / 7, 7) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_no_p_is_below_the_accuracy() -> None:
    assert compute_sign_flip_p(np.ones(200), 1) == MIN_P_VALUE
    assert compute_sign_flip_p(np.ones(50_000) * 3 / 7, 7) == MIN_P_VALUE
    assert compute_sign_flip_p(np.zeros(5), 7) == 1
