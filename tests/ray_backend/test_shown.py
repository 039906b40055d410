"""Images as epochs show them: the loader's own pixels."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import manifest
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.dataset import SampleReader
from orchestrator.data.transforms.decode import decode_image
from orchestrator.ray_backend.previews import MAX_ORIGINAL_SIDE, AugmentedSample, pick_spread_ids, render_augmented
from tests.support import tiny_shards
from tests.support.tiny_shards import counts, kept, training

SEED, SIZE = 11, 16  # those of tests.support.shards.training


def seen(folder: Path, samples: int, epochs: int, config: AugmentationConfig | None = None) -> list[AugmentedSample]:
    packed = manifest.load(str(folder))
    reader = SampleReader(str(folder), packed, "train")
    try:
        return render_augmented(reader, counts(packed), config or AugmentationConfig(), SEED, SIZE, samples, epochs)
    finally:
        reader.close()


def test_it_is_what_the_loader_gives_in_each_epoch(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path, 12)
    found = {one.key: one for one in seen(tmp_path, 12, 3)}
    assert len(found) == 12
    compared = 0
    for epoch in range(3):
        for batch in kept(training(tmp_path, range(3), epoch=epoch)):
            for image, label, number in zip(batch.images, batch.labels.tolist(), batch.ids.tolist(), strict=True):
                one = found[f"sample-{number:03d}"]
                assert np.array_equal(one.epochs[epoch], image.permute(1, 2, 0).numpy())
                assert one.label == label
                compared += 1
    assert compared == 36


def test_the_original_is_the_whole_image(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path, 12)
    for number, one in enumerate(seen(tmp_path, 12, 1)):
        assert np.array_equal(one.original, decode_image(tiny_shards.samples(1, number)[0].image))


def test_a_large_original_is_reduced_in_shape(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path, [RawSample("large", tiny_shards.jpeg(1, 1600, 400), 0)])
    (one,) = seen(tmp_path, 3, 1)
    assert one.original.shape == (MAX_ORIGINAL_SIDE // 4, MAX_ORIGINAL_SIDE, 3)


def test_an_image_that_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    raw = tiny_shards.samples(6)
    tiny_shards.dataset(tmp_path, [*raw[:2], RawSample("broken", b"\xff\xd8\xff no image", 0), *raw[3:]])
    assert [one.key for one in seen(tmp_path, 6, 1)] == [f"sample-{n:03d}" for n in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize(
    ("total", "samples", "wanted"), [(10, 1, [5]), (10, 2, [2, 7]), (3, 8, [0, 1, 2]), (100, 4, [12, 37, 62, 87])]
)
def test_samples_are_spread_evenly(total: int, samples: int, wanted: list[int]) -> None:
    assert pick_spread_ids(total, samples) == wanted
