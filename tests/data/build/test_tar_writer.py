"""Shards as plain WebDataset tars: the same bytes each time, readable by others, and others' tars by us."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from orchestrator.data import index, manifest
from orchestrator.data.build import shard_scan
from orchestrator.data.build.sources.digits import pack_digits
from orchestrator.data.build.tar_writer import RawSample, encode_tar
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataset import SampleReader
from tests.support import tiny_shards


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    pack_digits(str(folder))
    return folder


# ------------------------------------------------------------------ packing
def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "a")
    tiny_shards.dataset(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(content(tmp_path / "a")) == 1 + 2 * (4 + 2), "manifest, and a tar with its index for each shard"


def test_tars_state_neither_time_nor_owner() -> None:
    with tarfile.open(fileobj=io.BytesIO(encode_tar(tiny_shards.samples(2)))) as tar:
        members = tar.getmembers()
    assert [member.name.partition(".")[2] for member in members] == ["cls", "jpg"] * 2
    assert {(member.mtime, member.uname, member.gname, member.uid) for member in members} == {(0, "root", "root", 0)}


@pytest.mark.parametrize(
    ("sample", "said"),
    [(RawSample("a.b", b"x", 0), "'a.b': the key must be"), (RawSample("", b"x", 0), "'': the key must be"),
     (RawSample("a", b"x", 3), r"'a': the label must be in 0 \.\. \d+, got 3"),
     (RawSample("a", b"x", -1), r"'a': the label must be in .* got -1"),
     (RawSample("a", b"x", 0, "gif"), "'a' lacks an image or a label"),
     (RawSample("sample-000", b"x", 0), "'sample-000' has two")],
)  # fmt: skip
def test_what_no_reader_could_take_is_an_error(tmp_path: Path, sample: RawSample, said: str) -> None:
    with pytest.raises(DataError, match=said):
        tiny_shards.dataset(tmp_path, [*tiny_shards.samples(2), sample])
    assert not (tmp_path / manifest.FILE_NAME).exists(), "no manifest: not a complete dataset"


@pytest.mark.parametrize("size", [0, -1])
def test_shards_of_nothing_are_errors(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"samples_per_shard must be at least 1, got {size}"):
        tiny_shards.dataset(tmp_path, per_shard=size)


# ------------------------------------------------------------------ the index
def test_offsets_give_exactly_the_image_bytes(tmp_path: Path) -> None:
    found = tiny_shards.dataset(tmp_path)
    numbered = iter(tiny_shards.samples(13))
    for shard in found.shards("train"):
        data = (tmp_path / shard.name).read_bytes()
        listing = index.load(str(tmp_path), shard)
        assert len(data) == shard.bytes
        for row in range(shard.samples):
            sample = next(numbered)
            start, length = listing.offsets[row], listing.lengths[row]
            assert data[start : start + length] == sample.image
            assert (listing.keys[row], listing.labels[row]) == (sample.key, sample.label)


def test_foreign_tars_are_indexed() -> None:
    image = tiny_shards.jpeg(0)
    data = tiny_shards.tar(
        [("./n01.d/a.JPG", image), ("./n01.d/a.cls", b"2\n"), ("./n01.d/a.json", b"{}"), ("README", b"hello"),
         ("b.cls", b"0"), ("b.txt", b"words"), ("b.png", b"pixels"), (".hidden.jpg", b"")]
    )  # fmt: skip
    found = shard_scan.index_tar(data, "x.tar")
    assert list(found.keys) == ["n01.d/a", "b"]
    assert found.labels.tolist() == [2, 0]
    assert data[found.offsets[0] : found.offsets[0] + found.lengths[0]] == image
    assert data[found.offsets[1] : found.offsets[1] + found.lengths[1]] == b"pixels"


@pytest.mark.parametrize(
    ("members", "said"),
    [([("a.jpg", b"x")], "x.tar: sample 'a' lacks an image or a label"),
     ([("a.jpg", b"x"), ("a.cls", b"0"), ("b.cls", b"1")], "sample 'b' lacks"),
     ([("a.jpg", b"x"), ("a.cls", b"two")], "sample 'a': its label must be a whole number"),
     ([("a.jpg", b"x"), ("a.cls", b"0"), ("a.jpg", b"y")], "sample 'a' has two images"),
     ([("a.jpg", b"x"), ("a.cls", b"0"), ("a.cls", b"0")], "sample 'a' has two labels")],
)  # fmt: skip
def test_unfit_tars_are_errors(members: list[tuple[str, bytes]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        shard_scan.index_tar(tiny_shards.tar(members), "x.tar")


def test_a_tar_cut_anywhere_is_an_error() -> None:
    data = encode_tar(tiny_shards.samples(3))
    end = len(data.rstrip(b"\0"))
    assert list(shard_scan.index_tar(data, "x.tar").keys) == ["sample-000", "sample-001", "sample-002"]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        boundaries = [member.offset for member in tar]
    # A cut between two samples is the one that tarfile and WebDataset take for the end.
    for cut in (*boundaries, *range(0, end, 211)):
        with pytest.raises(DataError, match=r"x\.tar"):
            shard_scan.index_tar(data[:cut], "x.tar")


def test_a_broken_header_in_the_middle_is_an_error() -> None:
    data = bytearray(encode_tar(tiny_shards.samples(3)))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        header = tar.getmembers()[2].offset
    data[header + 150] ^= 0xFF
    with pytest.raises(DataError, match=f"x.tar: truncated or damaged at byte {header}"):
        shard_scan.index_tar(bytes(data), "x.tar")


# ------------------------------------------------------------------ digits
def test_digits_are_all_there_and_stratified(digits: Path) -> None:
    found = manifest.load(str(digits))
    assert (found.name, found.classes) == ("digits", tuple("0123456789"))
    assert (found.count_samples("train"), found.count_samples("validation")) == (1437, 360)
    per_class, keys = {}, []
    for split in found.splits:
        listings = [index.load(str(digits), shard) for shard in found.shards(split)]
        per_class[split] = np.bincount(np.concatenate([listing.labels for listing in listings]), minlength=10)
        keys += [key for listing in listings for key in listing.keys]
    assert len(set(keys)) == 1797
    total = per_class["train"] + per_class["validation"]
    assert np.abs(per_class["validation"] - total * 360 / 1797).max() < 1


def test_digits_are_the_same_at_each_packing(digits: Path, tmp_path: Path) -> None:
    pack_digits(str(tmp_path))
    assert content(tmp_path) == content(digits)


def test_training_digits_are_mixed_within_a_shard(digits: Path) -> None:
    for shard in manifest.load(str(digits)).shards("train")[:-1]:
        assert len(set(index.load(str(digits), shard).labels.tolist())) >= 8


@pytest.mark.parametrize("split", ["train", "validation"])
def test_vanilla_webdataset_reads_the_same(digits: Path, split: str) -> None:
    found = manifest.load(str(digits))
    reader = SampleReader(str(digits), found, split)
    ours = [reader.read(at, n) for at, shard in enumerate(found.shards(split)) for n in range(shard.samples)]
    paths = [str(digits / shard.name) for shard in found.shards(split)]
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [(s.key, s.label, s.image) for s in ours] == [(s["__key__"], int(s["cls"]), s["jpg"]) for s in theirs]
