"""Counts against numbers computed by hand; parts of a split add up exactly."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.models.network import Logits
from orchestrator.recipe.metrics import ErrorCounts, count_errors

ASCENDING = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # best class 6, best five 2 .. 6


def counted(rows: list[list[float]], labels: list[int], weights: list[float]) -> ErrorCounts:
    return count_errors(Logits(torch.tensor(rows)), torch.tensor(labels), torch.tensor(weights))


def test_top_1_and_top_5() -> None:
    assert counted([ASCENDING] * 4, [6, 5, 2, 1], [1.0] * 4) == ErrorCounts(4, 3, 1)


def test_samples_of_weight_0_are_left_out() -> None:
    assert counted([ASCENDING] * 3, [6, 5, 1], [0.0, 1.0, 0.0]) == ErrorCounts(1, 1, 0)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_five_classes_or_fewer_the_class_is_always_among_the_best(classes: int) -> None:
    rows = [ASCENDING[:classes]] * classes
    assert counted(rows, list(range(classes)), [1.0] * classes) == ErrorCounts(classes, classes - 1, 0)


def test_no_samples() -> None:
    nothing = Logits(torch.zeros(0, 10))
    assert count_errors(nothing, torch.zeros(0, dtype=torch.int64), torch.zeros(0)) == ErrorCounts()


def test_errors_are_shares() -> None:
    assert (ErrorCounts(8, 4, 1).top1_error, ErrorCounts(8, 4, 1).top5_error) == (0.5, 0.125)


@given(st.lists(st.integers(0, 29), max_size=6), st.integers(0, 2**16))
def test_parts_add_up_to_the_whole(cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(30, 8, generator=generator), torch.randint(0, 8, (30,), generator=generator)
    weights = (torch.rand(30, generator=generator) > 0.2).float()
    whole = count_errors(Logits(logits), labels, weights)
    bounds = [0, *sorted(cuts), 30]
    parts = [count_errors(Logits(logits[a:b]), labels[a:b], weights[a:b]) for a, b in pairwise(bounds)]
    assert sum(parts, ErrorCounts()) == whole
    assert whole.samples == int(weights.sum())
    assert whole.samples >= whole.wrong_top1 >= whole.wrong_top5
