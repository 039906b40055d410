"""Metrics against numbers computed by hand; parts of a split add up exactly; mistakes of a user's are a line."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.config.errors import ConfigError
from orchestrator.recipe.config import MetricPlugin
from orchestrator.recipe.metrics import MetricCounter, create_metrics

CPU = torch.device("cpu")
ASCENDING = [0.0, 1.0, 2.0, 3.0]  # best class 3


def values(plugins: list[MetricPlugin], logits: Tensor, labels: Tensor, bounds: list[int]) -> dict[str, float]:
    """Values of metrics whose sums were counted in parts, as by several ranks."""
    classes = logits.shape[1]
    parts = []
    for start, end in pairwise(bounds):
        counter = MetricCounter(create_metrics(plugins, classes), classes, CPU)
        counter.add(logits[start:end], labels[start:end])
        parts.append(counter.read())
    total = {
        kind: {name: tuple(map(sum, zip(*(part[kind][name] for part in parts), strict=True))) for name in sums}
        for kind, sums in parts[0].items()
    }
    return counter.compute(total)


@pytest.mark.parametrize(
    ("kind", "args", "labels", "expected"),
    [
        ("top_k_error", {"k": 2}, [3, 2, 1, 0], {"top2_error": 50.0}),
        ("top_k_error", {}, [3, 2, 1, 0], {"top3_error": 25.0}),
        # Class 3 is right every time, class 0 never; the others have no samples.
        ("mean_class_error", {}, [3, 3, 3, 0], {"mean_class_error": 50.0}),
        # Class 3: 2 * 1 / (4 + 1); the other three have no hit.
        ("examples.macro_f1:MacroF1", {}, [3, 1, 0, 0], {"macro_f1": 100 * (2 / 5) / 4}),
    ],
)
def test_metrics_by_hand(kind: str, args: dict[str, Any], labels: list[int], expected: dict[str, float]) -> None:
    plugin = MetricPlugin(kind=kind, args=args)
    assert values([plugin], torch.tensor([ASCENDING] * 4), torch.tensor(labels), [0, 4]) == pytest.approx(expected)


@given(st.lists(st.integers(0, 29), max_size=6), st.integers(0, 2**16))
def test_parts_add_up_to_the_whole(cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(30, 8, generator=generator), torch.randint(0, 8, (30,), generator=generator)
    kinds = ("top_k_error", "mean_class_error", "examples.macro_f1:MacroF1")
    plugins = [MetricPlugin(kind=kind) for kind in kinds]
    assert values(plugins, logits, labels, [0, *sorted(cuts), 30]) == values(plugins, logits, labels, [0, 30])


class Wrong:
    """Base of bad metrics."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def update(self, logits: Tensor, labels: Tensor) -> Mapping[str, Any]:
        return {"samples": len(labels)}

    def compute(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return {"share": float(sums["samples"])}


class Grows(Wrong):
    def update(self, logits: Tensor, labels: Tensor) -> Mapping[str, Any]:
        return {"all": labels}


class FailsOnNone(Wrong):
    def update(self, logits: Tensor, labels: Tensor) -> Mapping[str, Any]:
        return {"first": labels[0]}


class FailsToCompute(Wrong):
    def compute(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return {"share": float(sums["other"])}


class TakesAName(Wrong):
    def compute(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return {"loss": 1.0}


class OddName(Wrong):
    def compute(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return {"My metric": 1.0}


class NoMetric:
    def __init__(self, num_classes: int) -> None:
        self.update: Callable[..., None] = print


def compute_some(plugins: Sequence[MetricPlugin], num_classes: int) -> dict[str, float]:
    """Return the values of these metrics for four samples."""
    counter = MetricCounter(create_metrics(plugins, num_classes), num_classes, torch.device("cpu"))
    labels = torch.arange(4) % num_classes
    counter.add(torch.randn(4, num_classes, generator=torch.Generator().manual_seed(0)), labels)
    return counter.compute(counter.read())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Grows",
            r"must return sums of the same names and shapes for any number of samples, got {'all': \(4,\)} for 4",
        ),
        ("FailsOnNone", r"failed on 0 samples at .*test_metrics.py:\d+: IndexError"),
        ("FailsToCompute", r"failed to compute its values at .*test_metrics.py:\d+: KeyError: 'other'"),
        ("TakesAName", r"unlike those of other metrics, got 'loss'"),
        ("OddName", r"must name its values in a-z, 0-9 and _, .* got 'My metric'"),
        ("NoMetric", r"must have methods update and compute, lacks compute"),
    ],
)
def test_a_bad_metric_says_why_in_a_line(name: str, message: str) -> None:
    kind = f"{__name__}:{name}"
    with pytest.raises(ConfigError, match=message) as caught:
        compute_some([MetricPlugin(kind=kind)], 10)
    assert f"metric {kind!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_metrics_pass() -> None:
    kinds = ("top_k_error", "mean_class_error", "examples.macro_f1:MacroF1")
    assert len(compute_some([MetricPlugin(kind=kind) for kind in kinds], 4)) == 3
    with pytest.raises(ConfigError, match="k must be between 1 and 2, got 3"):
        compute_some([MetricPlugin(kind="top_k_error", args={"k": 3})], 2)
