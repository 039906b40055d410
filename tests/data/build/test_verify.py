"""Verification tells everything that is wrong, by name, and nothing where nothing is."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.data import index, manifest
from orchestrator.data.build import indexing, shard_scan, verify
from orchestrator.data.build.config import IndexConfig, VerifyConfig
from orchestrator.data.build.tar_writer import RawSample, encode_tar
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Shard
from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from tests.support import pictures, tiny_shards

TAR = "train/train-000001.tar"


def run(place: object, **changes: Any) -> tuple[int, str]:
    """Exit status, and what was said, in one line."""
    screen = io.StringIO()
    status = verify.verify_dataset(VerifyConfig(**({"url": str(place)} | changes)), Console(file=screen, width=1000))
    return status, " ".join(screen.getvalue().split())


def wrong(place: object, *said: str, **changes: Any) -> str:
    """Return the output, which contains all of `said`, of a job that fails."""
    status, output = run(place, **changes)
    assert status == 1
    for words in said:
        assert words in output
    return output


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    tiny_shards.dataset(tmp_path)
    return tmp_path


def change_shard(folder: Path, **changes: Any) -> None:
    """Alter what the manifest says of a shard."""
    found = manifest.load(str(folder))
    altered = tuple(s.model_copy(update=changes) if s.name == TAR else s for s in found.splits["train"])
    manifest.save(str(folder), found.model_copy(update={"splits": found.splits | {"train": altered}}))


def rewrite(folder: Path, tar: bytes, change: Callable[[ShardIndex], ShardIndex] = lambda found: found) -> None:
    """Put another tar in a shard's place, with sums that fit; `change` makes its index another one."""
    listing = change(shard_scan.index_tar(tar, "x"))
    (folder / TAR).write_bytes(tar)
    (folder / (TAR + index.SUFFIX)).write_bytes(listing.to_bytes())
    change_shard(
        folder,
        bytes=len(tar),
        samples=len(listing.keys),
        sha256=hashlib.sha256(tar).hexdigest(),
        index_sha256=hashlib.sha256(listing.to_bytes()).hexdigest(),
    )


def with_samples(folder: Path, samples: Sequence[RawSample]) -> None:
    rewrite(folder, encode_tar(samples))


# ------------------------------------------------------------------ nothing is wrong
@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_dataset(packed: Path, deep: bool) -> None:
    status, output = run(packed, deep=deep)
    assert status == 0
    assert "train: 13 samples of 3 classes in 4 shards" in output
    assert "label mixing: " in output
    assert output.endswith("tiny: nothing is wrong")
    assert "warning" not in output


def test_an_adopted_dataset_with_labels_in_json(tmp_path: Path) -> None:
    members = [
        (f"{n}.{e}", d) for n in range(4) for e, d in (("jpg", tiny_shards.jpeg(n)), ("json", b'{"y": "%d"}' % (n % 2)))
    ]
    file_io.write_bytes("memory://verified/a.tar", tiny_shards.tar(members))
    (tmp_path / "classes").write_text("0\n1\n")
    job = IndexConfig(
        url="memory://verified",
        train="a.tar",
        label_key="y",
        classes=str(tmp_path / "classes"),
        to=str(tmp_path / "to"),
    )
    indexing.index_dataset(job, Console(file=io.StringIO()))
    assert run(tmp_path / "to", deep=True, allow_elsewhere=True)[0] == 0
    file_io.write_bytes("memory://verified/a.tar", tiny_shards.tar([*members[:-1], ("3.json", b'{"y": "0"}')]))
    wrong(tmp_path / "to", "sample '3' has the label 1 in the index, 0 in the tar", allow_elsewhere=True)
    with pytest.raises(DataError, match=r"^url: .* must lie below .*, got memory://verified; set --allow-elsewhere"):
        run(tmp_path / "to")


# ------------------------------------------------------------------ tars
def test_a_missing_tar(packed: Path) -> None:
    (packed / TAR).unlink()
    wrong(packed, f"{packed}/{TAR}: missing although the manifest lists it", "1 problems")


@pytest.mark.parametrize("keep", [0, 512, 3000])
def test_a_cut_tar(packed: Path, keep: int) -> None:
    data = (packed / TAR).read_bytes()
    (packed / TAR).write_bytes(data[:keep])
    wrong(
        packed,
        f"the tar has {keep} bytes, the manifest says {len(data)}",
        "empty" if keep == 0 else f"truncated at byte {keep}",
    )


