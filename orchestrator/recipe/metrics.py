"""Metrics as sums over samples, so that parts of a split add up exactly over batches and ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import create_plugin, format_failure, register
from orchestrator.recipe.config import MetricPlugin

# What validation reports without being asked.
RESERVED_NAMES = ("top1_error", "top5_error", "loss")
Sums = Mapping[str, tuple[float, ...]]  # of one metric, by name


class Metric(Protocol):
    """A metric of validation. Its values appear in curves and tables by the names that `compute` returns."""

    def update(self, logits: Tensor, labels: Tensor) -> Mapping[str, Tensor | float]:
        """Return sums over N samples: numbers, or tensors whose shapes do not depend on N. N may be 0.

        logits: N x classes float32. labels: N int64.
        """

    def compute(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Return values by name, from the float64 sums over all samples."""


class MetricCounter:
    """The sums of some metrics over samples, on a device."""

    def __init__(self, metrics: Mapping[str, Metric], num_classes: int, device: torch.device) -> None:
        self._metrics = metrics
        self._totals: dict[str, dict[str, Tensor]] = {}
        # Also tells a rank without samples the names and shapes of the sums.
        self.add(torch.zeros(0, num_classes, device=device), torch.zeros(0, dtype=torch.int64, device=device))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add N samples. Raises ConfigError when a metric fails, or returns sums of another shape than before."""
        for kind, metric in self._metrics.items():
            try:
                sums = metric.update(logits.float(), labels)
                new = {n: torch.as_tensor(value, dtype=torch.float64).to(logits.device) for n, value in sums.items()}
            except Exception as error:  # the user's own code may raise anything
                raise ConfigError(f"metric {kind!r} failed on {len(labels)} samples{format_failure(error)}") from error
            totals = self._totals.setdefault(kind, {name: torch.zeros_like(tensor) for name, tensor in new.items()})
            before, now = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (totals, new))
            if before != now:
                raise ConfigError(
                    f"metric {kind!r} must return sums of the same names and shapes for any number of samples, got "
                    f"{now} for {len(labels)} and {before} for none"
                )
            for name, tensor in new.items():
                totals[name] += tensor

    def read(self) -> dict[str, Sums]:
        """Return the sums of each metric, flat; waits for the device."""
        return {
            kind: {name: tuple(total.flatten().tolist()) for name, total in totals.items()}
            for kind, totals in self._totals.items()
        }

    def compute(self, sums: Mapping[str, Sums]) -> dict[str, float]:
        """Return the values of all metrics from such sums, added over ranks. Raises ConfigError when a metric fails."""
        values: dict[str, float] = {}
        for kind, metric in self._metrics.items():
            shaped = {
                name: torch.tensor(sums[kind][name], dtype=torch.float64).view(total.shape)
                for name, total in self._totals[kind].items()
            }
            try:
                results = {name: float(value) for name, value in metric.compute(shaped).items()}
            except Exception as error:  # the user's own code may raise anything
                raise ConfigError(f"metric {kind!r} failed to compute its values{format_failure(error)}") from error
            for name in results:
                if name in values or name in RESERVED_NAMES or not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name):
                    raise ConfigError(
                        f"metric {kind!r} must name its values in a-z, 0-9 and _, unlike those of other metrics, got "
                        f"{name!r}"
                    )
            values |= results
        return values


def create_metrics(plugins: Sequence[MetricPlugin], num_classes: int) -> dict[str, Metric]:
    """Build metrics by their kinds, numbered where a kind occurs again. Raises ConfigError."""
    metrics: dict[str, Metric] = {}
    for number, plugin in enumerate(plugins):
        metric = create_plugin("metric", plugin.kind, plugin.args, num_classes=num_classes)
        if missing := [name for name in ("update", "compute") if not callable(getattr(metric, name, None))]:
            raise ConfigError(f"metric {plugin.kind!r} must have methods update and compute, lacks {missing[0]}")
        metrics[plugin.kind if plugin.kind not in metrics else f"{plugin.kind}#{number}"] = metric
    return metrics


def check_metrics(plugins: Sequence[MetricPlugin], num_classes: int) -> None:
    """Build metrics and try them on a few samples, on CPU. Raises ConfigError for one that fails."""
    counter = MetricCounter(create_metrics(plugins, num_classes), num_classes, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4) % num_classes
    counter.add(torch.randn(4, num_classes, generator=generator), labels)
    counter.compute(counter.read())


@register("metric", "top_k_error")
class TopKError:
    """Percentage of samples whose class is not among the k best."""

    def __init__(self, num_classes: int, k: int = 3) -> None:
        if not 1 <= k <= num_classes:
            raise ConfigError(f"metric 'top_k_error': k must be between 1 and {num_classes}, got {k}")
        self._k = k

    def update(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor | float]:
        """Return samples and how many of them are wrong."""
        hits = (logits.topk(self._k, dim=1).indices == labels[:, None]).any(dim=1)
        return {"samples": len(labels), "wrong": (~hits).sum()}

    def compute(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the percentage."""
        return {f"top{self._k}_error": float(100 * sums["wrong"] / sums["samples"])}


@register("metric", "mean_class_error")
class MeanClassError:
    """Mean over the classes of each class's percentage of wrong samples, so that rare classes count like others."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes

    def update(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor | float]:
        """Return samples and wrong ones of each class."""
        wrong = labels[logits.argmax(dim=1) != labels]
        counts = [torch.bincount(each, minlength=self._num_classes) for each in (labels, wrong)]
        return {"samples": counts[0], "wrong": counts[1]}

    def compute(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean over the classes that have samples."""
        present = sums["samples"] > 0
        return {"mean_class_error": float(100 * (sums["wrong"][present] / sums["samples"][present]).mean())}
