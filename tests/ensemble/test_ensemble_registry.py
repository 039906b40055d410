import base64
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import ensemble_registry
from orchestrator.ensemble.ensemble_registry import RegisteredVersion
from orchestrator.evaluation.classifier import Classifier
from orchestrator.storage.commit import CommitError
from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.tracker import TrackedRun
from tests.support import ensembles, tiny_shards
from tests.support.launched import ROOT

# MLflow keeps the threads with which it copies files.
pytestmark = pytest.mark.leaks
TITLES = ("an ant", "a bee", "a cat")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory in which MLflow must leave nothing, such as a default store."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with ensembles.one_thread():
        yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ensembles.members(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run_id(store: str, request: pytest.FixtureRequest) -> str:
    return MlflowTracker(store, "tests").open_run(TrackedRun(request.node.name, request.node.name))


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store, store)


def artifacts(client: MlflowClient, run_id: str) -> Path:
    return Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://"))


def test_the_same_ensemble_is_registered_once(store: str, runs: list[str], run_id: str, client: MlflowClient) -> None:
    first = ensemble_registry.register_ensemble(store, run_id, "once", "once-x3", runs, TITLES, "| models |")
    assert first == RegisteredVersion("once", "1", True, "champion")
    assert first.uri == "models:/once@champion"
    again = ensemble_registry.register_ensemble(store, run_id, "once", "once-x3", runs, TITLES)
    assert again == RegisteredVersion("once", "1", False, "champion")
    (version,) = client.search_model_versions("name='once'")
    assert (version.run_id, version.description) == (run_id, "| models |")
    assert version.tags["orchestrator.ensemble"] == "once-x3"
    assert version.tags["orchestrator.members"] == "m1,m2,m3"
    assert version.tags["orchestrator.digest"] == ensemble_registry.compute_digest(runs, TITLES)


def test_another_ensemble_is_another_version_and_the_alias_stays(
    store: str, runs: list[str], run_id: str, client: MlflowClient
) -> None:
    ensemble_registry.register_ensemble(store, run_id, "two", "two-x2", runs[:2], ())
    # The same run of the tracker, as when a member that had failed was trained later.
    whole = ensemble_registry.register_ensemble(store, run_id, "two", "two-x3", runs, ())
    assert whole == RegisteredVersion("two", "2", True, "")
    assert whole.uri == "models:/two/2"
    assert str(client.get_model_version_by_alias("two", "champion").version) == "1"
    kept = {
        folder.name: len(list(folder.glob("artifacts/weights/*")))
        for folder in artifacts(client, run_id).glob("models/*")
    }
    assert kept == {ensemble_registry.compute_digest(runs[:2], ()): 2, ensemble_registry.compute_digest(runs, ()): 3}
    client.set_registered_model_alias("two", "champion", "2")
    ensemble_registry.register_ensemble(store, run_id, "two", "two-x2", runs[:2], ())
    assert str(client.get_model_version_by_alias("two", "champion").version) == "2"


def test_each_dataset_has_its_champion(store: str, runs: list[str], run_id: str) -> None:
    names = [
        ensemble_registry.make_model_name("net", dataset, digest)
        for dataset, digest in (("cats", "a1" * 8), ("dogs", "b2" * 8))
    ]
    assert names == ["net-cats-a1a1a1a1", "net-dogs-b2b2b2b2"]
    assert ensemble_registry.make_model_name("net-cats", "cats", "c3" * 8) == "net-cats-c3c3c3c3"
    uris = [f"models:/{name}@champion" for name in names]
    for name, uri, members in zip(names, uris, (runs[:1], runs[1:2]), strict=True):
        assert ensemble_registry.register_ensemble(store, run_id, name, "x1", members, ()).uri == uri
    assert set(uris) <= set(ensemble_registry.find_champions(store))


def test_an_interrupted_registration_is_completed(
    store: str, runs: list[str], run_id: str, client: MlflowClient
) -> None:
    ensemble_registry.register_ensemble(store, run_id, "cut", "cut-x3", runs, ())
    client.delete_registered_model_alias("cut", "champion")
    assert ensemble_registry.register_ensemble(store, run_id, "cut", "cut-x3", runs, ()) == RegisteredVersion(
        "cut", "1", False, "champion"
    )
    client.delete_model_version("cut", "1")
    after = ensemble_registry.register_ensemble(store, run_id, "cut", "cut-x3", runs, ())
    assert (after.is_new, after.alias) == (True, "champion")


def test_identity_is_weights_their_order_and_titles(runs: list[str]) -> None:
    digests = {
        ensemble_registry.compute_digest(chosen, titles)
        for chosen, titles in ((runs, ()), (runs[::-1], ()), (runs[:2], ()), (runs, TITLES))
    }
    assert len(digests) == 4
    with pytest.raises(ConfigError, match="members must hold at least one model, got none"):
        ensemble_registry.compute_digest([], ())


def test_names_that_mlflow_rejects_are_replaced(store: str, runs: list[str], run_id: str) -> None:
    assert ensemble_registry.register_ensemble(store, run_id, "it's/a:name", "x", runs[:1], ()).model == "it-s-a-name"


def test_damaged_weights_are_not_registered(store: str, run_id: str, tmp_path: Path, client: MlflowClient) -> None:
    (run,) = ensembles.members(tmp_path, ["m1"])
    Path(run, "final", "averaged.safetensors").write_bytes(b"damaged")
    with pytest.raises(CommitError, match=r"averaged\.safetensors: damaged"):
        ensemble_registry.register_ensemble(store, run_id, "bad", "bad", [run], ())
    assert list(client.search_model_versions("name='bad'")) == []