def test_a_tar_cut_between_samples(packed: Path) -> None:
    """Plain WebDataset reads on silently."""
    data, cut = (packed / TAR).read_bytes(), len(encode_tar(tiny_shards.samples(2, 4)).rstrip(b"\0")) // 512 * 512 + 512
    (packed / TAR).write_bytes(data[:cut] + bytes(len(data) - cut))
    output = wrong(packed, "its bytes have changed", "4 samples in the index, 2 in the tar")
    assert "2 problems" in output


def test_a_flipped_byte(packed: Path) -> None:
    listing = index.load(str(packed), manifest.load(str(packed)).shards("train")[1])
    tiny_shards.flip_byte(packed / TAR, int(listing.offsets[2]) + 200)
    wrong(
        packed,
        "the tar does not have the checksum that the manifest names: its bytes have changed",
        f"sample {listing.keys[2]!r} has the checksum {listing.checksums[2]} in the index",
        "(1 such samples)",
    )


def test_two_tars_in_one(packed: Path) -> None:
    data = (packed / TAR).read_bytes()
    (packed / TAR).write_bytes(data + data)
    wrong(packed, f"the tar has {2 * len(data)} bytes", f"data behind the end of the archive at byte {len(data)}")


def test_everything_is_reported(packed: Path) -> None:
    (packed / TAR).unlink()
    tiny_shards.flip_byte(packed / "train/train-000000.tar", 0)
    (packed / ("train/train-000002.tar" + index.SUFFIX)).unlink()
    (packed / ("train/train-000003.tar" + index.SUFFIX)).write_text("{}")
    output = wrong(
        packed, f"{TAR}: missing", "truncated or damaged at byte 0", "train-000002.tar.index.json: missing",
        "train-000003.tar.index.json: damaged: it does not have the checksum",
    )  # fmt: skip
    assert "5 problems" in output, "a flipped byte is reported twice: by the checksum and by the header"


# ------------------------------------------------------------------ indexes
def test_another_count_in_the_manifest(packed: Path) -> None:
    change_shard(packed, samples=3)
    wrong(packed, "its index lists 4 samples, the manifest 3")


@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_labels_outside_the_classes(packed: Path, label: int) -> None:
    with_samples(packed, [RawSample("a", tiny_shards.jpeg(50), 0), RawSample("b", tiny_shards.jpeg(51), label)])
    wrong(packed, f"1 labels outside 0 .. 2: sample 'b' has {label}", "1 problems")


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda f: replace(f, labels=f.labels[::-1]), "sample 'a' has the label 1 in the index, 0 in the tar (2 such"),
     (lambda f: replace(f, offsets=f.offsets - 1), "sample 'a' has the offset"),
     (lambda f: replace(f, lengths=f.lengths - 1), "sample 'a' has the length"),
     (lambda f: replace(f, keys=["a", "c"]), "sample 'b' has the key c in the index, b in the tar")],
)  # fmt: skip
def test_an_index_of_something_else(packed: Path, change: Callable[[ShardIndex], ShardIndex], said: str) -> None:
    tar = encode_tar([RawSample("a", tiny_shards.jpeg(50), 0), RawSample("b", tiny_shards.jpeg(51), 1)])
    rewrite(packed, tar, change)
    wrong(packed, f"its index is not what the tar holds: {said}", "1 problems")


def test_an_index_that_points_outside_the_tar(packed: Path) -> None:
    rewrite(packed, encode_tar(tiny_shards.samples(2)), lambda found: replace(found, lengths=found.lengths + 2**20))
    wrong(packed, "lies outside the")


