"""Statistics of errors: bootstrap intervals, and exact tests of paired differences. Images are the unit."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import rng

NUM_RESAMPLES = 2000
CONFIDENCE_LEVEL = 0.95
# The exact test's sums are accurate to about 1e-15; smaller p-values are given as this.
MIN_P_VALUE = 1e-12
# Counts drawn together, 8 bytes each: bounds the memory whatever the number of patterns.
_MAX_DRAWN_COUNTS = 2**21

Float64Array = NDArray[np.float64]


def resample_means(outcomes: Float64Array) -> Float64Array:
    """Return NUM_RESAMPLES x F means of the columns of N x F outcomes, each over N images drawn with replacement.

    All columns use the same resamples, so that differences of columns are paired. The draws are the same each time.
    """
    images = len(outcomes)
    # Images with equal outcomes are interchangeable in a mean. It is enough to count how often each distinct row is
    # drawn, and these counts have a multinomial distribution: the same bootstrap at the cost of the distinct rows.
    patterns, counts = np.unique(outcomes, axis=0, return_counts=True)
    draws = np.random.Generator(np.random.Philox(key=rng.derive_key(0, "bootstrap")))
    means = []
    batch = max(1, _MAX_DRAWN_COUNTS // len(patterns))
    for first in range(0, NUM_RESAMPLES, batch):
        drawn = draws.multinomial(images, counts / images, size=min(batch, NUM_RESAMPLES - first))
        means.append(drawn.astype(np.float64) @ patterns / images)
    return np.concatenate(means)


def compute_interval(means: Float64Array) -> tuple[float, float]:
    """Return the central 95% of resampled means (or of differences of two)."""
    tail = 50 * (1 - CONFIDENCE_LEVEL)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def compute_sign_flip_p(differences: Float64Array, parts: int) -> float:
    """Return the two-sided p of the mean of N paired differences, multiples of 1 / `parts`: the exact sign-flip test.

    Under the null hypothesis each image's difference could as well have the other sign; p is the share of all 2^N
    choices of signs whose sum is at least as far from zero. With differences of -1, 0 and 1 this is McNemar's exact
    test. p is never below MIN_P_VALUE.
    """
    steps = np.rint(differences * parts).astype(np.int64)
    divisor = int(np.gcd.reduce(steps)) if steps.any() else 1
    steps //= divisor
    total, sizes = abs(int(steps.sum())), np.bincount(np.abs(steps))
    if total == 0:
        return 1.0
    support = int(np.arange(len(sizes)) @ sizes)
    # The distribution of the sum by its Fourier transform, the product of cos(step t) over images. It is periodic in
    # `length`, which therefore has to cover the whole support.
    length = 2 ** math.ceil(math.log2(2 * support + 2))
    angles = np.arange(length // 2 + 1) * (2 * np.pi / length)
    log, sign = np.zeros(len(angles)), np.ones(len(angles))
    with np.errstate(divide="ignore"):  # the logarithm of a cosine that is 0
        for size in np.flatnonzero(sizes[1:]) + 1:
            # From the sine: a cosine near 1 lacks the precision that its power needs.
            log += sizes[size] * 0.5 * np.log1p(-np.minimum(1.0, np.sin(size * angles) ** 2))
            if sizes[size] % 2:
                sign *= np.sign(np.cos(size * angles))
    shares = np.fft.irfft(sign * np.exp(log), n=length)
    p = 2.0 * float(shares[total : support + 1].sum())
    return min(1.0, max(p, MIN_P_VALUE))
