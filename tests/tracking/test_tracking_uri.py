import pytest

from orchestrator.tracking.tracker import TrackingError
from orchestrator.tracking.tracking_uri import parse_tracking_uri


def test_accepted() -> None:
    assert parse_tracking_uri("sqlite:////runs/a/../mlflow.db").sqlite_path == "/runs/mlflow.db"
    assert parse_tracking_uri("http://mlflow:5000/base/").base_url == "http://mlflow:5000/base"
    assert parse_tracking_uri("https://ann:pass@host").base_url == "https://host"
    assert parse_tracking_uri("postgresql+psycopg2://ann:pass@db/mlflow").database == ("db", 5432)


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
        ("http://host:port", "give scheme://host:port"),
    ],
)
def test_refused(uri: str, words: str) -> None:
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
        "postgresql://ann@db/x?password=s3cret",
    ],
)
def test_secrets_are_not_shown(uri: str) -> None:
    parsed = parse_tracking_uri(uri)
    text = f"cannot open {uri}: login s3cret for password=s3cret at http://x:s3cret@elsewhere failed"
    assert "s3cr" not in parsed.redacted
    assert "s3cr" not in parsed.redact(text).replace("login s3cret", "").replace("password=s3cret", "")
    assert "host" in parsed.redacted or "db" in parsed.redacted