# ------------------------------------------------------------------ what is in it
def pickled(path: Path) -> bool:
    """Return whether a file is a pickle, or a zip with one, as torch.save writes it."""
    if zipfile.is_zipfile(path):
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    return path.suffix in (".pkl", ".pickle", ".pt", ".pth") or path.read_bytes()[:1] == b"\x80"


def test_a_registered_model_holds_no_pickle(store: str, runs: list[str], run_id: str, client: MlflowClient) -> None:
    assert pickled(Path(runs[0], "final", "state.pt"))  # the look sees one
    ensemble_registry.register_ensemble(store, run_id, "bare", "bare-x3", runs, ())
    files = [path for path in artifacts(client, run_id).rglob("*") if path.is_file()]
    assert [path for path in files if pickled(path)] == []
    assert sorted(path.name for path in files if path.suffix == ".safetensors") == [
        "0001-m1.safetensors",
        "0002-m2.safetensors",
        "0003-m3.safetensors",
    ]
    assert [path.name for path in files if path.suffix == ""] == ["MLmodel"]


LOAD = """
import json, sys
import mlflow
before = set(sys.modules)
model = mlflow.pyfunc.load_model(sys.argv[1])
given = json.loads(sys.argv[2])
params = model.metadata.get_params_schema()
print(json.dumps({
    "answer": model.predict({"image": given}, params={"crops": 144, "top": 2, "members": "1,3"}),
    "default": model.predict({"image": given}),
    "example": model.predict(model.input_example),
    "code": sys.modules["orchestrator"].__file__,
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "inputs": model.metadata.get_input_schema().to_dict(),
    "outputs": [column["name"] for column in model.metadata.get_output_schema().to_dict()],
    "params": {one["name"]: one["default"] for one in params.to_dict()},
}))
"""


@pytest.mark.process
def test_a_registered_model_predicts_without_this_project(
    store: str, runs: list[str], run_id: str, client: MlflowClient, tmp_path: Path
) -> None:
    """Loaded by MLflow in a process that knows nothing of this project but what lies in the model."""
    made = ensemble_registry.register_ensemble(store, run_id, "alone", "alone-x3", runs, TITLES)
    image = tiny_shards.jpeg(1, 50, 31)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, made.uri, json.dumps([base64.b64encode(image).decode()])],
        capture_output=True, text=True, check=False, cwd=elsewhere, timeout=300,
        env={**os.environ, "MLFLOW_TRACKING_URI": store},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["code"]).is_relative_to(artifacts(client, run_id))
    assert result["inputs"] == [{"type": "string", "name": "image", "required": True}]
    assert result["params"] == {"crops": 10, "top": 5, "members": ""}
    assert result["outputs"] == ["predictions"]
    known = Classifier([f"{run}/final" for run in runs], TITLES)
    for name, asked in (("answer", (144, 2, (1, 3))), ("default", (10, 5, ()))):
        (guesses,) = known.classify([image], *asked)
        assert isinstance(guesses, list)
        (row,) = result[name]
        assert [(one["label"], one["class_name"]) for one in row["predictions"]] == [
            (guess.label, guess.class_name) for guess in guesses
        ]
        assert row["predictions"][0]["probability"] == pytest.approx(guesses[0].probability, abs=1e-6)
    assert len(result["example"][0]["predictions"]) == 3

    # What its code imports of what this project declares is what the model requires.
    (folder,) = artifacts(client, run_id).glob("models/*")
    required = {line.partition("==")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert not [line for line in (folder / "requirements.txt").read_text().split() if "+" in line]
    homes = packages_distributions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.partition(">")[0].partition("[")[0] for line in project["dependencies"]}
    used = {home for name in result["modules"] for home in homes.get(name, ())} & declared
    assert used - required == set()
    assert not {"ray"} & set(result["modules"])
    assert required - used == {"pydantic"}  # which MLflow had imported before


# ------------------------------------------------------------------ getting it back
def test_fetching_by_alias_version_and_latest(store: str, runs: list[str], run_id: str, tmp_path: Path) -> None:
    ensemble_registry.register_ensemble(store, run_id, "back", "back-x3", runs, TITLES)
    ensemble_registry.register_ensemble(store, run_id, "back", "back-x1", runs[:1], ())
    for model, names, titles in (
        ("back@champion", ["0001-m1", "0002-m2", "0003-m3"], list(TITLES)),
        ("back/1", ["0001-m1", "0002-m2", "0003-m3"], list(TITLES)),
        ("back/latest", ["0001-m1"], []),
    ):
        weights, found = ensemble_registry.fetch_weights(
            store, f"models:/{model}", str(tmp_path / model.replace("/", "-"))
        )
        assert [Path(path).stem for path in weights] == names
        assert found == titles
    assert len(Classifier(weights)) == 1


def test_needs_no_torch(store: str, runs: list[str], run_id: str) -> None:
    code = (
        "import sys\n"
        "from orchestrator.ensemble import ensemble_registry\n"
        "assert not {'torch', 'mlflow', 'ray'} & set(sys.modules)\n"
        f"ensemble_registry.register_ensemble({store!r}, {run_id!r}, 'light', 'light', {runs[:1]!r}, ())\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
