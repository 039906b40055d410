"""Several processes train one run: exact resume, the same result for any number of them, outcomes on all of them."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.overrides import apply_overrides
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.sampler import select_rank_positions
from orchestrator.recipe.config import Recipe
from orchestrator.training.config import Outcome, TrainJob
from orchestrator.training.distributed import DistributedContext
from tests.support import runs, tiny_shards
from tests.support.ranks import Ranks
from tests.support.runs import ask_to_stop, events, farthest, final, identical, job, recipe, stop_asking, train_by

pytestmark = pytest.mark.process

# Weights after 18 steps, as a share of the largest of their tensor. Only the order of sums differs: each step adds a
# few units of 2^-24 = 6e-8 (3e-6 was measured in all). Another mask or a lost sample is far above it, see below.
ROUNDING = 2e-5


def errors(outcome: Outcome) -> dict[str, float]:
    """Wrong ones of the 5 validation samples."""
    return {
        name: value * 5 / 100
        for name, value in outcome.metrics.items()
        if name.startswith("validation/") and not name.endswith("_loss")
    }


@pytest.fixture(scope="module")
def whole(small: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, TrainJob]:
    """The same run by 1, 2 and 3 processes, nothing interrupted."""
    done = {}
    for workers in (1, 2, 3):
        done[workers] = job(small, tmp_path_factory.mktemp(f"by-{workers}"), recipe())
        assert [one.status for one in train_by(ranks, workers, done[workers])] == ["finished"] * workers
    return done


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_weights(whole: dict[int, TrainJob], workers: int) -> None:
    difference = farthest(final(whole[1]), final(whole[workers]))
    assert difference < ROUNDING
    alone, together = errors(runs.outcome(whole[1])), errors(runs.outcome(whole[workers]))
    assert alone.keys() == together.keys()
    assert len(alone) == 5, "two errors of each set of weights, and the broken images"
    for name, wrong in alone.items():
        assert together[name] == pytest.approx(round(together[name]), abs=1e-9), "counted in whole samples"
        assert abs(together[name] - wrong) < 1.5, "a sample on the edge may fall on its other side"
    assert runs.as_planned(whole[workers])
    assert runs.delivered(whole[workers]) == runs.delivered(whole[1])
    losses = [[event.values["train/loss"] for event in events(one, "epoch")] for one in (whole[1], whole[workers])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("change", [{"seeds.dropout": 1}, {"seeds.augmentation": 1}, {"order.window": 5}])
def test_the_tolerance_would_tell_other_masks_crops_and_orders(
    small: Path, tmp_path: Path, whole: dict[int, TrainJob], change: dict[str, object]
) -> None:
    other = job(small, tmp_path, apply_overrides(recipe(), change))
    assert runs.train(other).status == "finished"
    assert farthest(final(whole[1]), final(other)) > 20 * ROUNDING


@pytest.mark.parametrize("workers", [2, 3])
def test_stopped_and_resumed_equals_never_stopped(
    small: Path, tmp_path: Path, ranks: Ranks, whole: dict[int, TrainJob], workers: int
) -> None:
    """From 3 ranks on it takes the settling passes: without them the first resumed step sums in another order."""
    one = job(small, tmp_path, recipe(), pulse_steps=5)
    ask_to_stop(one)
    for _ in range(2):
        found = train_by(ranks, workers, one)
        assert {outcome.status for outcome in found} == {"stopped"}
        assert len({outcome.attempt for outcome in found}) == 1
    stop_asking(one)
    assert {(outcome.status, outcome.attempt) for outcome in train_by(ranks, workers, one)} == {("finished", 3)}
    assert identical(final(one), final(whole[workers]))


def test_a_run_goes_on_with_another_number_of_workers(
    small: Path, tmp_path: Path, ranks: Ranks, whole: dict[int, TrainJob]
) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=5)
    ask_to_stop(one)
    for workers in (2, 3):
        assert train_by(ranks, workers, one)[0].status == "stopped"
    stop_asking(one)
    assert train_by(ranks, 1, one)[0].status == "finished"
    assert [event.values["workers"] for event in events(one, "started")] == [2, 3, 1]
    assert farthest(final(one), final(whole[1])) < ROUNDING


def sparse() -> Recipe:
    """Batches so small that not every rank of three has a sample in every one."""
    one = apply_overrides(recipe(epochs=1), {"batch_size": 3})
    shares = [[len(select_rank_positions(step, 3, 8, rank, 3)) for rank in range(3)] for step in range(8)]
    assert any(0 in share for share in shares), "or the test tests nothing"
    return one


def test_a_rank_without_a_sample_takes_part(tmp_path: Path, ranks: Ranks) -> None:
    data = tmp_path / "data"
    broken = [RawSample(f"broken-{n}", b"no image", 0) for n in range(2)]
    write_dataset(
        str(data), "x", tiny_shards.CLASSES,
        {"train": [*tiny_shards.samples(22), *broken], "validation": tiny_shards.samples(2, 500)}, 4,
    )  # fmt: skip
    done = []
    for workers in (1, 3):
        one = job(data, tmp_path / f"by-{workers}", sparse())
        outcomes = train_by(ranks, workers, one)
        assert {outcome.status for outcome in outcomes} == {"finished"}
        for outcome in outcomes:
            assert outcome.metrics["train/bad_samples"] == 2, "on whichever rank they were"
        done.append(one)
    assert farthest(final(done[0]), final(done[1])) < ROUNDING


def test_a_rate_that_diverges_ends_all_ranks(small: Path, tmp_path: Path, ranks: Ranks) -> None:
    one = job(small, tmp_path, apply_overrides(recipe(), {"schedule.base_rate": 100.0}), pulse_steps=4)
    assert [outcome.status for outcome in train_by(ranks, 3, one)] == ["diverged"] * 3
    assert runs.outcome(one).status == "diverged"


def test_a_finished_run_is_finished_for_all_ranks(ranks: Ranks, whole: dict[int, TrainJob]) -> None:
    before = len(events(whole[3]))
    assert {outcome.status for outcome in train_by(ranks, 3, whole[3])} == {"finished"}
    assert len(events(whole[3])) == before


def test_more_workers_than_lanes_is_bad_data_on_all_ranks(small: Path, tmp_path: Path, ranks: Ranks) -> None:
    one = job(small, tmp_path, apply_overrides(recipe(), {"order.lanes": 2}))
    found = train_by(ranks, 3, one)
    assert [outcome.status for outcome in found] == ["bad-data"] * 3
    assert "order.lanes" in found[0].message


def _texts(rank: int, workers: int, texts: list[str]) -> list[str]:
    return DistributedContext(rank, workers, runs.CPU).all_gather_text(texts[rank])


@pytest.mark.parametrize("texts", [["one", "", "zwölf \ud800"], ["", "", ""]])
def test_texts_of_all_ranks(ranks: Ranks, texts: list[str]) -> None:
    shown = [text.replace("\ud800", "\\ud800") for text in texts]
    assert ranks.run(_texts, 3, texts) == [shown] * 3
    assert ranks.run(_texts, 1, texts) == [texts[:1]]


def _sums(rank: int, workers: int, values: list[float]) -> Any:
    world = DistributedContext(rank, workers, runs.CPU)
    return (
        list(world.all_reduce_sums(tuple(value * (rank + 1) for value in values))),
        world.is_any(world.is_rank_zero),
        world.is_any(False),
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_collectives(ranks: Ranks, workers: int) -> None:
    factor = workers * (workers + 1) // 2
    # 2^40 + 1 has no float32.
    expected = ([factor * (2.0**40 + 1), 0.0], True, False)
    assert ranks.run(_sums, workers, [2.0**40 + 1, 0.0]) == [expected] * workers
