"""A network of the user's with torch's own dropout: its masks depend on seed, epoch, step and rank alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orchestrator.models.config import ModelPlugin
from orchestrator.recipe.config import Recipe
from orchestrator.training.config import TrainJob
from tests.support import runs
from tests.support.ranks import Ranks
from tests.support.runs import ask_to_stop, final, identical, job, recipe, stop_asking, train_by

pytestmark = pytest.mark.process


class DropoutNet(nn.Module):
    """Dropout as a layer, and stochastic depth as a function."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Dropout(0.5))
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        if not self.training or torch.rand(()) < 0.5:
            x = x + self.block(x)
        elif torch.is_grad_enabled():
            x = x + 0.0 * self.block(x)  # DDP waits for the gradients of all parameters
        scores: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return scores


def with_dropout(seed: int = 0) -> Recipe:
    model = ModelPlugin(kind=f"{__name__}:DropoutNet", image_size=32)
    base = recipe(epochs=2)
    return recipe(epochs=2, model=model, seeds=base.seeds.model_copy(update={"dropout": seed}))


def resumed(data: Path, folder: Path, ranks: Ranks, workers: int, seed: int = 0) -> TrainJob:
    """A finished run that was stopped twice, in the middle of an epoch and at its end."""
    one = job(data, folder, with_dropout(seed), pulse_steps=4)
    ask_to_stop(one)
    for _ in range(2):
        assert {outcome.status for outcome in train_by(ranks, workers, one)} == {"stopped"}
    stop_asking(one)
    assert {outcome.status for outcome in train_by(ranks, workers, one)} == {"finished"}
    return one


@pytest.mark.parametrize("workers", [1, 2])
def test_resumed_on_as_many_workers_equals_never_stopped(
    small: Path, tmp_path: Path, ranks: Ranks, workers: int
) -> None:
    whole = job(small, tmp_path / "whole", with_dropout())
    assert {outcome.status for outcome in train_by(ranks, workers, whole)} == {"finished"}
    assert identical(final(whole), final(resumed(small, tmp_path / "resumed", ranks, workers)))


def test_the_dropout_seed_of_the_recipe_changes_the_masks(small: Path, tmp_path: Path) -> None:
    done = [job(small, tmp_path / str(seed), with_dropout(seed)) for seed in (0, 1)]
    assert [runs.train(one).status for one in done] == ["finished"] * 2
    assert not identical(final(done[0]), final(done[1]))
