"""Opening of trackers: MLflow in the background, and plug-ins."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import Plugin
from orchestrator.tracking import connect
from orchestrator.tracking.journal import JournalWriter
from orchestrator.tracking.replay import INCIDENTS_TAG, JournalReplayer
from orchestrator.tracking.tracker import TrackedRun, TrackingError


def test_only_an_absent_database_is_opened_in_the_background(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mlflow.db"
    uri = f"sqlite:///{path}"
    assert connect.will_create_database(uri)
    (tmp_path / "new").write_bytes(b"a file where the folder should be")
    assert not connect.will_create_database(uri)
    (tmp_path / "new").unlink()
    path.parent.mkdir()
    path.touch()
    assert not connect.will_create_database(uri), "what is there must be asked"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere" / "mlflow.db")
    assert not connect.will_create_database(uri)


def test_servers_are_opened_in_the_foreground() -> None:
    assert not connect.will_create_database("http://127.0.0.1:9")


def test_an_unsupported_uri_is_an_error() -> None:
    with pytest.raises(TrackingError, match="folder"):
        connect.will_create_database("/tmp/mlruns")


JSON_TRACKER = "examples.json_tracker:JsonTracker"


def test_a_tracker_plug_in_records_a_journal(tmp_path: Path) -> None:
    plugin = Plugin(kind=JSON_TRACKER, args={"folder": str(tmp_path / "tracked")})
    assert not connect.will_create_database("", plugin)
    writer = JournalWriter(str(tmp_path / "journal"), 0)
    writer.append("epoch", samples=10, loss=2.5)
    writer.append("incident", samples=10, cause="worker lost")
    writer.append("epoch", samples=20, loss=1.5)
    assert writer.close(5)
    for _ in range(2):  # the second driver replays the same events
        replayer = JournalReplayer(lambda: connect.open_tracker("", "digits", plugin))
        replayer.follow(TrackedRun("models/a", "a", params={"epochs": "2"}), str(tmp_path / "journal"))
        replayer.submit(lambda tracker: tracker.log_table("models_a", "t.json", {"x": [1]}), required_key="models/a")
        url = replayer.wait_for_run_url("models/a", 5)
        assert replayer.stop({"models/a": "FINISHED"}, 5)
    record = json.loads(Path(url).read_text())
    assert record["metrics"] == {"loss": [[10, 2.5], [20, 1.5]]}
    assert record["params"] == {"epochs": "2"}
    assert (record["status"], record["tags"][INCIDENTS_TAG]) == ("FINISHED", "1")
    assert json.loads((tmp_path / "tracked/digits/models_a/incidents.json").read_text())[0]["samples"] == 10
    assert json.loads((tmp_path / "tracked/digits/models_a/t.json").read_text()) == {"x": [1]}


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("mlfow", {}, "tracker 'mlfow' is unknown.*did you mean mlflow"),
        (JSON_TRACKER, {}, "does not take these arguments.*folder"),
        ("examples.json_tracker:Path", {}, "does not take these arguments|failed|must have the methods"),
        (
            "collections:OrderedDict",
            {},
            "OrderedDict must have the methods of a tracker, lacks check, .*derive it",
        ),
        ("no_such_module:Tracker", {}, "no module no_such_module"),
    ],
)
def test_an_invalid_tracker_plug_in_is_one_line(kind: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        connect.open_tracker("", "digits", Plugin(kind=kind, args=args))
    assert "\n" not in str(caught.value)
