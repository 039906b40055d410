"""Runs, an ensemble and sweeps without the fast start, through Ray's public API alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny_shards
from tests.support.launched import ROOT, job, process_tree, started, title, until
from tests.support.private_ray import SITE, list_private_modules

pytestmark = [pytest.mark.cluster]

SECONDS = 400.0
WARNING = "the fast start is off"
SPACE = '[dimensions."schedule.base_rate"]\nvalues = [0.02, 0.01, 0.005]\n'
SWEEP = ("googlenet-tiny", "--sampler", "grid", "--scheduler", "none", "--epochs", "1")

PARTS = 4  # of the private modules, each with a cluster of its own: all of them take minutes
EACH = """
import sys
from orchestrator.ray_backend import ray_env
ray_env.set_ray_variables()
import orchestrator.ray_backend
from orchestrator.data import manifest
from orchestrator.ray_backend import cluster, ray_env, ray_trainer
from tests.support import launched
from tests.support.private_ray import block, list_private_modules

digest = manifest.load(sys.argv[1] + "/data").digest()
ray_env.load_fast_start()
with cluster.connect_cluster():
    for number, module in enumerate(list_private_modules()[int(sys.argv[2]) :: int(sys.argv[3])]):
        for name in ("fast_start", "ray_internals"):
            sys.modules.pop(f"orchestrator.ray_backend.{name}", None)
            vars(orchestrator.ray_backend).pop(name, None)
        ray_env._loaded.clear()
        undo = block([module])
        recipe = launched.recipe(f"r{number}", epochs=1, batch_size=4)
        spec = launched.spec(recipe, sys.argv[1]).model_copy(update={"dataset_digest": digest})
        outcome = ray_trainer.launch_run(spec, *2 * [sys.argv[1] + "/never"], 0)
        undo()
        print(module, outcome.status, ray_env.load_fast_start() is None, flush=True)
"""


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_FAST_START", "0")


@pytest.fixture
def space(tmp_path: Path) -> Path:
    (tmp_path / "space.toml").write_text(SPACE)
    return tmp_path / "space.toml"


def count_finished_trials(runs: Path) -> int:
    ends = [json.loads(path.read_text())["state"] for path in runs.glob("sweeps/*/trials/*.ended.json")]
    return ends.count("finished")


def test_a_run_whose_worker_is_killed_resumes_and_names_the_cause(slow: None, tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "data", 64)
    arguments = ("--data", str(tmp_path / "data"), "--epochs", "60", "--cadence.checkpoint-seconds", "0.3")
    with started("train.py", "googlenet-tiny", *arguments, runs=tmp_path) as process:
        until(lambda: any(tmp_path.glob("models/*/checkpoints/*/DONE")) or process.poll() is not None, SECONDS)
        tree = process_tree(process.pid)
        [worker] = [pid for pid in tree if "RayTrainWorker" in title(pid)]
        os.kill(worker, signal.SIGKILL)
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out
    assert out.count(WARNING) == 1 and "ORCHESTRATOR_FAST_START is 0" in out
    [failure] = [json.loads(path.read_text()) for path in tmp_path.glob("models/*/attempts/failed-*.json")]
    assert failure["causes"]["0"].startswith("worker died: "), failure
    assert len(list(tmp_path.glob("models/*/attempts/0*.json"))) == 2
    until(lambda: not any(Path("/proc", str(pid)).exists() for pid in tree), 30)


def test_an_ensemble_of_two_is_trained_and_scored(slow: None, tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "data", 64)
    arguments = ("--ensemble.members", "2", "--epochs", "2", "--data", str(tmp_path / "data"))
    done = job("train_ensemble.py", "googlenet-tiny", *arguments, runs=tmp_path, seconds=SECONDS)
    assert done.status == 0, done.out + done.err
    assert [line for line in done.complaints if WARNING in line] == done.complaints != []
    assert "2 of 2 models, 5 images" in done.out


def test_a_sweep_of_three_is_run(slow: None, tmp_path: Path, space: Path) -> None:
    done = job("tune.py", *SWEEP, "--space", str(space), runs=tmp_path, seconds=SECONDS)
    assert done.status == 0, done.out + done.err
    assert count_finished_trials(tmp_path) == 3


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_finishes_whichever_private_module_of_ray_is_missing(tmp_path: Path, part: int) -> None:
    tiny_shards.dataset(tmp_path / "data", 16)
    modules = list_private_modules()[part::PARTS]
    command = [sys.executable, "-c", EACH, str(tmp_path), str(part), str(PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=550, cwd=ROOT)
    assert modules and done.stdout.splitlines() == [f"{module} finished True" for module in modules], done.stderr
    assert done.stderr.count(WARNING) == len(modules)


def test_a_sweep_whose_trials_have_two_workers_finishes_with_all_private_modules_missing(
    tmp_path: Path, space: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    path = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    more = ("--placement.workers", "2", "--budget.trials", "2", "--space", str(space))
    done = job("tune.py", *SWEEP, *more, runs=tmp_path, seconds=SECONDS, **path)
    assert done.status == 0, done.out + done.err
    assert "lacks what it needs (ImportError" in done.err and "is blocked" in done.err
    assert count_finished_trials(tmp_path) == 2
