"""Help, errors, dry runs and preflight of the jobs, as subprocesses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from orchestrator.cli import main
from orchestrator.recipe.presets import googlenet_tiny
from tests.support import tiny_shards
from tests.support.launched import ROOT, Ended, job

SCRIPTS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))
TRAINERS = ("train.py", "train_ensemble.py")
HEAVY = {"torch", "ray", "mlflow", "numpy", "cv2"}
HELP_SECONDS = 1.5
PREFLIGHT_SECONDS = 30.0

pytestmark = pytest.mark.process


def runs_of(tmp_path: Path) -> Path:
    return tmp_path / "runs"


# ------------------------------------------------------------------ help
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_imports_nothing_heavy(script: str, tmp_path: Path) -> None:
    code = (
        "import json, runpy, sys, time\n"
        f"sys.argv = [{str(ROOT / 'jobs' / script)!r}, '--help']\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    names = sorted(name for name in sys.modules if '.' not in name)\n"
        "    print(json.dumps([end.code, time.process_time(), names]), file=sys.stderr)\n"
    )
    variables = {**os.environ, "ORCHESTRATOR_RUNS": str(runs_of(tmp_path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/", env=variables
    )
    status, seconds, modules = json.loads(done.stderr)
    assert status == 0
    assert done.stdout.startswith(f"usage: {script} ")
    assert HEAVY & set(modules) == set()
    assert "pydantic" in modules  # the list is of the right process
    assert seconds < HELP_SECONDS, "of CPU: a busy machine does not count"
    assert not runs_of(tmp_path).exists()


@pytest.mark.parametrize("script", TRAINERS)
def test_help_of_a_preset_shows_its_flags(script: str, tmp_path: Path) -> None:
    done = job(script, "googlenet-tiny", "--help", runs=runs_of(tmp_path))
    assert done.status == 0
    for flag in ("--epochs", "--schedule.base-rate", "--placement.workers", "--storage", "--dry-run"):
        assert flag in done.out
    assert ("--ensemble.members" in done.out) == (script == "train_ensemble.py")


# ------------------------------------------------------------------ usage errors
@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["googlenet-mars"], "googlenet-mars"),
        ("train_ensemble.py", ["googlenet-digit"], "googlenet-digits"),
        ("train.py", ["googlenet-tiny", "--epoch", "3"], "--epochs"),
        ("train_ensemble.py", ["googlenet-tiny", "--ensemble.member", "3"], "--ensemble.members"),
        ("train.py", ["googlenet-tiny", "--epochs", "-1"], "epochs"),
        ("train.py", ["googlenet-tiny", "--epochs", "many"], "'many'"),
        ("train.py", ["googlenet-tiny", "--schedule.kind", "magic"], "magic"),
        ("train.py", ["googlenet-tiny", "--placement.workers", "9"], "order.lanes (8)"),
        ("train.py", ["googlenet-imagenet", "--dry-run"], "data: needed"),
        ("train_ensemble.py", ["googlenet-tiny", "--storage", "relative/runs", "--dry-run"], "relative"),
        ("train_ensemble.py", ["googlenet-tiny", "--storage", "s3://b/runs", "--dry-run"], "--tracking"),
        ("train_ensemble.py", ["googlenet-tiny", "--ensemble.wider", "8", "--model.width", "4", "--dry-run"], "width"),
        ("simulate.py", ["googlenet-mars"], "googlenet-mars"),
        ("simulate.py", ["googlenet-tiny", "--out", "relative"], "out: 'relative' is a relative path"),
        ("simulate.py", ["googlenet-tiny", "--data", "/nowhere"], "/nowhere/manifest.json: no manifest there"),
        (
            "simulate.py",
            ["googlenet-imagenet", "--samples", "100"],
            "batch_size: must be at most the 100 training images, got 256",
        ),
        ("train.py", ["/nowhere/recipe.json"], "/nowhere/recipe.json: nothing there; give a run's recipe.json"),
        ("train_ensemble.py", ["s3://b/recipe.yaml"], "s3://b/recipe.yaml: unknown preset"),
        ("simulate.py", ["/nowhere/recipe.json"], "/nowhere/recipe.json: nothing there"),
        ("evaluate.py", [], "runs"),
        ("stop.py", [], "runs: give the name"),
        ("stop.py", ["some-run"], "'some-run': no such run, ensemble or sweep"),
        ("stop.py", ["some-run", "--wait", "-1"], "wait"),
        ("status.py", ["some-run"], "'some-run': no such run, ensemble or sweep"),
        ("status.py", ["--watch", "0"], "watch"),
        ("status.py", ["--storage", "relative/runs"], "relative"),
        ("evaluate.py", ["some-run", "--crops", "3"], "--crops"),
        ("train.py", ["googlenet-tiny", "--name", "n" * 250], "at most 128 character"),
        ("train.py", ["googlenet-tiny", "--experiment", "e" * 600], "at most 250 character"),
        ("train.py", ["googlenet-tiny", "--storage", "s3:/bucket/runs"], "give 's3://bucket/runs'"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_status_2(
    script: str, arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [str(ROOT / "jobs" / script), *arguments]
    with patch.object(sys, "argv", words), patch.dict(os.environ, {"ORCHESTRATOR_RUNS": str(runs_of(tmp_path))}):
        try:
            status = main.run_job(words[0])
        except SystemExit as ended:
            status = int(str(ended.code))
    error = capfd.readouterr().err
    assert status == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith(f"{script}: error: ")
    assert message in error
    assert not runs_of(tmp_path).exists()


@pytest.mark.parametrize("script", TRAINERS)
def test_a_dry_run_plans_and_writes_nothing(script: str, tmp_path: Path) -> None:
    done = job(script, "googlenet-tiny", "--dry-run", runs=runs_of(tmp_path))
    assert (done.status, done.err) == (0, "")
    assert str(runs_of(tmp_path)) in done.out
    assert ("googlenet-tiny-m7-wide" in done.out) == (script == "train_ensemble.py")
    assert list(tmp_path.iterdir()) == []


def frozen(folder: Path, **changes: object) -> str:
    """Write a winner as a sweep does, with a recipe for the digits; return its path."""
    schedule = {"kind": "cosine", "base_rate": 0.1}
    recipe = {**googlenet_tiny().to_dict(), "name": "best", "schedule": schedule}
    place = folder / "winner.json"
    place.write_text(json.dumps({"recipe": recipe | changes, "provenance": {"sweep": "s", "dataset": "digits"}}))
    return str(place)


@pytest.mark.parametrize("script", TRAINERS)
def test_a_dry_run_of_a_recipe_from_a_file(script: str, tmp_path: Path) -> None:
    done = job(script, frozen(tmp_path), "--epochs", "3", "--dry-run", runs=runs_of(tmp_path))
    assert (done.status, done.err) == (0, "")
    assert "best" in done.out
    assert str(runs_of(tmp_path) / "data" / "digits") in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["winner.json"]


@pytest.mark.parametrize("script", TRAINERS)
def test_a_file_that_holds_no_recipe_is_one_line(script: str, tmp_path: Path) -> None:
    done = job(script, frozen(tmp_path, version=1), "--dry-run", runs=runs_of(tmp_path))
    assert done.status == 2, done.err
    (complaint,) = done.complaints
    assert complaint.startswith(f"{script}: error: {tmp_path / 'winner.json'}: recipe.version: must be")


def test_a_simulation_of_a_recipe_from_a_file(tmp_path: Path) -> None:
    done = job("simulate.py", frozen(tmp_path), runs=runs_of(tmp_path))
    assert (done.status, done.err) == (0, "")
    assert "best: cosine schedule" in done.out


def test_a_simulation_prints_the_schedule_and_draws_into_the_folder(tmp_path: Path) -> None:
    done = job("simulate.py", "googlenet-tiny", "--out", str(tmp_path / "out"), runs=runs_of(tmp_path))
    assert (done.status, done.err) == (0, "")
    assert "googlenet-tiny: polynomial schedule" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"schedule.png", "contact_sheet.png"}


def test_a_missing_run_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    done = job("evaluate.py", "some-run", runs=runs_of(tmp_path))
    assert done.status == 2, done.err
    (complaint,) = done.complaints
    assert f"'some-run': no such run or ensemble in {runs_of(tmp_path)}" in complaint
    assert not runs_of(tmp_path).exists()


@pytest.mark.parametrize("script", TRAINERS)
def test_a_notebooks_canvas_is_not_inherited(script: str, tmp_path: Path) -> None:
    backend = "module://matplotlib_inline.backend_inline"
    done = job(script, "googlenet-tiny", "--dry-run", runs=runs_of(tmp_path), MPLBACKEND=backend)
    assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize("script", TRAINERS)
def test_a_dry_run_fails_where_a_start_would(script: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tracking = f"sqlite:///{tmp_path}/file/mlflow.db"
    done = job(script, "googlenet-tiny", "--dry-run", "--tracking", tracking, runs=runs_of(tmp_path))
    assert done.status == 1
    assert len(done.complaints) == 1, done.err
    assert done.complaints[0].startswith(f"{script}: error: tracking: MLflow at {tracking} cannot be used: ")
    assert "googlenet-tiny" in done.out, "the plan all the same"


# ------------------------------------------------------------------ preflight, with a Ray of its own
def preflight(script: str, *arguments: str, tmp_path: Path, **changes: str) -> Ended:
    done = job(script, *arguments, runs=runs_of(tmp_path), seconds=120, **changes)
    assert done.status == 1, done.out + done.err
    assert done.seconds < PREFLIGHT_SECONDS
    return done


@pytest.mark.cluster
def test_missing_data_unwritable_storage_and_a_dead_tracker_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = preflight(
        "train.py", "googlenet-tiny", "--data", str(tmp_path / "nothing"), "--storage", str(tmp_path / "file" / "runs"),
        "--tracking", "http://127.0.0.1:9", tmp_path=tmp_path,
    )  # fmt: skip
    complaints = [line for line in done.complaints if line.startswith("train.py: error: ")]
    assert complaints == done.complaints, done.err
    storage, data, tracking = (line.removeprefix("train.py: error: ") for line in complaints)
    assert storage.startswith("storage: ")
    assert str(tmp_path / "file" / "runs") in storage
    assert data.startswith("data: ")
    assert str(tmp_path / "nothing") in data
    assert tracking.startswith("tracking: ")
    assert "127.0.0.1:9" in tracking
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.cluster
def test_a_broken_shard_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    packed = tiny_shards.dataset(tmp_path / "data", 70, 20)
    shard = tmp_path / "data" / packed.shards("train")[0].name
    shard.write_bytes(shard.read_bytes()[:-512])
    done = preflight("train_ensemble.py", "googlenet-tiny", "--data", str(tmp_path / "data"), tmp_path=tmp_path)
    assert len(done.complaints) == 1, done.err
    assert str(shard) in done.complaints[0]
    assert not (runs_of(tmp_path) / "models").exists()


@pytest.mark.cluster
def test_more_workers_than_the_cluster_has_is_an_error_within_seconds(tmp_path: Path) -> None:
    packed = tiny_shards.dataset(tmp_path / "data", 70, 20)
    assert packed.count_samples("train") == 70
    cpus = (os.cpu_count() or 1) + 1
    began = time.monotonic()
    done = preflight(
        "train.py", "googlenet-tiny", "--data", str(tmp_path / "data"),
        "--placement.workers", "2", "--placement.cpus-per-worker", str(cpus), tmp_path=tmp_path,
    )  # fmt: skip
    assert time.monotonic() - began < PREFLIGHT_SECONDS
    assert len(done.complaints) == 1, done.err
    assert f"2 workers of {cpus} CPU" in done.complaints[0]
    assert "--placement.workers" in done.complaints[0]


@pytest.mark.cluster
def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    done = preflight("train.py", "googlenet-tiny", tmp_path=tmp_path, RAY_ADDRESS="127.0.0.1:9")
    complaints = [line for line in done.complaints if "error:" in line]
    assert len(complaints) == 1, done.err
    assert "cannot use 127.0.0.1:9" in complaints[0]
