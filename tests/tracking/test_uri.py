import pytest

from orchestrator.tracking.tracker import TrackingError
from orchestrator.tracking.uri import parse


def test_accepted() -> None:
    assert parse("sqlite:////runs/a/../mlflow.db").sqlite_path == "/runs/mlflow.db"
    assert parse("http://mlflow:5000/base/").link == "http://mlflow:5000/base"
    assert parse("https://ann:pass@host").link == "https://host"
    assert parse("postgresql+psycopg2://ann:pass@db/mlflow").database == ("db", 5432)


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
        parse(uri)
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
    parsed = parse(uri)
    text = f"cannot open {uri}: login s3cret for password=s3cret at http://x:s3cret@elsewhere failed"
    assert "s3cr" not in parsed.shown
    assert "s3cr" not in parsed.redact(text).replace("login s3cret", "").replace("password=s3cret", "")
    assert "host" in parsed.shown or "db" in parsed.shown
