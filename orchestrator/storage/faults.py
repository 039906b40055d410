"""What a storage error means: whether a second try can mend it, and what to tell the user.

Errors are told apart by what they carry, not by type, so that storage does not import botocore before S3 is used.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

# What a second try cannot mend.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,  # the package of a scheme is not installed
    ValueError,
)
# botocore's, by name.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_MISCONFIGURED = {"ParamValidationError", "NoRegionError", "InvalidRegionError", "ConfigParseError"}
# Answers of the 4xx kind that ask for patience, or tell that a request came through badly.
_PASSING_STATUS = {408, 425, 429}
_PASSING_CODES = {
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    "ConditionalRequestConflict",
    "OperationAborted",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
}

_WHERE_FROM = (
    "credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN if they are temporary), "
    "from AWS_PROFILE and the AWS files, or from the machine's role; the endpoint from AWS_ENDPOINT_URL"
)


def is_final(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    if isinstance(error, _FINAL) or type(error).__name__ in _NO_CREDENTIALS | _MISCONFIGURED:
        return True
    answered, code, _ = _answer(error)
    return 400 <= answered < 500 and answered not in _PASSING_STATUS and code not in _PASSING_CODES


def status(error: BaseException) -> int:
    """The HTTP status of the store's answer that caused an error, 0 when there was none."""
    return _answer(error)[0]


def is_absent(error: BaseException) -> bool:
    """Whether the store said that there is no such object."""
    return isinstance(error, FileNotFoundError) or status(error) == HTTPStatus.NOT_FOUND


def told(error: BaseException) -> str:
    """An error in words, with what to look at when credentials are missing or refused."""
    answered, code, message = _answer(error)
    if type(error).__name__ in _NO_CREDENTIALS:
        return f"no credentials: {error}: {_WHERE_FROM}"
    if answered in (401, 403):
        # S3 answers so, too, when an object is missing and the caller may not list the bucket.
        said = f"{answered} {code}" if code not in ("", str(answered)) else str(answered)
        said += f", {message}" if message else ""
        return f"permission denied ({said}), or missing in a bucket that may not be listed: {_WHERE_FROM}"
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _answer(error: BaseException) -> tuple[int, str, str]:
    """Status, code and message of the store's answer that caused an error; (0, "", "") when none did.

    botocore's ClientError carries it as `response`; s3fs hides that in the cause of its own errors.
    """
    for each in (error, error.__cause__):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            answered = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(answered), str(response["Error"].get("Code", "")), str(response["Error"].get("Message", ""))
    return 0, "", ""
