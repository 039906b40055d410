import io
import logging
from pathlib import Path

import pytest
from PIL import Image as Pillow

from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.ensemble.report import thumbnails
from tests.support import tiny_shards


def size(picture: bytes) -> tuple[int, int]:
    with Pillow.open(io.BytesIO(picture)) as image:
        assert image.format == "JPEG"
        return image.size


def packed(folder: Path) -> Manifest:
    """Of 7 samples in shards of 3: a wide one, a tiny one, a middling one, broken bytes, three more."""
    images = [
        tiny_shards.jpeg(0, 900, 300),
        tiny_shards.jpeg(1, 12, 8),
        tiny_shards.jpeg(2, 150, 200),
        b"\xff\xd8 broken",
    ]
    images += [tiny_shards.jpeg(number) for number in (4, 5, 6)]
    return tiny_shards.dataset(folder, [RawSample(f"s{n}", data, 0) for n, data in enumerate(images)], per_shard=3)


def test_pictures_are_small_jpegs_by_number(tmp_path: Path) -> None:
    manifest = packed(tmp_path)
    found = thumbnails.make_thumbnails(str(tmp_path), manifest, "train", [5, 0, 1, 2, 3, 0])
    assert {number: size(picture) for number, picture in found.items()} == {
        5: (80, 60), 0: (224, 75), 1: (108, 72), 2: (150, 200),
    }  # fmt: skip


def test_the_picture_is_that_of_the_sample(tmp_path: Path) -> None:
    manifest = packed(tmp_path)
    found = thumbnails.make_thumbnails(str(tmp_path), manifest, "train", [4, 6])
    for number, picture in found.items():
        with Pillow.open(io.BytesIO(picture)) as image:
            pixels = image.resize((40, 30), Pillow.Resampling.BOX)
        apart = [
            sum(abs(a - b) for a, b in zip(pixels.tobytes(), tiny_shards.picture(other).tobytes(), strict=True))
            for other in range(7)
        ]
        assert apart.index(min(apart)) == number


def test_no_more_than_24_are_read(tmp_path: Path) -> None:
    manifest = tiny_shards.dataset(tmp_path, 30)
    assert list(thumbnails.make_thumbnails(str(tmp_path), manifest, "train", range(30))) == list(range(24))


def test_pictures_that_cannot_be_read_cost_no_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = packed(tmp_path)
    gone = manifest.shards("train")[1].name
    (tmp_path / gone).unlink()
    with caplog.at_level(logging.WARNING):
        found = thumbnails.make_thumbnails(str(tmp_path), manifest, "train", [0, 4, 6])
    assert list(found) == [0]
    (record,) = caplog.records
    assert "2 of 3 cannot be shown" in record.getMessage()
    assert gone in record.getMessage()


@pytest.mark.parametrize("number", [-1, 7])
def test_a_number_outside_the_split_is_refused(tmp_path: Path, number: int) -> None:
    manifest = packed(tmp_path)
    with pytest.raises(DataError, match=f"no sample {number}; it has 7"):
        thumbnails.make_thumbnails(str(tmp_path), manifest, "train", [0, number])


def test_none_is_none(tmp_path: Path) -> None:
    assert thumbnails.make_thumbnails(str(tmp_path), packed(tmp_path), "train", []) == {}
