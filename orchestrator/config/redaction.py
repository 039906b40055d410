"""Redaction: text for people, without credentials and without characters that control a terminal."""

from __future__ import annotations

import re
import unicodedata

# In these "?" and "#" are letters of a name unless NAME=VALUE follows; in every other URL they begin a query.
_QUERYLESS_SCHEMES = ("file", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "hdfs")

# A port may follow the host of these. URLs of object stores have a bucket there, without a port.
_WITH_PORT = ("http", "https", "hdfs", "webhdfs")
_HOST_AND_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5}/(?!.*://)", re.DOTALL)
# In a web address without "@", what stands in the place of a port and is none: a password whose rest is missing.
_NO_PORT = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|(?!\[[0-9A-Fa-f:.]+\])[^:/?#]*):(?!\d{1,5}(?:\W|$)|\W*$|port\b)[^/?#]*", re.IGNORECASE
)

# Bounded: an unbounded search takes time that grows with the square of the text.
_SCHEME = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{1,40})://"
_URL = re.compile(rf"{_SCHEME}(?P<rest>[^\s\"'`<>]*)")
# In s3:KEY:SECRET@bucket and s3:/KEY:SECRET@bucket, which lack slashes, everything before the last "@".
_MISSPELT_URL = re.compile(
    r"(?<![A-Za-z0-9+.-])(?P<start>(?:s3a?|gs|gcs|az|abfss?|hdfs|https?|ftp):/?)(?!/)"
    r"[^\s\"'`<>:@/]{1,1000}:[^\s\"'`<>]{0,1000}@",
    re.IGNORECASE,
)
# KEY:SECRET@bucket as libraries repeat it, without a scheme; models:/name@alias is MLflow's and no secret.
_BARE_CREDENTIALS = re.compile(r"(?<![^\s\"'`=(])[^\s\"'`<>:@/=(]{1,1000}:(?!/)[^\s\"'`<>@{}();,]{1,1000}@(?=[\w.\[-])")
# Separators, format characters (bidirectional overrides among them) that change what other characters look like.
_CONTROL_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
_BIDI_CHARACTERS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


def redact(text: str) -> str:
    """Return a text, or a URL, without user names, passwords and queries in any URL that it holds.

    A password may hold "/", "?", "#" or "@" that should have been quoted: when a colon stands before the first
    slash, everything up to the last "@" counts as credentials, but for HOST:PORT/ of a web address. Never raises.
    """
    return _BARE_CREDENTIALS.sub("***@", _MISSPELT_URL.sub(r"\g<start>", _URL.sub(_redact_url, text)))


def make_printable(text: str, *, keep: str = "") -> str:
    """Return `redact(text)` with control characters and direction marks escaped, but for those in `keep`."""
    text = redact(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape_character(character) if character not in keep else character for character in text)


def find_credentials_problem(text: str, name: str) -> str | None:
    """Return the error for a text with a URL that holds a user name or password; None when it holds none.

    Every user of the machine sees a command line (`ps`), Ray stores it, and records store URLs. So credentials must
    come from where each library looks for them. name: the flag, argument or variable that holds the text.
    """
    for match in re.finditer(_SCHEME, text):
        rest = text[match.end() :]
        if end := find_credentials_end(rest, match["scheme"]):
            shown = make_printable(f"{match['scheme']}://{rest[end:]}")
            return (
                f"{name}: must be a URL without user name and password, got one with them for {shown}; give them by "
                "AWS_PROFILE, ~/.netrc or the environment of the store's client, and write an @ of the path as %40"
            )
    return None


def find_credentials_end(rest: str, scheme: str) -> int:
    """Return the position after the credentials in what follows "scheme://"; 0 when there are none.

    A name and up to five digits before the first slash are a host and its port: "@" is a letter of the path then.
    """
    if scheme.lower() in _WITH_PORT and _HOST_AND_PORT.match(rest):
        return 0
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if ":" in authority and "@" in rest:
        return rest.rindex("@") + 1
    return authority.rindex("@") + 1 if "@" in authority else 0


def _redact_url(match: re.Match[str]) -> str:
    scheme, rest = match["scheme"].lower(), match["rest"]
    end = find_credentials_end(rest, scheme)
    rest = rest[end:]
    if not end and scheme in ("http", "https") and (match_password := _NO_PORT.match(rest)) is not None:
        rest = f"{match_password['host']}:***{rest[match_password.end() :]}"
    # "#/" begins a page of MLflow or Ray, not a secret.
    query = r"[?#](?=[\w.-]+=)" if scheme in _QUERYLESS_SCHEMES else r"\?|#(?!/)"
    rest = re.split(query, rest, maxsplit=1)[0]
    return f"{match['scheme']}://{rest}"


def _escape_character(character: str) -> str:
    if unicodedata.category(character) in _CONTROL_CATEGORIES or character in _BIDI_CHARACTERS:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character
