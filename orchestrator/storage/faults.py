"""What a storage error means: whether a second try can mend it, and what to tell the user.

Errors are told apart by what they carry, not by type, so that storage does not import botocore before S3 is used.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from orchestrator.config.printable import printable


class SettingError(ValueError):
    """A variable of a store's client holds something that cannot be used; the message begins with its name."""


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
_GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
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

# What S3 says of a bucket in another region. botocore asks there then; where AWS_ENDPOINT_URL leads to one region all
# the same, the last answer is no more than "Moved Permanently".
_ELSEWHERE_CODES = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_REGION_HEADER = "x-amz-bucket-region"
# Without that header botocore asks for it, is sent elsewhere again, and so on.
_IN_CIRCLES = "maximum recursion depth exceeded"

_WHICH_REGION = "set AWS_DEFAULT_REGION to its region, and AWS_ENDPOINT_URL, if it is set, to an endpoint there"
# Answered by stores without the checksums that AWS clients send since 2025 (Backblaze, s3proxy, older GCS and R2).
_CHECKSUM_WORDS = ("checksum", "trailer")
_CHECKSUM_FIX = (
    "if this store knows no checksum headers, set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
)
_WHERE_FROM = (
    "credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN if they are temporary), "
    "from AWS_PROFILE and the AWS files, or from the machine's role; the endpoint from AWS_ENDPOINT_URL; "
    "a bucket whose requesters pay needs FSSPEC_S3_REQUESTER_PAYS=true"
)


def is_final(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    error = unmasked(error)
    if isinstance(error, _FINAL) or type(error).__name__ in _NO_CREDENTIALS | _MISCONFIGURED:
        return True
    answered, code, _ = _answer(error)
    if _elsewhere(error) is not None:
        return True
    if answered == HTTPStatus.NOT_IMPLEMENTED:
        return True
    return 400 <= answered < 500 and answered not in _PASSING_STATUS and code not in _PASSING_CODES


def status(error: BaseException) -> int:
    """The HTTP status of the store's answer that caused an error, 0 when there was none."""
    return _answer(error)[0]


def is_absent(error: BaseException) -> bool:
    """Whether the store said that there is no such object."""
    error = unmasked(error)
    return isinstance(error, FileNotFoundError) or status(error) in _GONE


def unmasked(error: BaseException) -> BaseException:
    """Return the true error where fsspec's HTTP filesystem says FileNotFoundError for whatever happened."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    answered = status(cause)
    unreachable = isinstance(cause, TimeoutError | ConnectionError) or type(cause).__module__.startswith("aiohttp.")
    return cause if (answered or unreachable) and answered not in _GONE else error


def is_of_one_object(error: BaseException) -> bool:
    """Whether an error concerns what was asked for alone, such as a file that this user must not read."""
    cause = error.__cause__ or error
    return isinstance(cause, PermissionError | IsADirectoryError | NotADirectoryError) or status(cause) == 403


def told(error: BaseException) -> str:
    """An error in printable words, with what to look at when credentials are missing or refused."""
    return printable(_told(unmasked(error)), keep="\n")


def _told(error: BaseException) -> str:
    answered, code, message = _answer(error)
    if isinstance(error, SettingError):
        return str(error)
    if type(error).__name__ in _NO_CREDENTIALS:
        return f"no credentials: {error}: {_WHERE_FROM}"
    if answered in (401, 403) and not _response(error):
        return f"permission denied ({answered} {message or HTTPStatus(answered).phrase})"
    if answered in (401, 403):
        # S3 answers so, too, when an object is missing and the caller may not list the bucket.
        said = f"{answered} {code}" if code not in ("", str(answered)) else str(answered)
        said += f", {message}" if message else ""
        return f"permission denied ({said}), or missing in a bucket that may not be listed: {_WHERE_FROM}"
    if (region := _elsewhere(error)) is not None:
        where = f"in the region {region}" if region else "in another region"
        said = f" ({answered} {message or code})" if answered else ""
        return f"the bucket is {where}{said}: {_WHICH_REGION}"
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    if answered == HTTPStatus.BAD_REQUEST and (region := _region(error)):  # the answer to a HEAD has no code
        return f"{text}: the bucket is in the region {region}; are the credentials expired? If not, {_WHICH_REGION}"
    doubted = any(words in f"{code} {message}".lower() for words in _CHECKSUM_WORDS)
    if answered == HTTPStatus.NOT_IMPLEMENTED or (answered == HTTPStatus.BAD_REQUEST and doubted):
        return f"{text}: {_CHECKSUM_FIX}"
    return text


def _elsewhere(error: BaseException) -> str | None:
    """The region that the store names as the bucket's; empty when it is another one, None when it is not about that."""
    if _IN_CIRCLES in str(error):
        return ""
    answered, code, _ = _answer(error)
    redirected = answered in (HTTPStatus.MOVED_PERMANENTLY, HTTPStatus.TEMPORARY_REDIRECT)
    return _region(error) if redirected or code in _ELSEWHERE_CODES else None


def _region(error: BaseException) -> str:
    """The bucket's, where the store named it."""
    response = _response(error)
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get(_REGION_HEADER) or response.get("Error", {}).get("Region") or "")


def _answer(error: BaseException) -> tuple[int, str, str]:
    """Status, code and message of the store's answer that caused an error; (0, "", "") when none did.

    botocore's ClientError carries it as `response`; s3fs hides that in the cause of its own errors. aiohttp's errors
    have `status` and `message`, Azure's `status_code`.
    """
    response = _response(error)
    if not response:
        for each in (error, error.__cause__):
            for attribute in ("status", "status_code"):
                answered = getattr(each, attribute, None)
                if isinstance(answered, int) and 100 <= answered < 600:
                    return answered, "", str(getattr(each, "message", "") or "")
        return 0, "", ""
    answered = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(answered), str(response["Error"].get("Code", "")), str(response["Error"].get("Message", ""))


def _response(error: BaseException) -> dict[str, Any]:
    """The store's answer as botocore has it; empty when there was none."""
    for each in (error, error.__cause__):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            return response
    return {}
