"""Reading samples: what is not as the manifest says is named, and memory is bounded."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.data import index, manifest, reader
from orchestrator.data.errors import DataError
from orchestrator.data.packer import RawSample, tar_bytes
from orchestrator.data.reader import SampleReader
from orchestrator.storage import files
from tests.support import shards

TAR = "train/train-000001.tar"
INDEX = TAR + index.SUFFIX
RANGED = 100  # a cache that holds no tar: samples are read in ranges


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    shards.dataset(tmp_path)
    return tmp_path


def opened(folder: Path, cache_bytes: int = reader.CACHE_BYTES) -> SampleReader:
    return SampleReader(str(folder), manifest.load(str(folder)), "train", cache_bytes)


@pytest.mark.parametrize("cache_bytes", [reader.CACHE_BYTES, RANGED])
def test_samples_come_as_they_were_packed(packed: Path, cache_bytes: int) -> None:
    opened_reader = opened(packed, cache_bytes)
    for number, wanted in enumerate(shards.samples(13)):
        got = opened_reader.read(number // 4, number % 4)
        assert (got.key, got.image, got.label) == (wanted.key, wanted.image, wanted.label)
        assert got.source == str(packed / f"train/train-{number // 4:06d}.tar")
        assert (packed / f"train/train-{number // 4:06d}.tar").read_bytes()[got.offset :].startswith(wanted.image)


@pytest.mark.parametrize("name", [TAR, INDEX])
@pytest.mark.parametrize("cache_bytes", [reader.CACHE_BYTES, RANGED])
def test_missing(packed: Path, name: str, cache_bytes: int) -> None:
    (packed / name).unlink()
    opened_reader = opened(packed, cache_bytes)
    opened_reader.read(0, 0)
    with pytest.raises(DataError, match=rf"{packed}/{name}: missing"):
        opened_reader.read(1, 0)


@pytest.mark.parametrize("cache_bytes", [reader.CACHE_BYTES, RANGED])
def test_truncated(packed: Path, cache_bytes: int) -> None:
    data = (packed / TAR).read_bytes()
    (packed / TAR).write_bytes(data[:-512])
    with pytest.raises(DataError, match=rf"{TAR}: {len(data) - 512} bytes, the manifest says {len(data)}: truncated"):
        opened(packed, cache_bytes).read(1, 0)


@pytest.mark.parametrize("name", [TAR, INDEX])
def test_a_flipped_byte(packed: Path, name: str) -> None:
    shards.flip_byte(packed / name, 700 if name == TAR else 20)
    opened_reader = opened(packed)
    opened_reader.read(0, 0)
    with pytest.raises(DataError, match=rf"{name}: damaged: it does not have the checksum"):
        opened_reader.read(1, 0)
    with pytest.raises(DataError, match="damaged"):
        opened_reader.read(1, 0)


def replace_shard(folder: Path, labels: tuple[int, ...], said_samples: int) -> None:
    """Put another first shard with checksums that are right; the manifest says `said_samples`."""
    data = tar_bytes([RawSample(f"k{n}", shards.jpeg(n), label) for n, label in enumerate(labels)])
    listing = index.of_tar(data, "x").to_bytes()
    found = manifest.load(str(folder))
    first = found.splits["train"][0].model_copy(
        update={
            "samples": said_samples, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
            "index_sha256": hashlib.sha256(listing).hexdigest(),
        }
    )  # fmt: skip
    (folder / first.name).write_bytes(data)
    (folder / (first.name + index.SUFFIX)).write_bytes(listing)
    manifest.save(str(folder), found.model_copy(update={"splits": {"train": (first,)}}))


def test_another_count_than_the_manifests(packed: Path) -> None:
    replace_shard(packed, (0, 1), said_samples=3)
    with pytest.raises(DataError, match=r"train-000000.tar: its index lists 2 samples, the manifest 3"):
        opened(packed).read(0, 0)


@pytest.mark.parametrize("labels", [(0, 3), (-1, 0)])
def test_labels_outside_the_classes(packed: Path, labels: tuple[int, ...]) -> None:
    replace_shard(packed, labels, said_samples=2)
    with pytest.raises(DataError, match=r"train-000000.tar: labels outside 0 .. 2"):
        opened(packed).read(0, 0)


@pytest.mark.parametrize(("room", "whole_reads"), [(0, 3), (-1, 0)])
def test_a_split_is_kept_whole_or_read_in_ranges(
    packed: Path, monkeypatch: pytest.MonkeyPatch, room: int, whole_reads: int
) -> None:
    """Never a part of it: lanes hop between shards, so a whole tar would be read for nearly every sample."""
    fetched = []
    whole = files.read_bytes

    def counting(url: str) -> bytes:
        if url.endswith(".tar"):
            fetched.append(url)
        return whole(url)

    monkeypatch.setattr(files, "read_bytes", counting)
    total = sum(shard.bytes for shard in manifest.load(str(packed)).shards("train"))
    opened_reader = opened(packed, cache_bytes=total + room)
    for shard in (0, 1, 2, 0, 2, 0, 1):
        opened_reader.read(shard, 0)
    assert len(fetched) == whole_reads


def test_threads_share_a_reader(packed: Path) -> None:
    wanted = [sample.image for sample in shards.samples(13)]
    opened_reader = opened(packed, cache_bytes=30_000)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: opened_reader.read(n % 13 // 4, n % 13 % 4).image, range(260)))
    assert got == wanted * 20
