"""What is advised when MLflow refuses."""

import pytest

from orchestrator.tracking import advice
from orchestrator.tracking.mlflow import MlflowTracker
from orchestrator.tracking.tracker import TrackingError


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (401, "You are not authenticated", "MLFLOW_TRACKING_USERNAME"),
        (403, "Invalid Host header - possible DNS rebinding attack detected", "MLFLOW_SERVER_ALLOWED_HOSTS"),
        (403, "Permission denied", "administrator"),
    ],
)
def test_a_refusal_has_its_fix(status: int, text: str, expected: str) -> None:
    assert expected in advice.on_refusal(status, text)


def test_other_refusals_speak_for_themselves() -> None:
    assert advice.on_refusal(400, "Invalid value for parameter 'x'") == ""


def test_a_database_without_its_module_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: MlflowTracker) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")

    monkeypatch.setattr(MlflowTracker, "_connect", connect)
    with pytest.raises(TrackingError, match=r"psycopg.*postgresql\+psycopg2"):
        MlflowTracker("postgresql://nobody@127.0.0.1:9/none", "x").check()
