"""Validation with exact counts: every sample of the split once, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from orchestrator.data import sample_audit
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.sample_audit import BadEntry
from orchestrator.models.network import Network
from orchestrator.recipe.metrics import Metric, MetricCounter, Sums
from orchestrator.recipe.normalize import Normalizer
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.run_dir import ClassResult

VALIDATION_BATCH_SIZE = 256  # images of a forward pass; does not change the counts
_ERRORS = ":errors"  # no kind that a plug-in can have
SplitSums = Mapping[str, Sums]  # over the samples of one rank, or of all, by kind of metric; bad ones are left out


class Errors:
    """The metric that validation always has: errors in percent and the mean loss, from counts by class."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes

    def update(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor | float]:
        """Return sums over N samples. The loss has no label smoothing, class weights and auxiliary heads."""
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        losses = functional.cross_entropy(logits, labels, reduction="none")
        rows = {"samples": labels, "wrong_top1": labels[~hits[:, 0]], "wrong_top5": labels[~hits.any(dim=1)]}
        counts = {name: torch.bincount(classes, minlength=self._num_classes) for name, classes in rows.items()}
        return {**counts, "loss": losses.sum(dtype=torch.float64)}

    def compute(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the errors and the cross-entropy in nats."""
        names = ("wrong_top1", "wrong_top5", "loss")
        top1, top5, loss = (float(sums[name].sum() / sums["samples"].sum()) for name in names)
        return {"top1_error": 100 * top1, "top5_error": 100 * top5, "loss": loss}


def list_class_results(sums: SplitSums, names: Sequence[str]) -> tuple[ClassResult, ...]:
    """Return images and errors of each class, by label; `names` are the classes'."""
    counts = zip(names, *(sums[_ERRORS][name] for name in ("samples", "wrong_top1", "wrong_top5")), strict=True)
    return tuple(
        ClassResult(
            name=name,
            images=int(images),
            top1_error=100 * top1 / images if images else None,
            top5_error=100 * top5 / images if images else None,
        )
        for name, images, top1, top5 in counts
    )


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

    def evaluate(self, weights: Mapping[str, dict[str, Tensor]]) -> tuple[Mapping[str, SplitSums], int]:
        """Return the sums over the split for each named set of weights (an empty set: the model's own), and bad images.

        Every rank must call it. Images are decoded once for all sets. Raises RuntimeError when samples are missing;
        DataError, on every rank alike, when a rank cannot read its data or too many images are broken; ConfigError, on
        every rank alike, when a metric fails.
        """
        metrics = {_ERRORS: Errors(self.classes), **self.metrics}
        counters = {name: MetricCounter(metrics, self.classes, self.world.device) for name in weights}
        bad: list[BadEntry] = []
        self.model.eval()
        self.world.check_on_all_ranks(lambda: self._score_batches(weights, counters, bad))
        self.model.train()
        sets = {name: counter.read() for name, counter in counters.items()}
        totals, num_bad = self.world.all_reduce_sums((sets, len(bad)))
        self._check_counts(totals, int(num_bad), bad)
        return totals, int(num_bad)

    def compute_metrics(self, sets: Mapping[str, SplitSums]) -> dict[str, float]:
        """Return errors in percent, mean losses and the user's metrics, by name. Raises ConfigError when one fails."""
        counter = MetricCounter(self.metrics, self.classes, torch.device("cpu"))
        metrics: dict[str, float] = {}
        for name, sums in sets.items():
            totals = {key: torch.tensor(total, dtype=torch.float64) for key, total in sums[_ERRORS].items()}
            values = Errors(self.classes).compute(totals) | counter.compute(sums)
            metrics |= {f"validation/{name}_{key}": value for key, value in values.items()}
        return metrics

    def _score_batches(
        self, weights: Mapping[str, dict[str, Tensor]], counters: Mapping[str, MetricCounter], bad: list[BadEntry]
    ) -> None:
        world = self.world
        batches = self.loader.iter_evaluation(self.shard_samples, VALIDATION_BATCH_SIZE, world.rank, world.workers)
        with torch.inference_mode():
            for batch in batches:
                images = self.normalize(batch.images.to(world.device, non_blocking=True))
                labels, counted = batch.labels.to(world.device), batch.weights.to(world.device) > 0
                bad += batch.bad
                for name, override in weights.items():
                    logits = functional_call(self.model, override, (images,)).main
                    counters[name].add(logits[counted], labels[counted])

    def _check_counts(self, totals: Mapping[str, SplitSums], num_bad: int, bad: list[BadEntry]) -> None:
        count = sum(self.shard_samples)
        if num_bad > sample_audit.compute_bad_limit(self.max_bad_share, count):
            first = f"{bad[0].key!r} at byte {bad[0].offset} of {bad[0].source}: {bad[0].reason}" if bad else None
            raise DataError(
                f"data: {num_bad} of the {count} images of the validation split cannot be read, more than "
                f"max_bad_share {self.max_bad_share:g} allows; the first: {self.world.gather_first_error(first)}"
            )
        for name, sums in totals.items():
            samples = int(sum(sums[_ERRORS]["samples"]))
            if samples + num_bad != count:
                raise RuntimeError(f"validation of {name} saw {samples} samples of {count}")
            if samples == 0:
                raise DataError(f"data: all {num_bad} images of the validation split are broken")
