"""JSON that others wrote."""

import pytest

from orchestrator.config.json_text import parse_json, parse_object


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b"-Infinity", "-Infinity is no finite number"),
        (b'{"a": "\xe9"}', "not UTF-8"),
        (b"9" * 5000, "no finite number"),
        (b"1e999", "no finite number"),
        (b"9" * 400, "no finite number"),
        (b"{", "Expecting"),
    ],
)
def test_whatever_is_wrong_is_one_value_error(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(data)


def test_an_object() -> None:
    assert parse_object('{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        parse_object("[]")
