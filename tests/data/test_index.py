"""Keys in one piece of memory behave as a tuple of strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.index import KeyColumn, compute_checksum

# Names of members that are no valid UTF-8 come with lone surrogates.
TEXTS = st.lists(st.text(st.characters(exclude_categories=()), max_size=9), max_size=9)


@given(TEXTS)
def test_keys_are_a_sequence_of_strings(texts: list[str]) -> None:
    keys = KeyColumn(texts)
    assert (len(keys), list(keys), tuple(keys)) == (len(texts), texts, tuple(texts))
    assert [keys[at] for at in range(len(keys))] == texts
    assert keys.compute_hashes().tolist() == [compute_checksum(text.encode("utf-8", "surrogatepass")) for text in texts]


def test_no_other_keys() -> None:
    keys = KeyColumn(["a", "bc"])
    for number in (2, -1):
        with pytest.raises(IndexError, match=f"key {number} of 2"):
            keys[number]