def columns(**changes: list[object]) -> str:
    return json.dumps({"keys": ["a"], "labels": [0], "offsets": [0], "lengths": [1], "checksums": [0]} | changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [("[]", "must be a JSON object"), ('{"keys": []}', "KeyError('labels')"), ("{", "JSONDecodeError"),
     ('{"keys":' + "[" * 100_000, "JSON nested too deeply"), (columns(labels=[float("nan")]), "NaN is no finite"),
     (columns(lengths=[]), "columns of 1 keys, 1 labels, 1 offsets, 0 lengths"),
     (columns(keys=[1]), "column 'keys' holds other values"), (columns(labels=[0.5]), "column 'labels' holds other"),
     (columns(labels=[True]), "column 'labels' holds other values"), (columns(labels=[2**63]), "OverflowError"),
     (columns(checksums=[-1]), "OverflowError"), (columns(offsets=[-1]), "sample 'a' lies outside the"),
     (columns(lengths=[-1]), "sample 'a' lies outside the"), (columns(lengths=[2**40]), "sample 'a' lies outside the"),
     (columns(offsets=[2**63 - 1], lengths=[9]), "sample 'a' lies outside the")],
)  # fmt: skip
def test_a_malformed_index_is_named(packed: Path, text: str, said: str) -> None:
    (packed / (TAR + index.SUFFIX)).write_text(text)
    change_shard(packed, index_sha256=hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(DataError) as caught:
        index.load(str(packed), manifest.load(str(packed)).shards("train")[1])
    assert f"{packed}/{TAR}.index.json: " in str(caught.value)
    assert said in str(caught.value)
    wrong(packed, said)


# ------------------------------------------------------------------ duplicates
def test_keys_in_two_shards(packed: Path) -> None:
    with_samples(packed, [RawSample("sample-001", tiny_shards.jpeg(50), 0), RawSample("new", tiny_shards.jpeg(51), 1)])
    wrong(packed, "key 'sample-001' is also in train/train-000000.tar", "1 problems")


def test_many_equal_keys_are_counted(packed: Path) -> None:
    found = manifest.load(str(packed))
    twice = (*found.splits["train"], *found.splits["train"])
    manifest.save(str(packed), found.model_copy(update={"splits": found.splits | {"train": twice}}))
    wrong(packed, "listed 2 times in split 'train'", "13 keys of split 'train' are there twice; 5 are listed")


def test_equal_hashes_are_not_taken_for_equal_keys(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index.KeyColumn, "compute_hashes", lambda self: np.zeros(len(self), np.uint64))
    assert run(packed)[0] == 0


def test_images_that_are_there_twice_are_reported(packed: Path) -> None:
    """Real datasets have some: reported, counted and named, but no failure."""
    old = tiny_shards.samples(3)
    leaked = tiny_shards.samples(1, 500)[0]
    new = [RawSample(f"new-{n}", s.image, s.label if n else 2) for n, s in enumerate((*old, leaked))]
    with_samples(packed, new)
    status, output = run(packed)
    assert status == 0
    assert (
        "warning: 3 images are twice in train, 1 with another label: train/train-000000.tar 'sample-000' = " in output
    )
    assert "warning: 1 images of train are also in validation (leakage)" in output
    assert f"{TAR} 'new-3' = validation/validation-000000.tar 'sample-500'" in output
    assert output.endswith("tiny: no errors, but 2 warnings")
    assert "nothing is wrong" not in output


# ------------------------------------------------------------------ deep
def test_images_that_cannot_be_decoded(packed: Path) -> None:
    cut, bomb = tiny_shards.jpeg(5)[:300], b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**31).to_bytes(4, "big") * 2 + bytes(9)
    with_samples(packed, [RawSample(k, d, 0) for k, d in (("a", b"no image"), ("b", cut), ("c", bomb), ("d", b""))])
    assert run(packed)[0] == 0
    output = wrong(packed, *(f"sample {key!r} at byte " for key in "abcd"), "4 problems", deep=True)
    assert f"got {2**31} x {2**31}; scale" in output


# ------------------------------------------------------------------ places
def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json: no manifest there"):
        run(tmp_path)
    for place, said in (("", "give the dataset's folder"), ("here", "relative path")):
        with pytest.raises(ConfigError, match=said):
            run(place)


def test_empty_splits(packed: Path) -> None:
    found = manifest.load(str(packed))
    manifest.save(
        str(packed), found.model_copy(update={"splits": {"train": (), "validation": found.splits["validation"]}})
    )
    wrong(packed, "split 'train' has no sample")
    manifest.save(str(packed), found.model_copy(update={"splits": {}}))
    wrong(packed, "it has no split")


def failing(monkeypatch: pytest.MonkeyPatch, failing_from: int) -> None:
    load = index.load

    def broken(url: str, shard: Shard) -> ShardIndex:
        if int(shard.name[-5]) >= failing_from:
            raise StorageError(f"cannot read {shard.name}: down")
        return load(url, shard)

    monkeypatch.setattr(index, "load", broken)


def test_a_storage_that_fails_for_a_shard(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 3)
    (packed / TAR).unlink()
    wrong(packed, f"{TAR}: missing", "cannot read train/train-000003.tar: down")


def test_a_storage_that_is_down(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 0)
    with pytest.raises(StorageError, match="down"):
        run(packed)


def test_transparent_images_are_counted(packed: Path) -> None:
    pixels = tiny_shards.picture(1)
    clear = pictures.png(np.dstack((pixels, pixels[:, :, 0])), 6, 8)
    with_samples(packed, [RawSample("a", clear, 0, "png"), RawSample("b", clear + b"x", 0, "png")])
    status, output = run(packed)
    assert status == 0
    assert "train: 2 images are transparent: they are laid on white" in output
    assert "warning: transparent images are not recorded" in output
    found = manifest.load(str(packed))
    manifest.save(str(packed), found.model_copy(update={"made": found.made | {manifest.BACKGROUND_KEY: "white"}}))
    assert "not recorded" not in run(packed, deep=True)[1]
