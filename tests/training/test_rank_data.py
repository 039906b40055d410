"""Several processes train one run: what is wrong with the data of one of them, and what all were given together."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.dataset import Prefetcher
from orchestrator.data.sampler import select_rank_positions
from orchestrator.storage import file_io
from orchestrator.training.config import TrainJob
from tests.support import runs, tiny_shards
from tests.support.ranks import Ranks
from tests.support.runs import ask_to_stop, events, job, recipe, stop_asking, train_by

pytestmark = pytest.mark.process


# ------------------------------------------------------------------ data that one rank cannot read
def missing(tar: Path) -> None:
    tar.unlink()


def truncated(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:600])


def flipped(tar: Path) -> None:
    tiny_shards.flip_byte(tar, tar.read_bytes().index(b"\xff\xd8") + 100)  # within the JPEG


@pytest.mark.parametrize("harm", [missing, truncated, flipped])
@pytest.mark.parametrize("pulse_steps", [2, 1000], ids=["at a pulse", "at the epoch's end"])
def test_data_that_one_rank_cannot_read_ends_all_ranks_alike(
    tmp_path: Path, ranks: Ranks, harm: Callable[[Path], None], pulse_steps: int
) -> None:
    """One sample a shard, so that one rank alone meets the damage, in the middle of the first epoch."""
    data = tmp_path / "data"
    tiny_shards.dataset(data, train=48, per_shard=1)
    one = job(data, tmp_path / "run", recipe(), pulse_steps=pulse_steps, checkpoint_seconds=0.001)
    met = 3  # the step of the first epoch that is given the harmed sample
    shard = int(runs.plan(one, 0).locate(select_rank_positions(met, 8, 8, 1, 2))[0][0])
    name = f"train-{shard:06d}.tar"
    harm(data / "train" / name)
    outcomes = train_by(ranks, 2, one)
    assert [outcome.status for outcome in outcomes] == ["bad-data"] * 2
    assert outcomes[0].message == outcomes[1].message
    assert name in outcomes[0].message
    assert "reported by rank 1 of 2" in outcomes[0].message
    assert outcomes[0].samples == (4 if pulse_steps == 2 else 6) * 8, "within a pulse"
    assert all(samples <= met * 8 for samples in runs.saved_at(one)), "nothing is saved after the failure"
    assert runs.outcome(one) == outcomes[0]
    assert file_io.list_names(file_io.join(one.folder, "tracebacks")) == [], "no crash, which would be retried"


def test_validation_data_that_one_rank_cannot_read_ends_all_ranks_alike(tmp_path: Path, ranks: Ranks) -> None:
    data = tmp_path / "data"
    splits = {"train": tiny_shards.samples(16), "validation": tiny_shards.samples(6, 500)}
    write_dataset(str(data), "x", tiny_shards.CLASSES, splits, 1)
    (data / "validation" / "validation-000005.tar").unlink()
    one = job(data, tmp_path / "run", recipe())
    outcomes = train_by(ranks, 2, one)
    assert [outcome.status for outcome in outcomes] == ["bad-data"] * 2
    assert outcomes[0].message == f"{outcomes[1].message} (reported by rank 1 of 2)"
    assert "validation-000005.tar" in outcomes[0].message


def test_storage_that_fails_is_a_crash(small: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Another attempt may find the network mended, so it is no outcome."""
    one = job(small, tmp_path, recipe(epochs=1))
    found = ranks.run(_without_storage, 2, one.to_dict(), collective_seconds=5)
    assert all(isinstance(raised, RuntimeError) for raised in found)
    assert "the network is down" in all_tracebacks(one)
    assert not file_io.exists(file_io.join(one.folder, "outcome.json"))


def _without_storage(rank: int, workers: int, payload: dict[str, Any]) -> dict[str, Any]:
    def failing(*_: object) -> None:
        raise file_io.StorageError("the network is down")

    if rank == 0:
        return runs.train_on_rank(rank, workers, payload)
    with patch.object(Prefetcher, "get_sample", failing):
        return runs.train_on_rank(rank, workers, payload)


