import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.tracking.events import Event, JournalError, decode_event, encode_event

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
awkward = st.sampled_from(["nan", "inf", "-inf", "\\nan", "\\\\-inf", "\u2028", "\n", "\x85"])
nested = st.recursive(
    scalars | awkward,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), nested, max_size=4), st.none() | st.integers(0))
def test_every_value_survives_a_strict_json_line(values: dict[str, object], samples: int | None) -> None:
    line = encode_event(Event("metrics", 1.5, samples, values))
    assert "\n" not in line and line.isascii()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"bare {name} in JSON"))
    # repr, since nan is not equal to itself
    assert repr(decode_event(line)) == repr(Event("metrics", 1.5, samples, values))


def test_non_finite_floats_are_floats_again() -> None:
    back = decode_event(encode_event(Event("metrics", 0.0, 1, {"loss": math.nan, "norm": -math.inf, "word": "nan"})))
    assert math.isnan(float(str(back.values["loss"])))
    assert back.values["norm"] == -math.inf
    assert back.values["word"] == "nan"


@pytest.mark.parametrize(
    ("values", "words"),
    [({"loss": object()}, "metrics.loss"), ({"a": {"b": [1, {2}]}}, r"a\.b\[1\]"), ({"a": {1: 2}}, "key 1")],
)
def test_values_that_json_cannot_hold_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(JournalError, match=words):
        encode_event(Event("metrics", 0.0, 1, values))
