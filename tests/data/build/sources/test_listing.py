"""Keys from names, listings sorted by key, and shares held out by hashes of keys."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.build import tar_writer
from orchestrator.data.build.shard_scan import index_tar
from orchestrator.data.build.sources import listing
from orchestrator.data.build.sources.listing import ImageRow, SourceListing
from orchestrator.data.build.tar_writer import RawSample, encode_tar
from orchestrator.data.data_errors import DataError


def rows(per_class: list[int]) -> list[ImageRow]:
    return [
        ImageRow(f"c{c}/{n:04d}", f"c{c}/{n:04d}.jpg", c, 0, 100)
        for c, size in enumerate(per_class)
        for n in range(size)
    ]


# ------------------------------------------------------------------ keys
@pytest.mark.parametrize(
    ("name", "key"),
    [("n01/n01_1.JPEG", "n01/n01_1"), ("a.b.c.jpg", "a_b_c"), ("/etc/passwd.png", "etc/passwd"),
     ("../../x.jpg", "x"), ("a/./../b.jpg", "a/b"), ("001.Albatross/a b.jpg", "001.Albatross/a_b"),
     ("图/é.png", "图/é"), ("bad\udcff.jpg", "bad_"), ("new\nline\\.jpg", "new_line_"), ("..", "_"), ("", "_"),
     ("noextension", "noextension"), (".jpg", "_jpg"), ("a//b.jpg", "a/b")],
)  # fmt: skip
def test_keys_of_names(name: str, key: str) -> None:
    assert listing.make_key(name) == key


@given(st.text(st.characters(exclude_categories=()), max_size=40))
def test_every_key_comes_back_from_a_tar(name: str) -> None:
    key = listing.make_key(name)
    list(tar_writer._check_samples([tar_writer.RawSample(key, b"", 0)], 1))
    assert index_tar(encode_tar([RawSample(key, b"image", 3)]), "x.tar").keys == (key,)


# ------------------------------------------------------------------ listings
def test_a_listing_is_sorted_by_key_whatever_came_first() -> None:
    made = rows([3, 2])
    one, other = listing.build_split_listing("/x", False, made), listing.build_split_listing("/y", False, made[::-1])
    assert tuple(one.keys) == tuple(other.keys) == tuple(row.key for row in made)
    assert one.labels.tolist() == [0, 0, 0, 1, 1]
    digests = {SourceListing(("a", "b"), (), {"train": split}, {}).digest() for split in (one, other)}
    assert len(digests) == 1, "the place is no part of it"


def test_another_label_length_or_key_is_another_listing() -> None:
    def digest(*made: ImageRow) -> str:
        return SourceListing(("a", "b"), (), {"train": listing.build_split_listing("/x", False, made)}, {}).digest()

    a = ImageRow("k", "k.jpg", 0, 0, 100)
    others = (a, a._replace(label=1), a._replace(length=101), a._replace(key="l"))
    assert len({digest(row) for row in others}) == 4


def test_two_images_of_one_key_are_refused_by_name() -> None:
    pair = [ImageRow("a", "a.jpg", 0, 0, 1), ImageRow("b", "b.jpg", 0, 0, 1), ImageRow("a", "a.png", 1, 0, 1)]
    with pytest.raises(DataError, match=r"'a\.jpg' and 'a\.png' would both get the key 'a'"):
        listing.build_split_listing("/x", False, pair)


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="/x: no images there"):
        listing.build_split_listing("/x", False, [])


# ------------------------------------------------------------------ holding out
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.sampled_from([0.05, 0.1, 0.5, 0.95]))
def test_each_class_gives_its_share_and_keeps_an_image(sizes: list[int], share: float) -> None:
    whole = listing.build_split_listing("/x", False, rows(sizes))
    train, held = listing.hold_out(whole, share)
    assert sorted([*train.keys, *held.keys]) == list(whole.keys)
    for label, size in enumerate(sizes):
        count = int((held.labels == label).sum())
        assert count <= size - 1
        assert abs(count - size * share) <= 0.5 or count == size - 1
    for part in (train, held):
        assert list(part.keys) == sorted(part.keys)
        assert [key.partition("/")[0] for key in part.keys] == [f"c{label}" for label in part.labels]


def test_who_is_held_out_does_not_depend_on_the_other_classes() -> None:
    alone = listing.hold_out(listing.build_split_listing("/x", False, rows([50])), 0.2)[1]
    beside = listing.hold_out(listing.build_split_listing("/x", False, rows([50, 30, 7])), 0.2)[1]
    assert list(alone.keys) == [key for key in beside.keys if key.startswith("c0/")]
    assert Counter(np.diff([int(key[-4:]) for key in alone.keys])).most_common(1)[0][1] < 9, "no regular choice"
