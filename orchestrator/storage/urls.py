"""URLs of places that hold bytes: local paths (absolute) and anything fsspec can open.

In file: and http: URLs names are percent-encoded (RFC 8089, RFC 3986); in plain paths and in the URLs of object stores
every character stands for itself. The functions here convert.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote

from orchestrator.config.errors import ConfigError
from orchestrator.config.redaction import find_credentials_problem, redact

# A scheme has at least two letters, so that a Windows drive is no scheme.
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
# s3:/bucket, s3:bucket, S3//bucket, s3:///bucket: not a colon and two slashes between the scheme and a name.
_MISSPELT_SCHEME = re.compile(
    r"^(s3a?|gs|gcs|az|abfss?|hdfs|https?|file)(:/?(?!/)|//)|^(s3a?|gs|gcs|abfss?|https?):///", re.IGNORECASE
)
_WEB_SCHEMES = frozenset({"http", "https"})
_ENCODED_SCHEMES = _WEB_SCHEMES | {"file"}  # schemes of URLs whose names are percent-encoded
_LOCAL_HOST = re.compile(r"^localhost(?=/)", re.IGNORECASE)


def get_scheme(url: str) -> str:
    """Return the scheme of a URL, "file" for plain paths."""
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else "file"


def is_local(url: str) -> bool:
    """Return True for plain paths and file:// URLs."""
    return get_scheme(url) == "file"


def is_web(url: str) -> bool:
    """Return whether a URL names a page or file of a web server, which can be read and usually not listed."""
    return get_scheme(url) in _WEB_SCHEMES


def to_local_path(url: str) -> str:
    """Return the path of a local URL. Raises ValueError for any other URL."""
    if not is_local(url):
        raise ValueError(f"must be a local path, got {redact(url)}")
    path = _SCHEME.sub("", url)
    return url if path == url else unquote(_LOCAL_HOST.sub("", path), errors="surrogateescape")


def to_file_url(path: str) -> str:
    """Return the file: URL of an absolute local path, percent-encoded."""
    return "file://" + quote(path, errors="surrogateescape")


def normalize_scheme(url: str) -> str:
    """Return the URL with its scheme in small letters, as fsspec takes it."""
    return _SCHEME.sub(lambda match: match.group(0).lower(), url)


def join(url: str, *parts: str) -> str:
    """Return a URL below another one; parts are relative, joined by single slashes."""
    joined = _strip_trailing_slash(url)
    for part in parts:
        if part.startswith("/") or _SCHEME.match(part):
            raise ValueError(f"what is joined to {redact(url)} must be relative, got {part!r}")
        if piece := part.strip("/"):
            slash = "" if joined.endswith("/") else "/"
            joined += slash + (quote(piece, errors="surrogateescape") if _is_encoded(url) else piece)
    return joined


def _strip_trailing_slash(url: str) -> str:
    """Return the URL without slashes at its end, except those of a root: "/", "memory://", "file:///"."""
    match = _SCHEME.match(url)
    prefix = match.group(0) if match else ""
    rest = url[len(prefix) :]
    return prefix + (rest.rstrip("/") or rest[:1])


def get_basename(url: str) -> str:
    """Return the last component of a URL, decoded."""
    last = url.rstrip("/").rsplit("/", 1)[-1]
    return unquote(last, errors="surrogateescape") if _is_encoded(url) else last


def _is_encoded(url: str) -> bool:
    return bool(_SCHEME.match(url)) and get_scheme(url) in _ENCODED_SCHEMES


def require_absolute(url: str, field: str) -> str:
    """Return the URL with ~ expanded. Raises ConfigError for a relative path, or a URL with a user name or password.

    A submitted job runs in a temporary copy of its working directory: files at a relative path would vanish with it.
    """
    if (reason := find_credentials_problem(url, field)) is not None:
        raise ConfigError(reason)
    if (match := _MISSPELT_SCHEME.match(url)) is not None:
        scheme = (match[1] or match[3]).lower()
        fixed = scheme + (":///" if scheme == "file" else "://") + url[match.end() :].lstrip("/")
        raise ConfigError(f"{field}: {redact(url)!r} must have two slashes after its scheme; give {redact(fixed)!r}")
    if not is_local(url):
        return _strip_trailing_slash(normalize_scheme(url))
    path = os.path.expanduser(to_local_path(url))
    if path.startswith("~"):
        why = "begins with a home folder, and there is none: HOME is unset, or passwd lacks that user"
        raise ConfigError(f"{field}: {url!r} {why}; give an absolute path or a URL")
    if not os.path.isabs(path):
        absolute = f"an absolute path such as {os.path.abspath(path)!r}"
        if is_in_submitted_job():  # the folder that this process sees vanishes with the job
            absolute = "the absolute path of a folder on the cluster's nodes"
        raise ConfigError(
            f"{field}: {url!r} is a relative path, which would vanish with the job's temporary working directory; "
            f"give {absolute} or a URL"
        )
    # POSIX lets two slashes at the start mean something else; on Linux they do not.
    return re.sub(r"^//+", "/", os.path.normpath(path))


def is_in_submitted_job() -> bool:
    """Return whether this process was started by Ray's job server, in a temporary copy of the working directory."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
