"""Reading samples: what is not as the manifest says is named, and memory is bounded."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.data import index, manifest
from orchestrator.data.build import shard_scan
from orchestrator.data.build.tar_writer import RawSample, encode_tar
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataset import SampleReader
from tests.support import tiny_shards

TAR = "train/train-000001.tar"
INDEX = TAR + index.SUFFIX


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    tiny_shards.dataset(tmp_path)
    return tmp_path


def opened(folder: Path) -> SampleReader:
    return SampleReader(str(folder), manifest.load(str(folder)), "train")


def test_samples_come_as_they_were_packed(packed: Path) -> None:
    opened_reader = opened(packed)
    for number, wanted in enumerate(tiny_shards.samples(13)):
        got = opened_reader.read(number // 4, number % 4)
        assert (got.key, bytes(got.image), got.label) == (wanted.key, wanted.image, wanted.label)
        assert got.source == str(packed / f"train/train-{number // 4:06d}.tar")
        assert (packed / f"train/train-{number // 4:06d}.tar").read_bytes()[got.offset :].startswith(wanted.image)


@pytest.mark.parametrize("name", [TAR, INDEX])
def test_missing(packed: Path, name: str) -> None:
    (packed / name).unlink()
    opened_reader = opened(packed)
    opened_reader.read(0, 0)
    with pytest.raises(DataError, match=rf"{packed}/{name}: missing"):
        opened_reader.read(1, 0)


def test_truncated(packed: Path) -> None:
    data = (packed / TAR).read_bytes()
    (packed / TAR).write_bytes(data[:-512])
    with pytest.raises(DataError, match=rf"{TAR}: {len(data) - 512} bytes, the manifest says {len(data)}: truncated"):
        opened(packed).read(1, 0)


@pytest.mark.parametrize("name", [TAR, INDEX])
def test_a_flipped_byte(packed: Path, name: str) -> None:
    tiny_shards.flip_byte(packed / name, 1700 if name == TAR else 20)
    opened_reader = opened(packed)
    opened_reader.read(0, 0)
    with pytest.raises(DataError, match=rf"{name}: .*does not have the checksum"):
        opened_reader.read(1, 0)
    with pytest.raises(DataError, match="does not have the checksum"):
        opened_reader.read(1, 0)


def replace_shard(folder: Path, labels: tuple[int, ...], said_samples: int) -> None:
    """Put another first shard with checksums that are right; the manifest says `said_samples`."""
    data = encode_tar([RawSample(f"k{n}", tiny_shards.jpeg(n), label) for n, label in enumerate(labels)])
    listing = shard_scan.index_tar(data, "x").to_bytes()
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


def test_threads_share_a_reader(packed: Path) -> None:
    wanted = [sample.image for sample in tiny_shards.samples(13)]
    opened_reader = opened(packed)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: bytes(opened_reader.read(n % 13 // 4, n % 13 % 4).image), range(260)))
    assert got == wanted * 20
