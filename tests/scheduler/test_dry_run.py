"""The order and totals that a dry run prints, and that it writes nothing."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.models import cost
from orchestrator.monitor.formatting import format_bytes
from orchestrator.ray_backend.cluster import ClusterCapacity, Node
from orchestrator.ray_backend.launch_errors import ClusterError
from orchestrator.ray_backend.run_spec import Destination, JobConfig, Placement
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.presets import googlenet_imagenet_wide
from orchestrator.scheduler import dry_run
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.dry_run import describe_differences, resolve_capacity
from orchestrator.scheduler.run_plan import RunHistory, plan_runs
from tests.support import tiny_shards
from tests.support.launched import recipe, spec, write_journal


def shown(folder: Path, recipes: list[Recipe], about: PlanConfig, **placement: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    dry_run.print_dry_run(config(folder, recipes[0], **placement), recipes, about, console)
    return console.export_text()


def config(folder: Path, of: Recipe, **placement: Any) -> JobConfig:
    destination = Destination(data=str(folder / "data"), storage=str(folder / "runs"))
    return JobConfig(recipe=of, destination=destination, placement=Placement(**placement))


def members(number: int) -> list[Recipe]:
    return [
        Recipe.from_dict({**recipe(f"net-m{n}").to_dict(), "batch_size": 4, "seeds": {"order": n, "dropout": n}})
        for n in range(1, number + 1)
    ]


TWO_SLOTS = PlanConfig(nodes=2, cpus_per_node=1.0, images_per_second=1.0, start_seconds=10.0, price_per_hour=3.6)


def cells(text: str, name: str) -> list[str]:
    """The row of the table of the order that begins so."""
    order = re.split(r"^order\s*$", text, flags=re.MULTILINE)[1]
    return [cell.strip() for cell in next(li for li in order.splitlines() if f" {name} " in li).split("\u2502")[1:-1]]


def test_the_order_times_and_costs_of_runs(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "data")
    text = shown(tmp_path, members(3), TWO_SLOTS)
    # Two epochs of 12 images and 5 to validate with, at one a second, after a start of 10 s.
    assert cells(text, "net-m1") == ["net-m1", "1", "1", "0:00", "0:37", "0:37"]
    assert cells(text, "net-m3")[1:] == ["1", "2", "0:37", "0:37", "1:15"]
    assert "time:       1:15, until " in text
    assert "CPU-hours used" in text
    assert "0.11 for those used, 0.15 for the cluster, at 3.6 for a CPU-hour" in text
    assert "2 node(s) with 2 CPUs and 0 GPUs in all, as stated" in text
    assert "a checkpoint takes up to" in text
    assert max(len(line) for line in text.splitlines() if line[:1] in "\u2502\u2503") <= 100
    assert "seeds 3" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_without_a_speed_times_are_relative(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "data")
    text = shown(tmp_path, members(3), PlanConfig(nodes=2, cpus_per_node=1.0))
    assert cells(text, "net-m3")[1:] == ["1", "2", "1.00", "1.00", "2.00"]
    assert "2.00, in times of the shortest model" in text
    assert "--plan.images-per-second" in text
    assert "hours:" not in text


def test_epochs_trained_before_count(tmp_path: Path) -> None:
    found = tiny_shards.dataset(tmp_path / "data")
    recipes = members(2)
    made = config(tmp_path, recipes[0])
    run = made.build_run_spec(recipes[0], made.destination.resolve(), found.digest())
    figures = {"train/epoch": 1.0, "train/loss": 1.0, "train/images_per_second": 2.0}
    started = ("started", 0, {"attempt": 1, "resumed": False, "samples_per_epoch": 12, "workers": 1})
    write_journal(run.folder, 1, [started, ("epoch", 12, figures)])
    text = shown(tmp_path, recipes, PlanConfig(nodes=1, cpus_per_node=1.0, start_seconds=0.0))
    # One epoch of two is left at the measured two images a second; the other model goes by the same speed.
    assert cells(text, "net-m1")[4] == "0:07"
    assert cells(text, "net-m2")[4] == "0:14"


def test_a_cluster_without_room_is_an_error_that_describes_it(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "data")
    with pytest.raises(ClusterError, match=r"not one run fits the cluster; set .*; the plan is for 2 node\(s\)"):
        shown(tmp_path, members(2), TWO_SLOTS, workers=3)


def test_the_cluster_is_this_machine_when_none_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    capacity, text = resolve_capacity(PlanConfig())
    assert len(capacity.nodes) == 1
    assert capacity.cpus >= 1
    assert "this machine" in text


def test_differences_without_a_column_of_their_own_are_named() -> None:
    base = googlenet_imagenet_wide()
    area = base.augmentation.model_copy(update={"area": (0.08, 0.77)})
    other = base.model_copy(update={"name": "other", "augmentation": area, "epochs": 9, "batch_size": 32})
    assert describe_differences([base, other]) == [f"batch_size {base.batch_size}", "batch_size 32"]
    assert describe_differences([base]) == [""]
    assert describe_differences(members(2)) == ["seeds 1", "seeds 2"]


def test_hours_of_runs_and_of_the_whole_cluster() -> None:
    specs = [spec(recipe(name)) for name in "abc"]
    capacity = ClusterCapacity((Node(8, 1), Node(8, 1)))
    for gpus, hours in ((1.0, (3.0, 4.0)), (0.0, (3.0, 16.0))):
        plan = plan_runs(specs, capacity, gpus, [3600.0] * 3)
        assert dry_run.estimate_hours(plan, capacity, gpus) == hours


def test_bytes_follow_parameters_retention_and_epochs(tmp_path: Path) -> None:
    dataset = tiny_shards.dataset(tmp_path / "data")
    run = spec(recipe(epochs=10))
    plan = plan_runs([run], ClusterCapacity((Node(1, 0),)), 0.0, [300.0])
    checkpoint, weights = dry_run.estimate_bytes(run.recipe.model, len(dataset.classes))
    kept = run.cadence.keep_checkpoints * checkpoint + 2 * weights
    written = 10 * checkpoint + (1 + 4) * weights  # a checkpoint every 30 s, four epochs are left
    read = 4 * sum(part.bytes for name in dataset.splits for part in dataset.shards(name))
    assert dry_run._format_storage(plan, {run.name: RunHistory(epochs=6.0)}, dataset) == [
        f"weights:    {format_bytes(kept)} kept, up to {format_bytes(written)} written; "
        f"a checkpoint takes up to {format_bytes(checkpoint)}",
        f"reading:    up to {format_bytes(read)} of data; a cache on the nodes saves most",
    ]


def test_a_checkpoint_is_as_large_as_estimated(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = recipe().model
    trained = cost.measure_cost(model, 10)[0]
    path = tmp_path / "state"
    torch.save({str(copy): torch.zeros(trained) for copy in range(3)}, path)
    assert path.stat().st_size == pytest.approx(dry_run.estimate_bytes(model, 10)[0], rel=0.05)
