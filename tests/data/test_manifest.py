"""A manifest is complete, or an error names it."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import manifest
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.data_errors import DataError
from tests.support import tiny_shards


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    tiny_shards.dataset(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / manifest.FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(packed: Path) -> None:
    found = manifest.load(str(packed))
    manifest.save(str(packed), found)
    assert manifest.load(str(packed)) == found
    assert (found.count_samples("train"), found.count_samples("validation")) == (13, 5)
    assert [shard.samples for shard in found.shards("train")] == [4, 4, 4, 1]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}/manifest.json: no manifest there"):
        manifest.load(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "{}", "\xff", '{"name": "x"}'])
def test_damaged(packed: Path, text: str) -> None:
    (packed / manifest.FILE_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest.json: damaged, .*pack the dataset again"):
        manifest.load(str(packed))


def test_damaged_json_is_called_so(packed: Path) -> None:
    (packed / manifest.FILE_NAME).write_text('{"format_version": 2, "name"')
    with pytest.raises(DataError, match=r"damaged, .*: Invalid JSON: EOF .*pack the dataset again"):
        manifest.load(str(packed))


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_other_versions(packed: Path, version: object) -> None:
    rewrite(packed, format_version=version)
    with pytest.raises(DataError, match=r"of another version: format_version: must be one of 2, got "):
        manifest.load(str(packed))


def test_unknown_and_impossible_keys(packed: Path) -> None:
    rewrite(packed, clases=["a"])
    with pytest.raises(DataError, match=r"manifest.json: damaged, .*clases"):
        manifest.load(str(packed))


def test_without_a_version(packed: Path) -> None:
    path = packed / manifest.FILE_NAME
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "format_version"}))
    with pytest.raises(DataError, match=r"manifest.json: damaged, .*format_version: needed"):
        manifest.load(str(packed))


def test_wrong_values_are_named(packed: Path) -> None:
    splits = json.loads((packed / manifest.FILE_NAME).read_text())["splits"]
    splits["train"][2]["samples"] = -4
    rewrite(packed, splits=splits)
    with pytest.raises(DataError, match=r"version: splits\.train\.2\.samples: .*at least 0"):
        manifest.load(str(packed))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.tar", "a/../../x.tar", "s3://other/x.tar", ""])
def test_a_shard_outside_the_dataset_is_an_error(packed: Path, name: str) -> None:
    splits = json.loads((packed / manifest.FILE_NAME).read_text())["splits"]
    splits["train"][0]["name"] = name
    rewrite(packed, splits=splits)
    with pytest.raises(DataError, match=rf"shard must be a path below the dataset's folder, got '{name}'"):
        manifest.load(str(packed))


def test_one_class_is_an_error(packed: Path) -> None:
    rewrite(packed, classes=["a"])
    with pytest.raises(DataError, match="classes"):
        manifest.load(str(packed))


def test_unknown_split(packed: Path) -> None:
    with pytest.raises(DataError, match=r"tiny: no split 'test'; it has train, validation"):
        manifest.load(str(packed)).shards("test")


def test_digest_knows_the_content_not_the_place(tmp_path: Path) -> None:
    here, there = tiny_shards.dataset(tmp_path / "a"), tiny_shards.dataset(tmp_path / "b")
    other = tiny_shards.dataset(tmp_path / "c", train=12)
    assert here.digest() == there.digest() != other.digest()
    # A label is in no manifest, yet it changes the shard's checksum.
    relabelled = [RawSample(s.key, s.image, (s.label + 1) % 3) for s in tiny_shards.samples(13)]
    assert tiny_shards.dataset(tmp_path / "d", relabelled).digest() != here.digest()


# ------------------------------------------------------------------ tars elsewhere
@pytest.mark.parametrize(
    ("tars", "url", "elsewhere"),
    [("", "s3://bucket/data", False),
     ("s3://bucket/data", "s3://bucket/data", False), ("s3://bucket/data/tars", "s3://bucket/data/", False),
     ("s3://bucket/data2", "s3://bucket/data", True), ("s3://bucket", "s3://bucket/data", True),
     ("s3://other/data/tars", "s3://bucket/data", True), ("s3://Bucket/data/tars", "s3://bucket/data", True),
     ("s3://bucket//data/tars", "s3://bucket/data", True), ("gs://bucket/data/tars", "s3://bucket/data", True),
     ("http://127.0.0.1:8265/tars", "s3://bucket/data", True), ("http://h/data/x", "http://h/data", False),
     ("http://h:1/data/x", "http://h/data", True), ("http://h/data/x?to=http://127.0.0.1/", "http://h/data", True),
     ("http://h/data/x#", "http://h/data", True), ("/etc", "s3://bucket/data", True), ("file:///etc", "/data", True),
     ("file:///data/tars", "/data", False), ("/data//tars/.", "/data", False), ("/database", "/data", True),
     ("/data/tars", "file:///data", False), ("s3://bucket/data/x", "/bucket/data", True)],
)  # fmt: skip
def test_which_tars_lie_elsewhere(tars: str, url: str, elsewhere: bool) -> None:
    assert manifest.is_outside(tars, url) is elsewhere


def test_a_link_below_the_dataset_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tars").symlink_to("/etc")
    (tmp_path / "alias").symlink_to("data")
    assert manifest.is_outside(str(tmp_path / "data" / "tars"), str(tmp_path / "data"))
    assert not manifest.is_outside(str(tmp_path / "data"), str(tmp_path / "alias"))


@pytest.mark.parametrize("tars", ["../tars", "tars", "s3://b/data/../other", "http://h/d/%2e%2e/x", "/data\\..\\x",
                                  "simplecache::http://h/x", "/data\n/x"])  # fmt: skip
def test_places_of_tars_that_are_invalid_or_climb(packed: Path, tars: str) -> None:
    rewrite(packed, tars=tars)
    with pytest.raises(DataError, match=r"manifest\.json: damaged, .*tars"):
        manifest.load(str(packed), allow_elsewhere=True)


def test_tars_elsewhere_need_a_flag(packed: Path) -> None:
    secret = "not-real"
    rewrite(packed, tars=f"http://user:{secret}@127.0.0.1:8265/tars?token={secret}")
    with pytest.raises(DataError, match=r"manifest\.json: its tars must lie below .*; set --allow-elsewhere") as raised:
        manifest.load(str(packed))
    assert secret not in str(raised.value)
    assert manifest.load(str(packed), allow_elsewhere=True).tars


@pytest.mark.parametrize("change", [{"samples": 2**63}, {"bytes": 2**63}, {"samples": -1}, {"bytes": 1.5}])
def test_counts_that_no_shard_has(packed: Path, change: dict[str, object]) -> None:
    raw = json.loads((packed / "manifest.json").read_text())
    raw["splits"]["train"][0] |= change
    rewrite(packed, splits=raw["splits"])
    with pytest.raises(DataError, match=rf"manifest\.json: damaged, .*{next(iter(change))}"):
        manifest.load(str(packed))


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, '{"format_version": NaN}'])
def test_absurd_json_is_one_error(packed: Path, text: str) -> None:
    (packed / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: damaged, "):
        manifest.load(str(packed))
