"""Whether a run whose workers crashed too often gets another round: when it came farther."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint.places import place_of
from orchestrator.launch import trainer
from orchestrator.launch.config import RunSpec
from orchestrator.launch.trainer import RunFailedError
from orchestrator.storage import files
from orchestrator.training import attempts
from orchestrator.training.job import checkpoints_of
from tests.support import launched


class Flags:
    stop_flag = successor = ""


def saved(spec: RunSpec, samples: int, attempt: int, damaged: bool = False) -> None:
    folder = checkpoints_of(spec.folder)
    checkpoint_format.save(folder, {"samples": samples}, samples, attempt)
    if damaged:
        files.write_bytes(files.join(place_of(folder, samples, attempt), checkpoint_format.STATE), b"cut")


class Trainer:
    """Stands for Ray's: each round begins an attempt at a place, saves at others, and crashes too often."""

    def __init__(self, spec: RunSpec, rounds: list[tuple[int, Callable[[int], None]]]) -> None:
        self.spec, self.left = spec, rounds

    def __call__(self, *_: object) -> "Trainer":
        return self

    def fit(self) -> None:
        resumed, save = self.left.pop(0)
        attempt = attempts.take(self.spec.folder, 1)
        attempt.resumed(resumed)
        save(attempt.number)
        raise WorkerGroupError("crashed", {0: RuntimeError("again")})


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    spec = launched.spec(storage=str(tmp_path))
    attempts.take(spec.folder, 1).resumed(0)
    saved(spec, 800, 1)
    saved(spec, 1000, 1, damaged=True)
    return spec


def rounds_of(spec: RunSpec, monkeypatch: pytest.MonkeyPatch, *rounds: tuple[int, Callable[[int], None]]) -> int:
    """Launch; how many of the rounds there were."""
    left = list(rounds)
    monkeypatch.setattr(trainer, "_trainer", Trainer(spec, left))
    with pytest.raises(RunFailedError):
        trainer.launch(spec, Flags(), 0)
    return len(rounds) - len(left)


def test_a_damaged_newest_checkpoint_hides_no_progress(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = (800, lambda number: saved(spec, 900, number))
    assert rounds_of(spec, monkeypatch, progress, (900, lambda _: None)) == 2


def test_a_checkpoint_that_cannot_be_loaded_is_no_progress(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = (800, lambda number: saved(spec, 900, number, damaged=True))
    assert rounds_of(spec, monkeypatch, damaged, damaged) == 1


def test_the_same_place_again_is_no_progress(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, again = (800, lambda number: saved(spec, 900, number)), (900, lambda number: saved(spec, 900, number))
    assert rounds_of(spec, monkeypatch, progress, again, progress) == 2
