"""Classification of storage errors: permanent or transient, not found or denied, and advice for the user.

Errors are classified by what they carry, not by type, so that storage does not import botocore before S3 is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

import tenacity

from orchestrator.config.redaction import make_printable, redact

T = TypeVar("T")


class SettingError(ValueError):
    """An invalid value in a variable of a store's client; the message begins with the variable's name."""


class _Answer(NamedTuple):
    """A store's answer that caused an error; status 0 when none did. code: S3's alone."""

    status: int = 0
    code: str = ""
    message: str = ""
    region: str = ""  # of the bucket, where S3 names it
    from_s3: bool = False


# A retry cannot mend these; ImportError: the package of a scheme is not installed.
_PERMANENT_ERRORS = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError,
)  # fmt: skip
# botocore's, by name.
_CREDENTIAL_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_CONFIG_ERRORS = {"ParamValidationError", "NoRegionError", "InvalidRegionError", "ConfigParseError"}
# 4xx answers that ask for a retry, or say that a request arrived damaged.
_TRANSIENT_STATUSES = {408, 425, 429}
_TRANSIENT_CODES = {
    "RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequestsException", "ConditionalRequestConflict", "OperationAborted", "IncompleteBody", "BadDigest",
    "XAmzContentSHA256Mismatch",
}  # fmt: skip
_NOT_FOUND_STATUSES = {404, 410}
# For a bucket in another region. botocore then asks that region; when AWS_ENDPOINT_URL leads to one region only, the
# last answer is no more than "Moved Permanently".
_REDIRECT_STATUSES = {301, 307}
_REDIRECT_CODES = {
    "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
}  # fmt: skip
_REGION_ADVICE = "set AWS_DEFAULT_REGION to its region, and AWS_ENDPOINT_URL, if it is set, to an endpoint there"
# For stores without the checksums that AWS clients send since 2025 (Backblaze, s3proxy, older GCS and R2).
_CHECKSUM_ADVICE = (
    "if this store knows no checksum headers, set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
)
_CREDENTIALS_ADVICE = (
    "credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN if they are temporary), "
    "from AWS_PROFILE and the AWS files, or from the machine's role; the endpoint from AWS_ENDPOINT_URL; "
    "a bucket whose requesters pay needs FSSPEC_S3_REQUESTER_PAYS=true"
)


def is_permanent(error: BaseException) -> bool:
    """Return whether a retry cannot succeed."""
    error = unmask_error(error)
    if isinstance(error, _PERMANENT_ERRORS) or type(error).__name__ in _CREDENTIAL_ERRORS | _CONFIG_ERRORS:
        return True
    answer = _find_answer(error)
    if answer.status == HTTPStatus.NOT_IMPLEMENTED or _is_redirected(error, answer):
        return True
    transient = answer.status in _TRANSIENT_STATUSES or answer.code in _TRANSIENT_CODES
    return 400 <= answer.status < 500 and not transient


def get_http_status(error: BaseException) -> int:
    """Return the HTTP status of the store's answer that caused an error, 0 when there was none."""
    return _find_answer(error).status


def is_not_found(error: BaseException) -> bool:
    """Return whether the store answered that there is no such object."""
    error = unmask_error(error)
    return isinstance(error, FileNotFoundError) or get_http_status(error) in _NOT_FOUND_STATUSES


def unmask_error(error: BaseException) -> BaseException:
    """Return the true cause where fsspec's HTTP filesystem raises FileNotFoundError for any failure."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    status = get_http_status(cause)
    unreachable = isinstance(cause, TimeoutError | ConnectionError) or type(cause).__module__.startswith("aiohttp.")
    return cause if (status or unreachable) and status not in _NOT_FOUND_STATUSES else error


def is_object_specific(error: BaseException) -> bool:
    """Return whether an error concerns one object alone, such as a file that this user must not read."""
    cause = error.__cause__ or error
    return isinstance(cause, PermissionError | IsADirectoryError | NotADirectoryError) or get_http_status(cause) == 403


def describe_error(error: BaseException) -> str:
    """Return the printable text of an error without secrets, with advice about credentials, regions and checksums."""
    return redact(make_printable(_describe_unmasked(unmask_error(error)), keep="\n"))


def _describe_unmasked(error: BaseException) -> str:
    answer = _find_answer(error)
    status, code, message = answer.status, answer.code, answer.message
    if isinstance(error, SettingError):
        return str(error)
    if type(error).__name__ in _CREDENTIAL_ERRORS:
        return f"no credentials: {error}: {_CREDENTIALS_ADVICE}"
    if status in (401, 403) and not answer.from_s3:
        return f"permission denied ({status} {message or HTTPStatus(status).phrase})"
    if status in (401, 403):
        # S3 also answers this when an object is missing and the caller may not list the bucket.
        reason = f"{status} {code}" if code not in ("", str(status)) else str(status)
        reason += f", {message}" if message else ""
        return f"permission denied ({reason}), or missing in a bucket that may not be listed: {_CREDENTIALS_ADVICE}"
    if _is_redirected(error, answer):
        reason = f" ({status} {message or code})" if status else ""
        return f"the bucket is in another region{reason}: {_REGION_ADVICE}"
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    if status == HTTPStatus.BAD_REQUEST and answer.region:  # the answer to a HEAD has no code
        return f"{text}: the bucket is in {answer.region}; are the credentials expired? If not, {_REGION_ADVICE}"
    about_checksums = re.search(r"checksum|trailer", f"{code} {message}", re.IGNORECASE)
    if status == HTTPStatus.NOT_IMPLEMENTED or (status == HTTPStatus.BAD_REQUEST and about_checksums):
        return f"{text}: {_CHECKSUM_ADVICE}"
    return text


def _is_redirected(error: BaseException, answer: _Answer) -> bool:
    """Return whether the bucket is in another region; without one in the answer botocore asks again and again."""
    redirected = answer.status in _REDIRECT_STATUSES or answer.code in _REDIRECT_CODES
    return redirected or "maximum recursion depth exceeded" in str(error)


def _find_answer(error: BaseException) -> _Answer:
    """Return the answer that an error, or its cause, carries.

    botocore's ClientError has it as `response`; s3fs hides that in the cause of its own errors. aiohttp's errors have
    `status` and `message`, Azure's `status_code`.
    """
    for source in (error, error.__cause__):
        response: Any = getattr(source, "response", None)
        if isinstance(response, dict) and isinstance(fields := response.get("Error"), dict):
            metadata = response.get("ResponseMetadata", {})
            code, message = str(fields.get("Code", "")), str(fields.get("Message", ""))
            region = str(metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region", ""))
            return _Answer(int(metadata.get("HTTPStatusCode", 0)), code, message, region, from_s3=True)
        for given in (getattr(source, "status", None), getattr(source, "status_code", None)):
            if isinstance(given, int) and 100 <= given < 600:
                return _Answer(given, message=str(getattr(source, "message", "") or ""))
    return _Answer()


def call_with_retries(call: Callable[[], T], attempts: int = 5, first_wait_seconds: float = 0.2) -> T:
    """Return the call's result; retry transient errors with backoff and jitter. Raises the last error."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=first_wait_seconds, max=5.0),
        # tenacity catches BaseException: Ctrl-C and SystemExit must pass.
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not is_permanent(error)),
        reraise=True,
    )(call)
