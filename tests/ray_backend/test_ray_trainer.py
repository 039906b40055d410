"""A run whose workers crashed too often gets another round only when it has progressed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint.checkpoint_dir import make_checkpoint_url
from orchestrator.ray_backend import cluster, launch_errors, ray_trainer
from orchestrator.ray_backend.launch_errors import RunFailedError
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.run_dir import get_checkpoints_dir
from tests.support import launched


def saved(spec: RunSpec, samples: int, attempt: int, damaged: bool = False) -> None:
    folder = get_checkpoints_dir(spec.folder)
    checkpoint_format.save(folder, {"samples": samples}, samples, attempt)
    if damaged:
        file_io.write_bytes(
            file_io.join(make_checkpoint_url(folder, samples, attempt), checkpoint_format.STATE_FILE), b"cut"
        )


class Trainer:
    """Stands for Ray's: each round begins an attempt at a place, saves at others, and crashes too often."""

    def __init__(self, spec: RunSpec, rounds: list[tuple[int, Callable[[int], None]]]) -> None:
        self.spec, self.left = spec, rounds

    def __call__(self, *_: object) -> "Trainer":
        return self

    def fit(self) -> None:
        resumed, save = self.left.pop(0)
        attempt = attempts.create_attempt(self.spec.folder, 1)
        attempt.record_resume(resumed)
        save(attempt.number)
        raise WorkerGroupError("crashed", {0: RuntimeError("again")})


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    spec = launched.spec(storage=str(tmp_path))
    attempts.create_attempt(spec.folder, 1).record_resume(0)
    saved(spec, 800, 1)
    saved(spec, 1000, 1, damaged=True)
    return spec


def rounds_of(spec: RunSpec, monkeypatch: pytest.MonkeyPatch, *rounds: tuple[int, Callable[[int], None]]) -> int:
    """Launch; how many of the rounds there were."""
    left = list(rounds)
    monkeypatch.setattr(ray_trainer, "_build_trainer", Trainer(spec, left))
    with pytest.raises(RunFailedError):
        ray_trainer.launch_run(spec, "", "", 0)
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


# ------------------------------------------------------------------ what a run that failed in ray says of it
RAYS = (
    "The actor died.\n  Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. "
    "Some common causes include: (1) the process was killed by the OOM killer due to high memory usage."
)


def failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def fit(*_: object) -> None:
        raise WorkerGroupError(RAYS, {})

    monkeypatch.setattr(ray_trainer, "_fit_while_progressing", fit)
    monkeypatch.setattr(cluster, "claim_workers", lambda workers: None)
    spec = SimpleNamespace(
        name="one",
        folder=str(folder),
        placement=SimpleNamespace(workers=1),
        save=lambda: None,
        build_train_job=lambda *_: None,
    )
    with pytest.raises(launch_errors.RunFailedError) as error:
        ray_trainer.launch_run(cast(RunSpec, spec), "", "", 0)
    return str(error.value)


def test_a_worker_that_its_watchdog_ended_names_the_watchdogs_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts.create_attempt(str(tmp_path), 1).record_stall(
        0, "rank 0: no end of the phase 'step'; meanwhile: sample 'a'"
    )
    assert failed(tmp_path, monkeypatch) == "one: rank 0: no end of the phase 'step'; meanwhile: sample 'a'"


def test_a_worker_that_died_is_told_without_what_ray_supposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = failed(tmp_path, monkeypatch)
    assert said.endswith("Worker unexpectedly exits with a connection error code 2. End of file.")
