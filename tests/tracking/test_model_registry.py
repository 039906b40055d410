import shutil
import socket
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.tracking.model_registry import ModelRegistry
from orchestrator.tracking.tracker import TrackerUnreachableError, TrackingError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def registry(store: str) -> ModelRegistry:
    return ModelRegistry(store)


@pytest.fixture
def run_id(store: str, tmp_path: Path) -> str:
    client = MlflowClient(store, store)
    experiment = client.create_experiment(tmp_path.name, str(tmp_path / "artifacts"))
    return str(client.create_run(experiment).info.run_id)


def model(tmp_path: Path, text: str = "a") -> str:
    folder = tmp_path / f"model-{text}"
    folder.mkdir()
    (folder / "MLmodel").write_text(text)
    return str(folder)


# MLflow keeps the threads with which it copies files.
@pytest.mark.leaks
def test_versions_are_found_by_their_digest(registry: ModelRegistry, run_id: str, tmp_path: Path) -> None:
    assert registry.find_version("some", "aa") is None
    assert registry.register_model("some", "aa", run_id, model(tmp_path, "a"), "about", {"more": "x" * 9000}) == "1"
    assert registry.register_model("some", "bb", run_id, model(tmp_path, "b"), "", {}) == "2"
    assert [registry.find_version("some", digest) for digest in ("aa", "bb", "cc")] == ["1", "2", None]
    assert registry.find_version("other", "aa") is None
    for number, text in (("1", "a"), ("2", "b"), ("latest", "b")):
        folder = registry.download_model(f"models:/some/{number}", str(_made(tmp_path / f"out-{number}")))
        assert Path(folder, "MLmodel").read_text() == text


def test_an_alias_is_given_once(registry: ModelRegistry, run_id: str, tmp_path: Path) -> None:
    folder = model(tmp_path)
    for digest in ("aa", "bb"):
        registry.register_model("named", digest, run_id, folder, "", {})
    assert registry.set_alias_if_unset("named", "champion", "1") == "1"
    assert registry.set_alias_if_unset("named", "champion", "2") == "1"


@pytest.mark.leaks
def test_a_version_whose_files_are_lost_is_registered_anew(
    registry: ModelRegistry, run_id: str, tmp_path: Path
) -> None:
    folder = model(tmp_path)
    registry.set_alias_if_unset("gone", "champion", registry.register_model("gone", "aa", run_id, folder, "", {}))
    shutil.rmtree(tmp_path / "artifacts")
    assert registry.find_version("gone", "aa") is None
    with pytest.raises(TrackingError, match=f"artifacts of run {run_id}, which has none; rerun the job"):
        registry.download_model("models:/gone@champion", str(_made(tmp_path / "out")))
    assert registry.set_alias_if_unset("gone", "champion", "1") == "1"
    assert registry.register_model("gone", "bb", run_id, folder, "", {}) == "2"
    assert registry.set_alias_if_unset("gone", "champion", "2") == "2"
    assert registry.register_model("gone", "aa", run_id, folder, "", {}) == registry.find_version("gone", "aa") == "3"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("models:/none@champion", "none"),
        ("models:/none/3", "none"),
        ("models:/none/latest", "must be an existing models:/NAME@ALIAS"),
        ("models:/bare", "must be an existing models:/NAME@ALIAS"),
        ("models:/foreign/1", "must be a model that this project registered"),
    ],
)
def test_missing_models_are_errors(
    registry: ModelRegistry, store: str, tmp_path: Path, wanted: str, message: str
) -> None:
    client = MlflowClient(store, store)
    if not client.search_registered_models("name='foreign'"):
        client.create_registered_model("foreign")
        client.create_model_version("foreign", str(tmp_path))
    with pytest.raises(TrackingError, match=message) as raised:
        registry.download_model(wanted, str(tmp_path))
    assert not isinstance(raised.value, TrackerUnreachableError)


def test_an_unreachable_server_is_an_error_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with pytest.raises(TrackerUnreachableError, match="cannot look for model 'x'") as raised:
        ModelRegistry(f"http://me:secret@127.0.0.1:{port}").find_version("x", "aa")
    assert "secret" not in str(raised.value)


def test_an_invalid_uri_is_an_error() -> None:
    with pytest.raises(TrackingError, match="file store"):
        ModelRegistry("/some/folder")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
