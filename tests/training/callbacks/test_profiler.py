"""A trace of some steps of an attempt."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.training.attempts import Attempt
from orchestrator.training.callbacks.journal_logger import Profiler
from orchestrator.training.config import Execution, TrainJob
from tests.support.runs import job, recipe, train


def profiled(data: Path, folder: Path, first: int, last: int) -> TrainJob:
    """A run of six steps that traces some of them."""
    return job(data, folder, recipe(epochs=1)).model_copy(update={"execution": Execution(profile=(first, last))})


def trace_events(of: TrainJob) -> list[dict[str, Any]]:
    path = Path(of.folder, "profile", "attempt-000001-rank-00000.json.gz")
    content = json.loads(gzip.decompress(path.read_bytes()))
    events: list[dict[str, Any]] = content["traceEvents"]
    return events


@pytest.mark.parametrize(("first", "last", "steps"), [(0, 0, 1), (1, 2, 2), (4, 100, 2)])
def test_a_trace_holds_the_steps_that_were_asked_for(
    small: Path, tmp_path: Path, first: int, last: int, steps: int
) -> None:
    one = profiled(small, tmp_path, first, last)
    assert train(one).status == "finished"
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in trace_events(one)) == steps


def test_a_trace_that_cannot_be_written_ends_no_training(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_bytes(b"a file where the folder should be")
    assert train(profiled(small, tmp_path, 0, 0)).status == "finished"
    assert "the trace was not written" in caplog.text


def test_an_attempt_that_ends_before_its_first_step_has_no_trace(small: Path, tmp_path: Path) -> None:
    attempt = Attempt(str(tmp_path), 1, 0.0)
    Profiler((0, 1), attempt, profiled(small, tmp_path, 0, 1), torch.device("cpu")).on_end(None, None)  # type: ignore[arg-type]
    assert not (tmp_path / "profile").exists()
