"""Training with plug-ins: resumed runs end with the same bits, and code of the user's does what it says."""

from pathlib import Path

import pytest

from orchestrator.checkpoint import checkpoint
from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.config import Recipe
from orchestrator.training.run_dir import get_final_weights_dir
from tests.support.runs import RecordingContext, job, recipe, stop_asking, train

PLUGINS = {
    "model.kind": "examples.small_cnn:SmallCNN",
    "model.args": {"width": 4, "dropout": 0.5},
    "loss.class_weights": (1.0, 2.0, 0.5),
}


def half_then_less(share: float, low: float = 0.1) -> float:
    """A schedule."""
    return 1.0 if share < 0.5 else low


def make(**changes: object) -> Recipe:
    return apply_overrides(recipe(), {**PLUGINS, **changes})


def digest(folder: Path) -> str:
    return checkpoint.load_final_weights(get_final_weights_dir(str(folder))).digest


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.kind": "adamw"},
        {"optimizer.kind": "torch.optim:RMSprop", "optimizer.args": {"momentum": 0.9}, "optimizer.clip_norm": 1.0},
        {
            "model.kind": "tests.support.plugin_models:Dropping",
            "model.args": {"side": 32},
            "model.channels_last": False,
        },
        {"schedule.kind": f"{__name__}:half_then_less", "schedule.args": {"low": 0.2}},
    ],
    ids=["sgd", "adamw", "rmsprop", "functional-dropout", "schedule"],
)
def test_a_resumed_run_ends_with_the_same_bits(small: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    whole, part = job(small, tmp_path / "whole", make(**changes)), job(small, tmp_path / "part", make(**changes))
    assert train(whole).status == "finished"
    assert train(part, context=RecordingContext(enough=1)).status == "stopped"
    stop_asking(part)
    assert train(part).status == "finished"
    assert digest(tmp_path / "whole") == digest(tmp_path / "part")


def test_every_part_of_the_recipe_counts(small: Path, tmp_path: Path) -> None:
    changes: list[dict[str, object]] = [
        {}, {"loss.class_weights": ()}, {"model.args": {"width": 4, "dropout": 0.0}}, {"seeds.dropout": 1},
        {"schedule.kind": f"{__name__}:half_then_less"}, {"optimizer.kind": "adamw"},
    ]  # fmt: skip
    digests = set()
    for number, change in enumerate(changes):
        assert train(job(small, tmp_path / str(number), make(epochs=1, **change))).status == "finished"
        digests.add(digest(tmp_path / str(number)))
    assert len(digests) == len(changes)
