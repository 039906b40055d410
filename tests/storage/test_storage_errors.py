"""Classification and description of storage errors."""

from contextlib import closing
from typing import Any

import pytest
from botocore.exceptions import (  # type: ignore[import-untyped]
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)

from orchestrator.storage import file_io, s3, storage_errors
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader


def answered(status: int, code: str = "", message: str = "") -> Any:
    """botocore's error for an answer."""
    response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "GetObject")


def hidden(error: Exception) -> Exception:
    """As s3fs raises it: an error of its own with botocore's as the cause."""
    shown = OSError(22, "translated")
    shown.__cause__ = error
    return shown


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (answered(403, "AccessDenied"), True),
        (answered(404, "NoSuchKey"), True),
        (answered(400, "InvalidBucketName"), True),
        (answered(400, "RequestTimeout"), False),
        (answered(429, "TooManyRequests"), False),
        (answered(500, "InternalError"), False),
        (answered(503, "SlowDown"), False),
        (NoCredentialsError(), True),
        (ProfileNotFound(profile="x"), True),
        (EndpointConnectionError(endpoint_url="x"), False),
        (ReadTimeoutError(endpoint_url="x"), False),
        (ConnectionResetError(), False),
        (TimeoutError(), False),
        (ImportError("no gcsfs"), True),
    ],
)
def test_errors_are_permanent_or_transient(error: Exception, final: bool) -> None:
    assert storage_errors.is_permanent(error) is final
    if isinstance(error, ClientError):
        assert storage_errors.is_permanent(hidden(error)) is final


def test_denials_and_missing_credentials_name_the_variables() -> None:
    refused = answered(403, "SignatureDoesNotMatch", "the signature differs")
    for error in (refused, hidden(refused)):
        assert "permission denied (403 SignatureDoesNotMatch, the signature differs)" in storage_errors.describe_error(
            error
        )
        assert "AWS_SECRET_ACCESS_KEY" in storage_errors.describe_error(error)
    assert "permission denied (403)" in storage_errors.describe_error(answered(403, "403"))
    assert storage_errors.describe_error(NoCredentialsError()).startswith("no credentials: ")
    assert storage_errors.describe_error(OSError("broken")) == "OSError: broken"
    assert storage_errors.describe_error(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            "http://KEY:SECRET@127.0.0.1:9",
            "must be a URL without user name and password, got one with them for http://127.0.0.1:9; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead",
        ),
        ("KEY:SECRET@host:9000", "must be a URL such as https://HOST:9000, got '***@host:9000'"),
        ("127.0.0.1:9000", "must be a URL such as https://HOST:9000, got '127.0.0.1:9000'"),
    ],
)
@pytest.mark.parametrize("name", s3.ENDPOINTS)
def test_an_endpoint_that_cannot_be_used_is_named(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError) as caught:
        file_io.read_bytes("s3://bucket/a")
    assert str(caught.value) == f"cannot read s3://bucket/a: {name}: {expected}"
    with pytest.raises(StorageError, match=f"{name}: must be a URL"), closing(RangeReader()) as ranges:
        ranges.read("s3://bucket/a", 0, 1)


def test_absence() -> None:
    assert storage_errors.is_not_found(FileNotFoundError())
    assert storage_errors.is_not_found(hidden(answered(404, "NoSuchKey")))
    assert not storage_errors.is_not_found(answered(403))
    assert not storage_errors.is_not_found(OSError())
