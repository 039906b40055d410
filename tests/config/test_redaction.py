"""Text that people see."""

import pytest

from orchestrator.config.redaction import find_credentials_problem, make_printable, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host:5000/a", "http://host:5000/a"),
        ("https://token@host/a", "https://host/a"),
        ("s3://KEY:SEC/RET@bucket/a", "s3://bucket/a"),
        ("http://user:p@ss/word@host/a", "http://host/a"),
        ("http://user:?#@host/a", "http://host/a"),
        ("https://[user:PW@host", "https://host"),
        ("https://[user:PW", "https://[user:***"),
        ("https://user:PW", "https://user:***"),
        ("https://host:9000/a@b?c", "https://host:9000/a@b"),
        ("https://[::1]:9000/a@b", "https://[::1]:9000/a@b"),
        (
            "got http://h:5000: then http://h:5000, (http://[::1]:1) http://h: http://HOST:PORT",
            "got http://h:5000: then http://h:5000, (http://[::1]:1) http://h: http://HOST:PORT",
        ),
        ("https://u:PW/9000/x@host/a", "https://host/a"),
        ("https://proxy:9000/http://u:PW@host/a", "https://host/a"),
        ("s3://KEY:9000/PW@bucket/a", "s3://bucket/a"),
        ("https://host/a?X-Amz-Signature=PW#PW", "https://host/a"),
        ("http://u:PW@host:5000/#/experiments/1/runs/2?x=PW", "http://host:5000/#/experiments/1/runs/2"),
        ("postgresql+psycopg2://u:PW@db/m?password=PW", "postgresql+psycopg2://db/m"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("s3://bucket/a?b#c@d", "s3://bucket/a?b#c@d"),
        ("/plain/a?b#c@d", "/plain/a?b#c@d"),
        ("models:/name@champion", "models:/name@champion"),
        ('Invalid bucket name "KEY:PW@bucket": must match', 'Invalid bucket name "***@bucket": must match'),
        ("<style>a{b:c}@media print{x:y}</style>", "<style>a{b:c}@media print{x:y}</style>"),
        ('{"key":"a@b","other":"c@d"}', '{"key":"a@b","other":"c@d"}'),
        ("cannot read http://u:PW@h/x: then 'http://u:PW@h/y'", "cannot read http://h/x: then 'http://h/y'"),
        ("at 12:30 by a@b.org", "at 12:30 by a@b.org"),
        ("got 's3:/KEY:SEC/PW@bucket/a'", "got 's3:/bucket/a'"),
        ("such as /work/s3:KEY:PW@bucket", "such as /work/s3:bucket"),
    ],
)
def test_no_credentials(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_characters_that_steer_a_terminal_are_escaped() -> None:
    assert make_printable("a\x1b[2Jb\x07\r\n\x9b\x7f") == r"a\x1b[2Jb\x07\x0d\x0a\x9b\x7f"
    assert make_printable("a\u202eb\udce9") == r"a\u202eb\udce9"
    assert make_printable("एक 👩\u200d🚀 é e\u0301") == "एक 👩\u200d🚀 é e\u0301"
    assert make_printable("a\nb", keep="\n") == "a\nb"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:pa/ss@bucket/a", "s3://bucket/a;"),
        ("s3a://KEY@bucket", "s3a://bucket;"),
        ("https://[user:pa@ss#?/'<>` @host/a", "https://host/a;"),
        ("  HTTP://u:pa ss@host", "HTTP://host;"),
        ("gs://u:pa@ss@bucket", "gs://bucket;"),
        ('["https://a/b", "https://u:pass@host/c"]', 'https://host/c"];'),
        ("https://u:pa@ss@h\x1b[2J", "https://h\\x1b[2J;"),
        # Digits and a slash after the name of a host are its port; of a bucket's key, and with letters, a password.
        ("s3://KEY:9000/pa@bucket/a", "s3://bucket/a;"),
        ("https://user:9pa/9000@host/a", "https://host/a;"),
        (f"https://user:{9000}@host/a@b", "https://b;"),
    ],
)
def test_a_place_with_credentials_is_rejected_without_showing_them(text: str, shown: str) -> None:
    reason = find_credentials_problem(text, "--data")
    assert reason is not None
    assert reason.startswith("--data: must be a URL without user name and password, got one with them for " + shown)
    assert "pa" not in reason.replace("part", "").replace("path", "").replace("password", "")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b",
        "https://h/@me/a.jpg",
        "/plain/u:p@h",
        "models:/name@champion",
        "https://h/a?b=c@d",
        "a:b@c",
        "https://host:9000/a@b",
        "http://[::1]:9000/a@b",
        "https://host:9000/x/u:p@h",
    ],
)
def test_a_place_without_credentials_is_taken(text: str) -> None:
    assert find_credentials_problem(text, "--data") is None
