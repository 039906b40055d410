"""Text that people see."""

import pytest

from orchestrator.config.printable import printable, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host:5000/a", "http://host:5000/a"),
        ("https://token@host/a", "https://host/a"),
        ("s3://KEY:SEC/RET@bucket/a", "s3://bucket/a"),
        ("http://user:p@ss/word@host/a", "http://host/a"),
        ("http://user:?#@host/a", "http://host/a"),
        ("https://[user:PW@host", "https://host"),
        ("https://[user:PW", "https://[user:PW"),
        ("https://host/a?X-Amz-Signature=PW#PW", "https://host/a"),
        ("postgresql+psycopg2://u:PW@db/m?password=PW", "postgresql+psycopg2://db/m"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("s3://bucket/a?b#c@d", "s3://bucket/a?b#c@d"),
        ("/plain/a?b#c@d", "/plain/a?b#c@d"),
        ("models:/name@champion", "models:/name@champion"),
        ('Invalid bucket name "KEY:PW@bucket": must match', 'Invalid bucket name "bucket": must match'),
        ("cannot read http://u:PW@h/x: then 'http://u:PW@h/y'", "cannot read http://h/x: then 'http://h/y'"),
        ("at 12:30 by a@b.org", "at 12:30 by a@b.org"),
    ],
)
def test_no_credentials(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_characters_that_steer_a_terminal_are_escaped() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\x9b\x7f") == r"a\x1b[2Jb\x07\x0d\x0a\x9b\x7f"
    assert printable("a\u202eb\udce9") == r"a\u202eb\udce9"
    assert printable("एक 👩\u200d🚀 é e\u0301") == "एक 👩\u200d🚀 é e\u0301"
    assert printable("a\nb", keep="\n") == "a\nb"
