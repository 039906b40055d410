"""Validation with exact counts: every sample of the split once, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from orchestrator.config.errors import ConfigError
from orchestrator.data import sample_audit
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BadSample, BatchLoader
from orchestrator.models.network import Logits, Network
from orchestrator.recipe.metrics import Metric, MetricCounter, Sums
from orchestrator.recipe.normalize import Normalizer
from orchestrator.training.distributed import DistributedContext

VALIDATION_BATCH_SIZE = 256  # images of a forward pass; does not change the counts


class EvaluationSums(NamedTuple):
    """Sums over the samples of one rank, or of all, for one set of weights; bad samples are left out."""

    samples: float
    wrong_top1: float
    wrong_top5: float
    loss: float  # cross-entropy in nats, without label smoothing, class weights and auxiliary heads
    metrics: Mapping[str, Sums]  # of the user's metrics, by kind


class _SumCounter:
    """Sums for one set of weights, on the device."""

    def __init__(self, classes: int, metrics: Mapping[str, Metric], device: torch.device) -> None:
        self.metrics = MetricCounter(metrics, classes, device)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Logits, labels: Tensor, weights: Tensor) -> None:
        """Add N samples; those of weight 0 are left out."""
        top = min(5, logits.main.shape[1])
        hits = logits.main.topk(top, dim=1).indices == labels[:, None]
        counted = weights > 0
        self._counts += torch.stack((counted, ~hits[:, 0] & counted, ~hits.any(dim=1) & counted)).sum(dim=1)
        losses = functional.cross_entropy(logits.main.float(), labels, reduction="none")
        self._loss += losses[counted].sum(dtype=torch.float64)
        self.metrics.add(logits.main[counted], labels[counted])

    def read(self) -> EvaluationSums:
        """Return the sums; waits for the device."""
        samples, wrong_top1, wrong_top5 = self._counts.tolist()
        return EvaluationSums(samples, wrong_top1, wrong_top5, float(self._loss), self.metrics.read())


@dataclass(frozen=True)
class Evaluator:
    """Centre-crop validation of a model on the validation split."""

    model: Network
    classes: int
    loader: BatchLoader
    shard_samples: tuple[int, ...]
    normalize: Normalizer
    world: DistributedContext
    max_bad_share: float
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def evaluate(self, weights: Mapping[str, dict[str, Tensor]]) -> dict[str, EvaluationSums]:
        """Return the sums over the whole split for each named set of weights (an empty set: the model's own).

        Every rank must call it. Images are decoded once for all sets. Raises RuntimeError when samples are missing;
        DataError, on every rank alike, when a rank cannot read its data or too many images are broken; ConfigError, on
        every rank alike, when a metric fails.
        """
        counters = {name: _SumCounter(self.classes, self.metrics, self.world.device) for name in weights}
        bad: list[BadSample] = []
        error: DataError | ConfigError | None = None
        self.model.eval()
        try:
            self._score_batches(weights, counters, bad)
        except (DataError, ConfigError) as raised:
            error = raised  # raised below: the other ranks are on their way to that collective
        self.model.train()
        sets = {name: counter.read() for name, counter in counters.items()}
        flags = (isinstance(error, DataError), isinstance(error, ConfigError), len(bad))
        totals, (data_errors, metric_errors, num_bad) = self.world.all_reduce_sums((sets, flags))
        if data_errors or metric_errors:
            message = self.world.gather_first_error(None if error is None else str(error))
            raise DataError(message) if data_errors else ConfigError(message)
        self._check_counts(totals, int(num_bad), bad)
        return totals

    def compute_metrics(self, sets: Mapping[str, EvaluationSums]) -> dict[str, float]:
        """Return errors in percent, mean losses and the user's metrics, by name. Raises ConfigError when one fails."""
        counter = MetricCounter(self.metrics, self.classes, torch.device("cpu"))
        metrics: dict[str, float] = {}
        for name, sums in sets.items():
            values = {
                "top1_error": 100 * (sums.wrong_top1 / sums.samples),
                "top5_error": 100 * (sums.wrong_top5 / sums.samples),
                "loss": sums.loss / sums.samples,
                **counter.compute(sums.metrics),
            }
            metrics |= {f"validation/{name}_{key}": value for key, value in values.items()}
        return metrics

    def _score_batches(
        self, weights: Mapping[str, dict[str, Tensor]], counters: Mapping[str, _SumCounter], bad: list[BadSample]
    ) -> None:
        world = self.world
        batches = self.loader.iter_evaluation(self.shard_samples, VALIDATION_BATCH_SIZE, world.rank, world.workers)
        with torch.inference_mode():
            for batch in batches:
                images = self.normalize(batch.images.to(world.device, non_blocking=True))
                labels, sample_weights = batch.labels.to(world.device), batch.weights.to(world.device)
                bad += batch.bad
                for name, override in weights.items():
                    counters[name].add(functional_call(self.model, override, (images,)), labels, sample_weights)

    def _check_counts(self, totals: Mapping[str, EvaluationSums], num_bad: int, bad: list[BadSample]) -> None:
        count = sum(self.shard_samples)
        if num_bad > sample_audit.compute_bad_limit(self.max_bad_share, count):
            first = f"{bad[0].key!r} at byte {bad[0].offset} of {bad[0].source}: {bad[0].reason}" if bad else None
            raise DataError(
                f"data: {num_bad} of the {count} images of the validation split cannot be read, more than "
                f"max_bad_share {self.max_bad_share:g} allows; the first: {self.world.gather_first_error(first)}"
            )
        for name, sums in totals.items():
            if sums.samples + num_bad != count:
                raise RuntimeError(f"validation of {name} saw {sums.samples:g} samples of {count}")
            if sums.samples == 0:
                raise DataError(f"data: all {num_bad} images of the validation split are broken")
