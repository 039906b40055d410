"""Validation: sums over the split, and what a run keeps of its classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.data.dataloader import Batch
from orchestrator.models.network import Logits
from orchestrator.recipe.config import MetricPlugin
from orchestrator.training.config import Execution, TrainJob
from orchestrator.training.evaluator import Evaluator, list_class_results
from orchestrator.training.run_dir import ClassResult, ValidationResult, load_validation_result
from tests.support import runs, tiny_shards
from tests.support.ranks import Ranks
from tests.support.runs import ALONE, job, recipe, train, train_by

# Scores of 4 images for 3 classes; the last image is broken.
SCORES = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [9.0, 0.0, 0.0]])
LABELS = [0, 0, 2, 1]


class Scores(nn.Module):
    """Gives each image the scores that its first pixels hold."""

    def forward(self, images: Tensor) -> Logits:
        return Logits(images[:, 0, 0, :3])


class OneBatch:
    """A loader of one batch."""

    def iter_evaluation(self, *_: Any) -> Iterator[Batch]:
        images = torch.zeros((4, 1, 1, 3))
        images[:, 0, 0] = SCORES
        yield Batch(images, torch.tensor(LABELS), torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.arange(4), ())


def test_errors_and_loss_leave_broken_images_out() -> None:
    evaluator = Evaluator(Scores(), 3, OneBatch(), (3,), lambda images: images, ALONE, 1.0)  # type: ignore[arg-type]
    sums = evaluator.evaluate({"raw": {}})[0]["raw"]
    metrics = evaluator.compute_metrics({"raw": sums})
    losses = [torch.logsumexp(row, 0) - row[label] for row, label in zip(SCORES[:3], LABELS[:3], strict=True)]
    assert metrics["validation/raw_loss"] == pytest.approx(float(sum(losses)) / 3, rel=1e-6)
    assert metrics["validation/raw_top1_error"] == pytest.approx(100 / 3)
    assert metrics["validation/raw_top5_error"] == 0.0
    assert list_class_results(sums, ("a", "b", "c")) == (
        ClassResult(name="a", images=2, top1_error=50.0, top5_error=0.0),
        ClassResult(name="b", images=0, top1_error=None, top5_error=None),
        ClassResult(name="c", images=1, top1_error=0.0, top5_error=0.0),
    )


class WrongByHalf:
    """A metric: wrong samples in the first half of the classes, and in the rest."""

    def __init__(self, num_classes: int) -> None:
        self.half = num_classes / 2

    def update(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        wrong = labels[logits.argmax(dim=1) != labels]
        return {"wrong": torch.stack([(wrong < self.half).sum(), (wrong >= self.half).sum()])}

    def compute(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {"wrong_low": float(sums["wrong"][0]), "wrong_high": float(sums["wrong"][1])}


def with_metrics(data: Path, folder: Path, *plugins: MetricPlugin) -> TrainJob:
    return job(data, folder, recipe(epochs=1)).model_copy(update={"execution": Execution(metrics=plugins)})


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
def test_metrics_of_the_users_are_exact_sums_over_ranks(
    small: Path, tmp_path: Path, ranks: Ranks, workers: int
) -> None:
    plugins = (MetricPlugin(kind=f"{__name__}:WrongByHalf"), MetricPlugin(kind="top_k_error", args={"k": 2}))
    one = with_metrics(small, tmp_path, *plugins)
    for outcome in train_by(ranks, workers, one):
        metrics = outcome.metrics
        for name in ("raw", "averaged"):
            wrong = metrics[f"validation/{name}_wrong_low"] + metrics[f"validation/{name}_wrong_high"]
            assert wrong == pytest.approx(metrics[f"validation/{name}_top1_error"] * 5 / 100)
            top2, top1 = metrics[f"validation/{name}_top2_error"], metrics[f"validation/{name}_top1_error"]
            assert 0 <= top2 <= top1
    assert runs.events(one, "epoch")[0].values["validation/raw_top2_error"] == metrics["validation/raw_top2_error"]


class Failing(WrongByHalf):
    """Fails on samples."""

    def update(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if len(labels):
            raise ValueError("no such thing")
        return super().update(logits, labels)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["Failing", "Missing"])
def test_a_metric_that_fails_ends_all_ranks_with_a_line(small: Path, tmp_path: Path, ranks: Ranks, kind: str) -> None:
    outcomes = train_by(ranks, 2, with_metrics(small, tmp_path, MetricPlugin(kind=f"{__name__}:{kind}")))
    assert {outcome.status for outcome in outcomes} == {"refused"}
    assert kind in outcomes[0].message
    assert "\n" not in outcomes[0].message


def test_a_finished_run_keeps_the_errors_of_each_class(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe(epochs=1))
    assert load_validation_result(one.folder) is None
    metrics = train(one).metrics
    result = load_validation_result(one.folder)
    assert result is not None
    assert [row.name for row in result.classes] == list(tiny_shards.CLASSES)
    wrong = sum((row.top1_error or 0.0) * row.images for row in result.classes)
    assert wrong / 5 == pytest.approx(metrics[f"validation/{result.weights}_top1_error"])
    assert result.samples == 48
    assert runs.outcome(one).metrics == metrics


def test_the_worst_classes_are_shown_first() -> None:
    rows = tuple(ClassResult(name=f"c{n}", images=4, top1_error=float(n), top5_error=0.0) for n in range(12))
    lines = ValidationResult(weights="raw", samples=8, classes=rows).describe()
    assert lines[0] == "the 10 worst of 12 classes in the last validation (raw weights), top-1 / top-5 error:"
    assert lines[1].split() == ["c11", "11.00%", "/", "0.00%", "(4", "images)"]
    assert len(lines) == 11