# ------------------------------------------------------------------ what was delivered
def test_two_ranks_then_three_see_the_global_batches_of_one(small: Path, tmp_path: Path, ranks: Ranks) -> None:
    alone = job(small, tmp_path / "alone", recipe())
    assert runs.train(alone).status == "finished"
    one = job(small, tmp_path / "first", recipe(), pulse_steps=5)
    ask_to_stop(one)
    before = noted(ranks, 2, one)
    stop_asking(one)
    # The same checkpoint, resumed by two and by three.
    copied = one.model_copy(update={"folder": str(tmp_path / "second"), "stop_flag": str(tmp_path / "second" / "stop")})
    shutil.copytree(one.folder, copied.folder)
    by_two, by_three = noted(ranks, 2, one), noted(ranks, 3, copied)
    assert sorted(before) == list(range(5))
    assert sorted(by_two) == list(range(5, 18))
    assert by_two == by_three
    for step, ids in {**before, **by_three}.items():
        order = runs.plan(one, step // 6)
        expected = order.get_sample_ids(*order.locate(select_rank_positions(step % 6, 8, 8, 0, 1)))
        assert ids == sorted(expected.tolist())
    for each in (one, copied):
        assert runs.as_planned(each)
        assert runs.delivered(each) == runs.delivered(alone)


def noted(ranks: Ranks, workers: int, of: TrainJob) -> dict[int, list[int]]:
    """Of an attempt, the ids that step() was given in each global batch, over all ranks."""
    together: dict[int, list[int]] = {}
    for found in ranks.run(runs.train_and_note, workers, of.to_dict()):
        if isinstance(found, Exception):
            raise found
        for step, ids in found[1].items():
            together[step] = sorted([*together.get(step, []), *ids])
    return together


def harmed(folder: Path, bad: int) -> None:
    """24 training samples, of which so many are broken."""
    broken = [RawSample(f"broken-{n:02d}", b"no image", 0) for n in range(bad)]
    splits = {"train": [*tiny_shards.samples(24 - bad), *broken], "validation": tiny_shards.samples(2, 500)}
    write_dataset(str(folder), "x", tiny_shards.CLASSES, splits, 4)


def test_bad_samples_of_all_ranks_are_named_whoever_had_them(tmp_path: Path, ranks: Ranks) -> None:
    harmed(tmp_path / "data", bad=3)
    records = []
    for workers in (1, 3):
        one = job(tmp_path / "data", tmp_path / f"by-{workers}", recipe(epochs=2), pulse_steps=2)
        assert train_by(ranks, workers, one)[0].metrics["train/bad_samples"] == 3
        assert [event.values["train/bad_samples"] for event in events(one, "epoch")] == [3, 3]
        logged = events(one, "bad-sample")
        assert {event.values["key"] for event in logged} == {"broken-00", "broken-01", "broken-02"}
        assert len(logged) == 3, "once in a run, not in each epoch"
        assert runs.as_planned(one)
        records.append(runs.delivered(one))
    assert records[0] == records[1]
    assert [len(epoch.bad) for epoch in records[0].epochs] == [3, 3]


def test_too_many_bad_samples_end_all_ranks_alike(tmp_path: Path, ranks: Ranks) -> None:
    harmed(tmp_path / "data", bad=15)
    messages = set()
    for workers in (1, 2):
        one = job(tmp_path / "data", tmp_path / f"by-{workers}", recipe())
        outcomes = train_by(ranks, workers, one)
        assert [outcome.status for outcome in outcomes] == ["bad-data"] * workers
        messages |= {outcome.message for outcome in outcomes}
    (message,) = messages
    assert "more than the 10 that max_bad_share 0.001 allows" in message
    assert "'broken-" in message
    assert "train-00000" in message


def all_tracebacks(of: TrainJob) -> str:
    folder = file_io.join(of.folder, "tracebacks")
    return "".join(file_io.read_bytes(file_io.join(folder, name)).decode() for name in file_io.list_names(folder))
