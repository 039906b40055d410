"""Tracking URIs; and the sqlite store with its artifacts, in any folder and after the folder was moved."""

import os
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service import utils

from orchestrator.tracking import connect, tracking_uri
from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.model_registry import ModelRegistry
from orchestrator.tracking.tracker import TrackedRun, TrackingError
from orchestrator.tracking.tracking_uri import parse_tracking_uri

# MLflow keeps the threads with which it copies files.
pytestmark = pytest.mark.leaks
RUN = TrackedRun("/run@id", "run")
ODD = "a b#1?x=y%25 r&d=\u00fc[x]"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: to make one costs seconds."""
    database = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowTracker(tracking_uri.make_tracking_uri(str(database)), "first").check()
    return database


@pytest.fixture
def folder(tmp_path: Path, template: Path) -> Path:
    """A storage of an odd name with a recorded run and a registered model."""
    made = tmp_path / ODD
    made.mkdir()
    shutil.copy(template, made / "mlflow.db")
    tracker = MlflowTracker(uri(made), "googlenet")
    run_id = tracker.open_run(RUN)
    tracker.log_text(run_id, "note.txt", "first")
    model = tmp_path / "model"
    model.mkdir()
    (model / "MLmodel").write_text("a model")
    registry = ModelRegistry(uri(made))
    assert registry.find_version("m", "d1") is None
    assert registry.register_model("m", "d1", run_id, str(model), "", {}) == "1"
    registry.set_alias_if_unset("m", "champion", "1")
    return made


def uri(folder: Path) -> str:
    return tracking_uri.make_tracking_uri(str(folder / "mlflow.db"))


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_uri_names_the_file_whatever_it_is_called(folder: Path) -> None:
    assert parse_tracking_uri(uri(folder)).sqlite_path == str(folder / "mlflow.db")
    MlflowTracker(uri(folder), "googlenet").check_readable()
    assert not connect.will_create_database(uri(folder))
    assert "?" not in uri(folder)
    assert parse_tracking_uri(f"sqlite:////{folder.parent}/x.db").sqlite_path == f"{folder.parent}/x.db"


def test_everything_lands_inside(folder: Path, tmp_path: Path) -> None:
    assert written(folder) == {"mlflow.db", "note.txt", "MLmodel"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ODD, "model"])
    run_id = MlflowTracker(uri(folder), "googlenet").open_run(RUN)
    client = MlflowClient(uri(folder), uri(folder))
    assert [each.path for each in client.list_artifacts(run_id)] == ["models", "note.txt"]
    fetched = ModelRegistry(uri(folder)).download_model("models:/m@champion", str(tmp_path / "model"))
    assert Path(fetched, "MLmodel").read_text() == "a model"


@pytest.mark.parametrize("copied", [False, True], ids=["moved", "copied"])
def test_a_store_that_was_moved_is_used_where_it_is(folder: Path, tmp_path: Path, copied: bool) -> None:
    moved = tmp_path / "else where%20?"
    utils._artifact_repos_cache.clear()  # of this process, which saw the old place
    (shutil.copytree if copied else os.rename)(folder, moved)
    before = written(folder) if copied else set()
    shutil.rmtree(tmp_path / "model")
    registry = ModelRegistry(uri(moved))
    assert registry.find_version("m", "d1") == "1"
    (tmp_path / "out").mkdir()
    assert (
        Path(registry.download_model("models:/m@champion", str(tmp_path / "out")), "MLmodel").read_text() == "a model"
    )
    tracker = MlflowTracker(uri(moved), "googlenet")
    run_id = tracker.open_run(RUN)
    tracker.log_text(run_id, "more.txt", "second")
    client = MlflowClient(uri(moved), uri(moved))
    assert [each.path for each in client.list_artifacts(run_id)] == ["models", "more.txt", "note.txt"]
    for place in (
        client.get_run(run_id).info.artifact_uri,
        next(each.artifact_location for each in client.search_experiments() if each.name == "googlenet"),
        client.get_model_version("m", "1").source,
    ):
        assert str(place).startswith(tracking_uri.get_artifact_root(str(moved / "mlflow.db")))
    assert (written(folder) if copied else set()) == before, "nothing more in the old place"


def test_another_spelling_of_the_folder_is_no_move(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    before = (folder / "mlflow.db").read_bytes()
    tracking_uri.update_artifact_locations(str(tmp_path / "link" / "mlflow.db"))
    assert (folder / "mlflow.db").read_bytes() == before


def test_artifacts_that_lie_elsewhere_on_purpose_stay_there(template: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shutil.copy(template, tmp_path / "a" / "mlflow.db")
    root = (tmp_path / "own").as_uri()
    MlflowClient(uri(tmp_path / "a"), uri(tmp_path / "a")).create_experiment("own", root)
    run_id = MlflowTracker(uri(tmp_path / "a"), "own").open_run(RUN)
    os.rename(tmp_path / "a" / "mlflow.db", tmp_path / "b" / "mlflow.db")
    tracking_uri.update_artifact_locations(str(tmp_path / "b" / "mlflow.db"))
    client = MlflowClient(uri(tmp_path / "b"), uri(tmp_path / "b"))
    assert client.get_run(run_id).info.artifact_uri.startswith(root)


def test_other_files_than_mlflow_stores_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracking_uri.update_artifact_locations(str(tmp_path / "none.db"))
    assert not (tmp_path / "none.db").exists()
    (tmp_path / tracking_uri.ARTIFACT_FOLDER).mkdir()
    (tmp_path / "text.db").write_bytes(b"no database at all, but long enough to be read as one" * 20)
    tracking_uri.update_artifact_locations(str(tmp_path / "text.db"))
    assert "text.db: its artifact locations could not be checked" in caplog.text


# ------------------------------------------------------------------ URIs
def test_valid_uris_are_parsed() -> None:
    assert parse_tracking_uri("sqlite:////runs/a/../mlflow.db").sqlite_path == "/runs/mlflow.db"
    assert parse_tracking_uri("http://mlflow:5000/base/").base_url == "http://mlflow:5000/base"
    assert parse_tracking_uri("https://ann:pass@host").base_url == "https://host"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("./mlruns", "retired its file store"),
        ("file:///tmp/mlruns", "retired its file store"),
        ("/tmp/mlruns", "retired its file store"),
        ("", "retired its file store"),
        ("sqlite:///mlflow.db", "four slashes"),
        ("sqlite://", "four slashes"),
        ("sqlite:///:memory:", "four slashes"),
        ("ftp://ann:pass@host/x", r"scheme 'ftp' is not supported"),
        ("http://", "no host"),
        ("http://host:port", "give for example http://mlflow:5000"),
        ("postgresql+psycopg2://ann:pass@db/mlflow", "scheme 'postgresql' is not supported.*of an MLflow server"),
    ],
)
def test_invalid_uris_are_errors_with_the_fix(uri: str, words: str) -> None:
    with pytest.raises(TrackingError, match=words) as caught:
        parse_tracking_uri(uri)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://ann:s3cret@host:5000",
        "http://ann:s3cr@s3cret@host:5000",
        "https://s3cret@host",
        "https://ann:%733cret@host",
        "https://ann@host/x?password=s3cret",
    ],
)
def test_secrets_are_not_shown(uri: str) -> None:
    parsed = parse_tracking_uri(uri)
    text = f"cannot open {uri}: login s3cret for password=s3cret at http://x:s3cret@elsewhere failed"
    assert "s3cr" not in parsed.redacted
    assert "s3cr" not in parsed.redact(text).replace("login s3cret", "").replace("password=s3cret", "")
    assert "host" in parsed.redacted or "db" in parsed.redacted
