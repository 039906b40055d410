"""The public Python API: what it exports, what it rejects, and the same answers as the commands."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import orchestrator
from orchestrator import api
from orchestrator.config.arg_parser import apply_settings
from orchestrator.data.data_errors import BadSampleError
from orchestrator.ensemble.config import TrainEnsembleConfig
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.run_spec import build_job_presets
from tests.support import ensembles
from tests.support.installed import make_environment, run_in
from tests.support.launched import ROOT

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)


def encode(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------ names
def test_every_exported_name_is_there_and_listed() -> None:
    assert set(orchestrator.__all__) <= set(dir(orchestrator))
    assert {name for name in orchestrator.__all__ if not hasattr(orchestrator, name)} == set()
    assert orchestrator.presets.googlenet_tiny().name == "googlenet-tiny"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = orchestrator.nonsense


@pytest.mark.process
def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import json, sys, orchestrator\n"
        "before = sorted(sys.modules)\n"
        "orchestrator.Recipe, orchestrator.train, orchestrator.load\n"
        "print(json.dumps([before, sorted(sys.modules)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = map(set, json.loads(done.stdout))
    assert "pydantic" not in before
    assert "pydantic" in after
    assert {"torch", "ray", "mlflow", "numpy"} & after == set()


# ------------------------------------------------------------------ settings
def test_settings_mean_what_flags_mean() -> None:
    preset = build_job_presets(TrainEnsembleConfig)["googlenet-tiny"].value
    settings = {
        "schedule.kind": "cosine", "epochs": 3, "ensemble.members": 2, "model.lrn": False, "dry_run": True,
        "augmentation.area": (0.2, 1), "optimizer.clip_norm": None, "storage": "/runs",
    }  # fmt: skip
    config = apply_settings(preset, settings)
    assert (config.recipe.schedule.kind, config.recipe.epochs, config.ensemble.members) == ("cosine", 3, 2)
    assert config.recipe.augmentation.area == (0.2, 1.0)
    assert config.recipe.optimizer.clip_norm is None
    assert config.dry_run
    assert config.destination.storage == "/runs"


# ------------------------------------------------------------------ errors before anything is started
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: orchestrator.train("googlenet-digit"),
            "'googlenet-digit': unknown preset; did you mean googlenet-digits",
        ),
        (lambda: orchestrator.train("/nowhere/recipe.json"), "/nowhere/recipe.json: nothing there"),
        (lambda: orchestrator.train(settings={"epoch": 3}), "--epoch: unknown flag; did you mean --epochs?"),
        (lambda: orchestrator.train(settings={"epochs": "many"}), "epochs"),
        (lambda: orchestrator.train(storage="relative/runs"), "relative"),
        (
            lambda: orchestrator.train(data="s3://user:secret@bucket/data"),
            "must be a URL without user name and password",
        ),
        (lambda: orchestrator.train("googlenet-imagenet"), "data: needed"),
        (lambda: orchestrator.train_ensemble(members=0), "ensemble.members"),
        (lambda: orchestrator.train_ensemble("googlenet-tiny", settings={"placement.workers": 9}), "order.lanes"),
        (orchestrator.evaluate, "runs: give the name of at least one finished run"),
        (lambda: orchestrator.evaluate("some-run", settings={"crops": 3}), "--crops"),
        (lambda: orchestrator.load("some-run"), "'some-run': no such run"),
    ],
)
def test_what_a_command_rejects_is_a_config_error(
    call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(ray_env, "set_ray_variables", lambda placement: None)
    monkeypatch.setattr(ray_env, "prepare_process", lambda: None)
    with pytest.raises(orchestrator.ConfigError) as raised:
        call()
    assert message in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
        orchestrator.train("googlenet-tiny", epochs=3)  # type: ignore[call-arg]


def test_training_needs_the_main_thread() -> None:
    problems: list[str] = []

    def train() -> None:
        try:
            orchestrator.train("googlenet-tiny")
        except orchestrator.ConfigError as error:
            problems.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert problems == ["training must be called from the main thread, because it handles signals"]


def test_a_run_stopped_by_ctrl_c_interrupts_the_script() -> None:
    stopped = orchestrator.TrainResult("a-run", "/runs/models/a-run", "stopped", exit_status=130)
    with pytest.raises(KeyboardInterrupt, match="a-run was stopped"):
        api._check_interrupt(stopped)
    by_flag = orchestrator.TrainResult("a-run", "/runs/models/a-run", "stopped", exit_status=143)
    assert api._check_interrupt(by_flag) is by_flag


# ------------------------------------------------------------------ models
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Model:
    storage = tmp_path_factory.mktemp("runs")
    ensembles.members(storage)
    ensembles.ensemble(storage, "tiny-x3")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray_env, "prepare_process", lambda: None)
        return orchestrator.load("tiny-x3", storage=storage, members=[1, 3])


def test_a_model_classifies_paths_bytes_and_pixels_alike(model: orchestrator.Model, tmp_path: Path) -> None:
    data = encode(PIXELS)
    (tmp_path / "image.png").write_bytes(data)
    with ensembles.one_thread():
        predictions = model.predict([tmp_path / "image.png", data, PIXELS], crops=1)
        alone = model.predict(str(tmp_path / "image.png"), crops=1)
    assert len(model) == 2
    assert "tiny-x3 (models 1,3 of 3)" in repr(model)
    assert predictions.probabilities.shape == (3, len(model.classes))
    assert predictions.probabilities.dtype == np.dtype(np.float32)
    # The same image; how many stand together changes the last bits.
    assert np.allclose(predictions.probabilities, predictions.probabilities[0], atol=1e-6)
    assert np.allclose(predictions.probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(alone.probabilities[0], predictions.probabilities[0], atol=1e-6)
    assert predictions.names == [model.classes[label] for label in predictions.labels]
    best, second = predictions.rank(2)[0]
    assert best == (predictions.names[0], float(predictions.probabilities[0].max()))
    assert second[1] <= best[1]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"uint8 of shape height x width x 3, got uint8 of shape \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "got float32"),
        ("/nowhere/cat.jpg", "/nowhere/cat.jpg: nothing there"),
    ],
)
def test_an_image_of_an_unknown_form_is_a_config_error(model: orchestrator.Model, image: Any, message: str) -> None:
    with pytest.raises(orchestrator.ConfigError, match=message):
        model.predict([image])


def test_an_image_that_cannot_be_decoded_is_named_by_its_number(model: orchestrator.Model) -> None:
    with pytest.raises(BadSampleError, match="image 1: "):
        model.predict([encode(PIXELS), b"no image"], crops=1)


# ------------------------------------------------------------------ as a stranger uses it
SCRIPT = """\
import numpy as np
import orchestrator

run = orchestrator.train("googlenet-tiny", settings={"epochs": 1}, verbose=False)
scores = orchestrator.evaluate(run, verbose=False)
model = orchestrator.load(run)
answer = model.predict(np.zeros((32, 32, 3), np.uint8))
print(run.status, run.name, scores.status, sorted(scores.errors), answer.probabilities.shape)
"""


@pytest.mark.cluster
def test_a_script_outside_the_checkout_trains_scores_and_predicts(tmp_path: Path) -> None:
    programs = make_environment(tmp_path / "venv")
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    done = run_in(programs, ["python", "script.py"], folder, 300)
    assert done.returncode == 0, done.stderr
    assert len(SCRIPT.splitlines()) < 15
    words = done.stdout.split()
    assert (words[0], words[2]) == ("finished", "finished")
    assert done.stdout.strip().endswith("[1, 10, 144] (1, 10)")
    assert (folder / "orchestrator-runs" / "models" / words[1]).is_dir(), "the default storage in HOME"
