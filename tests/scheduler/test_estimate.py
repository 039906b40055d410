"""Estimates of runs: speeds stated, measured or unknown; hours, money and bytes."""

from pathlib import Path

import pytest

from orchestrator.data.manifest import Manifest, Shard
from orchestrator.ray_backend.cluster import ClusterCapacity, Node
from orchestrator.scheduler import estimate
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.estimate import RunHistory, count_multiply_adds, estimate_durations
from orchestrator.scheduler.run_plan import plan_runs
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
    found = estimate_durations(specs, {}, MANIFEST, PlanConfig(images_per_second=100.0))
    # 15 steps of 64 train 960 images; validation goes forward only.
    first = 2 * (960 + 300 / 3) / 100
    assert found.in_seconds
    assert found.values == pytest.approx((first, first * count_multiply_adds(specs[1]) / count_multiply_adds(specs[0])))


def test_a_measured_speed_counts_for_its_run_and_for_those_without_one() -> None:
    specs = [spec(wide("a", 4, 0.1)), spec(wide("b", 4, 0.1))]
    seen = {specs[0].name: RunHistory(epochs=3.0, images_per_second=53.0)}
    found = estimate_durations(specs, seen, MANIFEST, PlanConfig())
    assert found.in_seconds
    assert found.values == pytest.approx((1060 / 53, 4 * 1060 / 53))
    # A statement is believed before.
    assert estimate_durations(specs, seen, MANIFEST, PlanConfig(images_per_second=106.0)).values[0] == pytest.approx(10)


def test_a_speed_measured_with_other_workers_is_converted() -> None:
    (run,) = specs = [spec(wide("a", 1, 0.1))]
    seen = {run.name: RunHistory(images_per_second=106.0, workers=2)}
    found = estimate_durations(specs, seen, MANIFEST, PlanConfig())
    assert found.values == pytest.approx((1060 / 53,))  # half as fast with one of two workers


def test_without_a_speed_or_data_durations_are_in_units_of_work() -> None:
    specs = [spec(wide("a", 2, 0.1)), spec(wide("b", 2, 0.2))]
    for manifest, config in ((MANIFEST, PlanConfig()), (None, PlanConfig(images_per_second=10.0))):
        found = estimate_durations(specs, {}, manifest, config)
        assert not found.in_seconds
        assert found.values[1] / found.values[0] == count_multiply_adds(specs[1]) / count_multiply_adds(specs[0])


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


def test_hours_of_what_is_used_and_of_the_whole_cluster() -> None:
    specs = [spec(recipe(name)) for name in "abc"]
    capacity = ClusterCapacity((Node(8, 1), Node(8, 1)))
    on_gpus = estimate.estimate_cost(plan_runs(specs, capacity, 1.0, [3600.0] * 3), capacity, 1.0)
    assert (on_gpus.hours, on_gpus.held_hours) == (3.0, 4.0)
    on_cpus = estimate.estimate_cost(plan_runs(specs, capacity, 0.0, [3600.0] * 3), capacity, 0.0)
    assert (on_cpus.hours, on_cpus.held_hours) == (3.0, 16.0)


def test_bytes_follow_parameters_retention_and_epochs() -> None:
    run = spec(recipe(epochs=10))
    found = estimate.estimate_storage(run, 10, 300.0, 4.0, MANIFEST)
    assert found.read == 4 * (100_000 + 30_000)
    assert found.kept > 2 * found.checkpoint  # and weights beside them
    assert found.written is not None
    assert found.written > 10 * found.checkpoint  # one every 30 s
    assert estimate.estimate_storage(run, 10, None, 4.0, None).written is None


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


def test_a_checkpoint_is_as_large_as_said(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    run = spec(recipe())
    from orchestrator.models import cost  # torch takes two seconds to import

    trained, _ = cost.measure_cost(run.recipe.model, 10)
    path = tmp_path / "state"
    torch.save({str(copy): torch.zeros(trained) for copy in range(3)}, path)
    assert path.stat().st_size == pytest.approx(estimate.estimate_storage(run, 10, 1.0, 1.0, None).checkpoint, rel=0.05)
