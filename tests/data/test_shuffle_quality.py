"""Label mixing: sorted tars are noticed, shuffled ones are not, whatever the sizes."""

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.data import shuffle_quality
from orchestrator.data.config import OrderConfig


def split(labels: NDArray[np.int64], shards: int) -> list[NDArray[np.int64]]:
    return np.array_split(labels, shards)


def imagenet(shuffled: bool, classes: int = 1000, each: int = 130) -> NDArray[np.int64]:
    labels = np.repeat(np.arange(classes), each)
    return np.random.default_rng(1).permutation(labels) if shuffled else labels


def test_shuffled_tars_are_well_mixed() -> None:
    found = shuffle_quality.measure_shuffle_quality(split(imagenet(True), 100), OrderConfig(), 256)
    assert not found.is_poor
    assert found.split == pytest.approx(1000, rel=0.05)
    assert found.shard == pytest.approx(1000, rel=0.1)
    assert found.batch == pytest.approx(1000, rel=0.3)
    assert "POOR" not in found.format_message()


def test_sorted_tars_are_noticed() -> None:
    found = shuffle_quality.measure_shuffle_quality(split(imagenet(False), 1000), OrderConfig(), 256)
    assert found.is_poor
    assert found.shard == 1
    assert found.batch < 200
    assert found.split == pytest.approx(1000, rel=0.05)
    advice = "pack anew with a global shuffle (orchestrator shards pack), or raise order.lanes"
    assert found.format_message().endswith(advice)
    assert "a shard is as varied as 1.0 equally frequent classes" in found.format_message()


def test_enough_lanes_mix_sorted_tars() -> None:
    """Each sample of a batch then comes from a lane of its own: as mixed as shuffled."""
    sorted_shards = split(imagenet(False), 1000)
    assert shuffle_quality.measure_shuffle_quality(sorted_shards, OrderConfig(lanes=8, window=64), 256).is_poor
    assert not shuffle_quality.measure_shuffle_quality(sorted_shards, OrderConfig(lanes=1024, window=16), 256).is_poor


def test_two_sorted_classes() -> None:
    """All batches hold both classes on average, and yet most of one hold few of the other."""
    labels = np.repeat(np.arange(2), 5000)
    assert shuffle_quality.measure_shuffle_quality(split(labels, 2), OrderConfig(lanes=1, window=256), 64).is_poor
    assert not shuffle_quality.measure_shuffle_quality(
        split(np.tile(np.arange(2), 5000), 2), OrderConfig(lanes=1, window=256), 64
    ).is_poor


def test_uneven_classes_are_no_poor_mixing() -> None:
    labels = np.random.default_rng(2).choice(100, 20_000, p=np.arange(1, 101) / 5050)
    assert not shuffle_quality.measure_shuffle_quality(split(labels, 40), OrderConfig(), 128).is_poor


@pytest.mark.parametrize("seed", range(20))
def test_small_sets_raise_no_false_alarm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards = [rng.integers(0, 10, rng.integers(0, 9)) for _ in range(rng.integers(1, 5))]
    assert not shuffle_quality.measure_shuffle_quality(
        shards, OrderConfig(lanes=3, window=2), int(rng.integers(1, 9))
    ).is_poor


def test_nothing_at_all() -> None:
    for shards in ([], [np.empty(0, np.int64)], [np.array([3])]):
        assert not shuffle_quality.measure_shuffle_quality(shards, OrderConfig(), 256).is_poor


def test_only_some_shards_are_asked_for() -> None:
    class Lazy(list[NDArray[np.int64]]):
        asked = 0

        def __getitem__(self, number: object) -> NDArray[np.int64]:  # type: ignore[override]
            self.asked += 1
            assert isinstance(number, int)
            return np.full(100, number // 10)

    shards = Lazy([np.empty(0, np.int64)] * 10_000)
    assert shuffle_quality.measure_shuffle_quality(shards, OrderConfig(lanes=16, window=16), 64).is_poor
    assert shards.asked == shuffle_quality.MAX_SHARDS
