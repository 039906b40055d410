"""Advice about errors of MLflow."""

import pytest

from orchestrator.tracking import mlflow_errors
from orchestrator.tracking.tracker import TrackerUnreachableError, TrackingError
from orchestrator.tracking.tracking_uri import parse_tracking_uri

SERVER, FILE = parse_tracking_uri("http://h:9"), parse_tracking_uri("sqlite:////x.db")


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (401, "You are not authenticated", "MLFLOW_TRACKING_USERNAME"),
        (403, "Invalid Host header - possible DNS rebinding attack detected", "MLFLOW_SERVER_ALLOWED_HOSTS"),
        (403, "Permission denied", "administrator"),
        (404, "error code 404 != 200. Response body: '<!DOCTYPE HTML><HTML>", "Another service than MLflow"),
        (
            400,
            "The run ab12 must be in the 'active' state. Current state is deleted.",
            "mlflow runs restore --run-id ab12",
        ),
    ],
)
def test_a_rejection_has_its_fix(status: int, text: str, expected: str) -> None:
    error = mlflow_errors.make_error(text, status, SERVER, "open it")
    assert str(error).startswith(f"MLflow at http://h:9 refused to open it: {text[:20]}")
    assert expected in str(error)
    assert not isinstance(error, TrackerUnreachableError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "certificate verify failed: self-signed certificate",
            "MLFLOW_TRACKING_SERVER_CERT_PATH",
        ),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", "http://"),
        ("[SSL] record layer failure (_ssl.c:1016)", "http://"),
        ("sqlite3.OperationalError: attempt to write a readonly database", "owner"),
        ("sqlite3.OperationalError: database is locked", "MLflow server"),
        ("Connection refused", "ADDRESS/health"),
    ],
)
def test_a_silence_has_its_fix(text: str, expected: str) -> None:
    for status in (0, 429, 500):
        error = mlflow_errors.make_error(text, status, SERVER, "open it")
        assert isinstance(error, TrackerUnreachableError)
        assert expected in str(error)
    assert "Is the folder writable" in str(mlflow_errors.make_error("OSError: 5", 0, FILE, "open it"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NewConnectionError('HTTPConnection: [Errno 111] Connection refused'))", "Connection refused"),
        (
            "ConnectTimeoutError(<HTTPConnection>, 'Connection to h timed out. (connect timeout=5)'))",
            "no answer in time",
        ),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
            "self-signed certificate (_ssl.c:1006)')))",
            "certificate verify failed: self-signed certificate",
        ),
        ("ResponseError('too many 503 error responses'))", "too many 503 error responses"),
    ],
)
def test_an_unreachable_server_is_one_cause(text: str, expected: str) -> None:
    long = f"HTTPConnectionPool(host='h', port=9): Max retries exceeded with url: /api?x=1 (Caused by {text}"
    error = mlflow_errors.make_error(long, 0, SERVER, "open it")
    assert str(error).startswith(f"MLflow at http://h:9 cannot open it: {expected}. ")


def test_the_schema_of_another_mlflow_has_its_fix() -> None:
    text = "Detected out-of-date database schema (found version abc123, but expected def456)."
    for answer in (text, "Can't locate revision identified by 'abc123'"):
        error = mlflow_errors.make_error(answer, 500, FILE, "open it")
        assert type(error) is TrackingError
        assert "(revision abc123)" in str(error)
        assert "mlflow db upgrade sqlite:////x.db" in str(error)
        assert "install that version" in str(error)
    assert "mlflow db" not in str(mlflow_errors.make_error("found version 3 of something else", 500, FILE, "open it"))


def test_other_rejections_get_no_advice() -> None:
    error = mlflow_errors.make_error("Invalid value for parameter 'x'", 400, SERVER, "open it")
    assert str(error) == "MLflow at http://h:9 refused to open it: Invalid value for parameter 'x'."
