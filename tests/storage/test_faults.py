"""What storage errors mean, told from what they carry."""

from typing import Any

import pytest
from botocore.exceptions import (  # type: ignore[import-untyped]
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)

from orchestrator.storage import faults


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
def test_what_a_second_try_can_mend(error: Exception, final: bool) -> None:
    assert faults.is_final(error) is final
    if isinstance(error, ClientError):
        assert faults.is_final(hidden(error)) is final


def test_refusals_and_missing_credentials_say_what_to_look_at() -> None:
    refused = answered(403, "SignatureDoesNotMatch", "the signature differs")
    for error in (refused, hidden(refused)):
        assert "permission denied (403 SignatureDoesNotMatch, the signature differs)" in faults.told(error)
        assert "AWS_SECRET_ACCESS_KEY" in faults.told(error)
    assert "permission denied (403)" in faults.told(answered(403, "403"))
    assert faults.told(NoCredentialsError()).startswith("no credentials: ")
    assert faults.told(OSError("broken")) == "OSError: broken"
    assert faults.told(TimeoutError()) == "TimeoutError"


def test_absence() -> None:
    assert faults.is_absent(FileNotFoundError())
    assert faults.is_absent(hidden(answered(404, "NoSuchKey")))
    assert not faults.is_absent(answered(403))
    assert not faults.is_absent(OSError())
