"""Estimates of durations from speeds that are stated, measured or unknown."""

import pytest

from orchestrator.data.manifest import Manifest, Shard
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.run_plan import RunHistory, count_multiply_adds, estimate_durations
from tests.support.launched import recipe, spec, wide

MANIFEST = Manifest(
    name="some",
    classes=tuple("abcdefghij"),
    splits={
        split: (Shard(name=f"{split}.tar", samples=number, bytes=100 * number, sha256="0", index_sha256="0"),)
        for split, number in (("train", 1000), ("validation", 300))
    },
)


def test_a_stated_speed_is_the_first_models_and_others_follow_by_their_arithmetic() -> None:
    specs = [spec(wide("a", 2, 0.1)), spec(wide("b", 2, 0.2))]
    values, in_seconds = estimate_durations(specs, {}, MANIFEST, 100.0)
    # 15 steps of 64 train 960 images; validation goes forward only.
    first = 2 * (960 + 300 / 3) / 100
    assert in_seconds
    assert values == pytest.approx([first, first * count_multiply_adds(specs[1]) / count_multiply_adds(specs[0])])


def test_a_measured_speed_counts_for_its_run_and_for_those_without_one() -> None:
    specs = [spec(wide("a", 4, 0.1)), spec(wide("b", 4, 0.1))]
    seen = {specs[0].name: RunHistory(epochs=3.0, images_per_second=53.0)}
    values, in_seconds = estimate_durations(specs, seen, MANIFEST, None)
    assert in_seconds
    assert values == pytest.approx([1060 / 53, 4 * 1060 / 53])
    # A statement is believed before.
    assert estimate_durations(specs, seen, MANIFEST, 106.0)[0][0] == pytest.approx(10)


def test_a_speed_measured_with_other_workers_is_converted() -> None:
    (run,) = specs = [spec(wide("a", 1, 0.1))]
    seen = {run.name: RunHistory(images_per_second=106.0, workers=2)}
    values, _ = estimate_durations(specs, seen, MANIFEST, None)
    assert values == pytest.approx([1060 / 53])  # half as fast with one of two workers


def test_without_a_speed_or_data_durations_are_in_units_of_work() -> None:
    specs = [spec(wide("a", 2, 0.1)), spec(wide("b", 2, 0.2))]
    for manifest, stated in ((MANIFEST, None), (None, 10.0)):
        values, in_seconds = estimate_durations(specs, {}, manifest, stated)
        assert not in_seconds
        assert values[1] / values[0] == count_multiply_adds(specs[1]) / count_multiply_adds(specs[0])


def test_work_grows_with_width_and_pixels() -> None:
    base = count_multiply_adds(spec(wide("a", 10, 0.2)))
    # Filters on both sides, but for the first row; and heads, whose linear layers do not grow with the image.
    assert 3 < count_multiply_adds(spec(wide("a", 10, 0.4))) / base < 4.2
    larger = recipe(model={"kind": "googlenet", "image_size": 64, "width": 0.2}, epochs=10)
    assert 3 < count_multiply_adds(spec(larger)) / base < 4.2


def test_work_is_known_for_networks_without_a_width() -> None:
    small, large = (
        spec(recipe(kind, epochs=1, model={"kind": kind, "image_size": 64})) for kind in ("alexnet", "vgg-16")
    )
    assert count_multiply_adds(large) > 10 * count_multiply_adds(small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 2}, "nodes must come with cpus_per_node, got nodes 2"),
        ({"cpus_per_node": 2.0}, "must come with nodes"),
        ({"gpus_per_node": 2.0}, "must come with nodes"),
        ({"images_per_second": 0.0}, "images_per_second"),
        ({"price_per_hour": -1.0}, "price_per_hour"),
        ({"most_workers": 2}, "most_workers"),
    ],
)
def test_impossible_options_are_errors(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanConfig.from_dict(changes)
