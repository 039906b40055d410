"""manifest.json: complete or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import manifest
from orchestrator.data.errors import DataError
from orchestrator.data.packer import RawSample
from tests.support import shards


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    shards.dataset(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(packed: Path) -> None:
    found = manifest.load(str(packed))
    manifest.save(str(packed), found)
    assert manifest.load(str(packed)) == found
    assert (found.samples("train"), found.samples("validation")) == (13, 5)
    assert [shard.samples for shard in found.shards("train")] == [4, 4, 4, 1]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}/manifest.json: no manifest there"):
        manifest.load(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "{}", "\xff", '{"name": "x"}'])
def test_damaged(packed: Path, text: str) -> None:
    (packed / manifest.NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest.json: damaged: .*pack the dataset again"):
        manifest.load(str(packed))


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_other_versions(packed: Path, version: object) -> None:
    rewrite(packed, format_version=version)
    with pytest.raises(DataError, match=rf"format version {version!r}; this code reads version 2"):
        manifest.load(str(packed))


def test_unknown_and_impossible_keys(packed: Path) -> None:
    rewrite(packed, clases=["a"])
    with pytest.raises(DataError, match=r"manifest.json: damaged: .*clases"):
        manifest.load(str(packed))


def test_without_a_version(packed: Path) -> None:
    path = packed / manifest.NAME
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "format_version"}))
    with pytest.raises(DataError, match=r"manifest.json: damaged: KeyError\('format_version'\)"):
        manifest.load(str(packed))


def test_wrong_values_are_named(packed: Path) -> None:
    splits = json.loads((packed / manifest.NAME).read_text())["splits"]
    splits["train"][2]["samples"] = -4
    rewrite(packed, splits=splits)
    with pytest.raises(DataError, match=r"damaged: splits\.train\.2\.samples: .*at least 0"):
        manifest.load(str(packed))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.tar", "a/../../x.tar", "s3://other/x.tar", ""])
def test_shards_elsewhere_are_refused(packed: Path, name: str) -> None:
    splits = json.loads((packed / manifest.NAME).read_text())["splits"]
    splits["train"][0]["name"] = name
    rewrite(packed, splits=splits)
    with pytest.raises(DataError, match=rf"shard '{name}' is refused: it must be a path below the dataset's folder"):
        manifest.load(str(packed))


def test_one_class_is_none(packed: Path) -> None:
    rewrite(packed, classes=["a"])
    with pytest.raises(DataError, match="classes"):
        manifest.load(str(packed))


def test_unknown_split(packed: Path) -> None:
    with pytest.raises(DataError, match=r"tiny: no split 'test'; it has train, validation"):
        manifest.load(str(packed)).shards("test")


def test_digest_knows_the_content_not_the_place(tmp_path: Path) -> None:
    here, there = shards.dataset(tmp_path / "a"), shards.dataset(tmp_path / "b")
    other = shards.dataset(tmp_path / "c", train=12)
    assert here.digest() == there.digest() != other.digest()
    # A label is in no manifest, yet it changes the shard's checksum.
    relabelled = [RawSample(s.key, s.image, (s.label + 1) % 3) for s in shards.samples(13)]
    assert shards.dataset(tmp_path / "d", relabelled).digest() != here.digest()
