"""Patterns as shells and WebDataset know them."""

import pytest
from webdataset.shardlists import expand_urls

from orchestrator.data.build.shard_patterns import FolderSizes, expand_braces, match_shards
from orchestrator.storage import file_io


@pytest.mark.parametrize(
    "pattern",
    ["a.tar", "a-{000000..000012}.tar", "{a,bb,}-{8..11}.tar", "{x,y}/{00..02}/t-{0..1}.tar"],
)
def test_braces_expand_as_webdataset_expands_them(pattern: str) -> None:
    assert sorted(expand_braces(pattern, "train")) == sorted(expand_urls(pattern))


def test_the_order_is_that_of_the_pattern() -> None:
    assert expand_braces("{b,a}-{9..10}.tar", "train") == ["b-9.tar", "b-10.tar", "a-9.tar", "a-10.tar"]


def test_globs_look_into_folders_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.tar", "a/2.tar", "a/2.tar.index.json", "b/1.tar", "b/x.txt", "info.json"):
        file_io.write_bytes(f"memory://names/{name}", b"x")
    listed = []
    sizes = file_io.list_sizes
    monkeypatch.setattr(file_io, "list_sizes", lambda url: listed.append(url) or sizes(url))  # type: ignore[func-returns-value]
    folders = FolderSizes("memory://names")
    assert match_shards(folders, "{b,a}/*.tar*", "train") == ("b/1.tar", "a/1.tar", "a/2.tar")
    assert match_shards(folders, "a/[2-9].tar", "train") == ("a/2.tar",)
    assert match_shards(folders, "a/?.tar", "train") == ("a/1.tar", "a/2.tar")
    assert sorted(listed) == ["memory://names/a", "memory://names/b"]
