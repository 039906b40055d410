"""What a run that failed in Ray says of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator.ray_backend import launch_errors, ray_trainer, worker_prestart
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.training import attempts

RAYS = (
    "The actor died.\n  Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. "
    "Some common causes include: (1) the process was killed by the OOM killer due to high memory usage."
)


def failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def fit(*_: object) -> None:
        raise WorkerGroupError(RAYS, {})

    monkeypatch.setattr(ray_trainer, "_fit_while_progressing", fit)
    monkeypatch.setattr(worker_prestart, "claim_workers", lambda workers: None)
    spec = SimpleNamespace(name="one", folder=str(folder), placement=SimpleNamespace(workers=1), save=lambda: None)
    with pytest.raises(launch_errors.RunFailedError) as error:
        ray_trainer.launch_run(cast(RunSpec, spec), cast(Any, None), 0)
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
