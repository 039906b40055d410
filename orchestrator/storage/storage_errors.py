"""What a storage error means: whether a second try can mend it, and what to tell the user.

Errors are told apart by what they carry, not by type, so that storage does not import botocore before S3 is used.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

import tenacity

from orchestrator.config.redaction import make_printable


class SettingError(ValueError):
    """A variable of a store's client holds something that cannot be used; the message begins with its name."""


# What a second try cannot mend.
_PERMANENT_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,  # the package of a scheme is not installed
    ValueError,
)
# botocore's, by name.
_CREDENTIAL_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_CONFIG_ERRORS = {"ParamValidationError", "NoRegionError", "InvalidRegionError", "ConfigParseError"}
# Answers of the 4xx kind that ask for patience, or tell that a request came through badly.
_TRANSIENT_STATUSES = {408, 425, 429}
_NOT_FOUND_STATUSES = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
_TRANSIENT_CODES = {
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

# What S3 says of a bucket in another region. botocore asks there then; where AWS_ENDPOINT_URL leads to one region all
# the same, the last answer is no more than "Moved Permanently".
_REDIRECT_CODES = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_REGION_HEADER = "x-amz-bucket-region"
# Without that header botocore asks for it, is sent elsewhere again, and so on.
_REDIRECT_LOOP_TEXT = "maximum recursion depth exceeded"

_REGION_ADVICE = "set AWS_DEFAULT_REGION to its region, and AWS_ENDPOINT_URL, if it is set, to an endpoint there"
# Answered by stores without the checksums that AWS clients send since 2025 (Backblaze, s3proxy, older GCS and R2).
_CHECKSUM_WORDS = ("checksum", "trailer")
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
    """Whether trying again is of no use."""
    error = unmask_error(error)
    if isinstance(error, _PERMANENT_ERRORS) or type(error).__name__ in _CREDENTIAL_ERRORS | _CONFIG_ERRORS:
        return True
    answered, code, _ = _parse_response(error)
    if _find_redirect_region(error) is not None:
        return True
    if answered == HTTPStatus.NOT_IMPLEMENTED:
        return True
    return 400 <= answered < 500 and answered not in _TRANSIENT_STATUSES and code not in _TRANSIENT_CODES


def get_http_status(error: BaseException) -> int:
    """The HTTP status of the store's answer that caused an error, 0 when there was none."""
    return _parse_response(error)[0]


def is_not_found(error: BaseException) -> bool:
    """Whether the store said that there is no such object."""
    error = unmask_error(error)
    return isinstance(error, FileNotFoundError) or get_http_status(error) in _NOT_FOUND_STATUSES


def unmask_error(error: BaseException) -> BaseException:
    """Return the true error where fsspec's HTTP filesystem says FileNotFoundError for whatever happened."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    answered = get_http_status(cause)
    unreachable = isinstance(cause, TimeoutError | ConnectionError) or type(cause).__module__.startswith("aiohttp.")
    return cause if (answered or unreachable) and answered not in _NOT_FOUND_STATUSES else error


def is_object_specific(error: BaseException) -> bool:
    """Whether an error concerns what was asked for alone, such as a file that this user must not read."""
    cause = error.__cause__ or error
    return isinstance(cause, PermissionError | IsADirectoryError | NotADirectoryError) or get_http_status(cause) == 403


def describe_error(error: BaseException) -> str:
    """An error in printable words, with what to look at when credentials are missing or refused."""
    return make_printable(_describe_unmasked(unmask_error(error)), keep="\n")


def _describe_unmasked(error: BaseException) -> str:
    answered, code, message = _parse_response(error)
    if isinstance(error, SettingError):
        return str(error)
    if type(error).__name__ in _CREDENTIAL_ERRORS:
        return f"no credentials: {error}: {_CREDENTIALS_ADVICE}"
    if answered in (401, 403) and not _find_response(error):
        return f"permission denied ({answered} {message or HTTPStatus(answered).phrase})"
    if answered in (401, 403):
        # S3 answers so, too, when an object is missing and the caller may not list the bucket.
        said = f"{answered} {code}" if code not in ("", str(answered)) else str(answered)
        said += f", {message}" if message else ""
        return f"permission denied ({said}), or missing in a bucket that may not be listed: {_CREDENTIALS_ADVICE}"
    if (region := _find_redirect_region(error)) is not None:
        where = f"in the region {region}" if region else "in another region"
        said = f" ({answered} {message or code})" if answered else ""
        return f"the bucket is {where}{said}: {_REGION_ADVICE}"
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    if answered == HTTPStatus.BAD_REQUEST and (region := _get_region(error)):  # the answer to a HEAD has no code
        return f"{text}: the bucket is in the region {region}; are the credentials expired? If not, {_REGION_ADVICE}"
    doubted = any(words in f"{code} {message}".lower() for words in _CHECKSUM_WORDS)
    if answered == HTTPStatus.NOT_IMPLEMENTED or (answered == HTTPStatus.BAD_REQUEST and doubted):
        return f"{text}: {_CHECKSUM_ADVICE}"
    return text


def _find_redirect_region(error: BaseException) -> str | None:
    """The region that the store names as the bucket's; empty when it is another one, None when it is not about that."""
    if _REDIRECT_LOOP_TEXT in str(error):
        return ""
    answered, code, _ = _parse_response(error)
    redirected = answered in (HTTPStatus.MOVED_PERMANENTLY, HTTPStatus.TEMPORARY_REDIRECT)
    return _get_region(error) if redirected or code in _REDIRECT_CODES else None


def _get_region(error: BaseException) -> str:
    """The bucket's, where the store named it."""
    response = _find_response(error)
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get(_REGION_HEADER) or response.get("Error", {}).get("Region") or "")


def _parse_response(error: BaseException) -> tuple[int, str, str]:
    """Status, code and message of the store's answer that caused an error; (0, "", "") when none did.

    botocore's ClientError carries it as `response`; s3fs hides that in the cause of its own errors. aiohttp's errors
    have `status` and `message`, Azure's `status_code`.
    """
    response = _find_response(error)
    if not response:
        for each in (error, error.__cause__):
            for attribute in ("status", "status_code"):
                answered = getattr(each, attribute, None)
                if isinstance(answered, int) and 100 <= answered < 600:
                    return answered, "", str(getattr(each, "message", "") or "")
        return 0, "", ""
    answered = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(answered), str(response["Error"].get("Code", "")), str(response["Error"].get("Message", ""))


def _find_response(error: BaseException) -> dict[str, Any]:
    """The store's answer as botocore has it; empty when there was none."""
    for each in (error, error.__cause__):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            return response
    return {}


T = TypeVar("T")


def call_with_retries(call: Callable[[], T], attempts: int = 5, first_wait_seconds: float = 0.2) -> T:
    """The call's result; transient errors are retried with exponential backoff and jitter.

    Raises the last error when all attempts failed, and at once when a retry cannot help.
    """
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=first_wait_seconds, max=5.0),
        # tenacity catches BaseException: Ctrl-C and SystemExit must pass.
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not is_permanent(error)),
        reraise=True,
    )(call)
