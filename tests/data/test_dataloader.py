"""Batches: the planned samples, the same pixels for any workers and threads, and nothing left behind."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data import manifest
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import DECODING_BATCHES, READY_BATCHES, Batch, BatchLoader
from orchestrator.data.dataset import Prefetcher, SampleReader
from orchestrator.data.transforms import random_resized_crop
from orchestrator.data.transforms.decode import Image, decode_image, decode_top_rows
from orchestrator.data.transforms.multi_crop import ONE_CROP, cut_crops
from tests.support import tiny_shards
from tests.support.tiny_shards import counts, kept, loader, order, training

BATCH = 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_shards.dataset(folder)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    tiny_shards.dataset(folder, train=60)
    return folder


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(all(map(torch.equal, a[:4], b[:4])) for a, b in zip(one, other, strict=True))


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("loader", "decode", "read"))]


def by_id(batches: list[Batch]) -> dict[int, tuple[bytes, int, float]]:
    found: dict[int, tuple[bytes, int, float]] = {}
    for batch in batches:
        for image, label, weight, one in zip(*batch[:4], strict=True):
            assert int(one) not in found, "a sample twice"
            found[int(one)] = (image.numpy().tobytes(), int(label), float(weight))
    return found


# ------------------------------------------------------------------ what a batch is
def test_shapes_types_and_memory(packed: Path) -> None:
    for batch in training(packed, range(3)):
        assert batch.images.shape == (BATCH, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.labels.dtype, batch.weights.dtype, batch.ids.dtype) == (torch.int64, torch.float32, torch.int64)
        assert batch.weights.tolist() == [1.0] * BATCH
        assert batch.labels.tolist() == [one % 3 for one in batch.ids.tolist()], "the label of that id"


def test_ids_are_those_of_the_plan(packed: Path) -> None:
    plan = order(manifest.load(str(packed)))
    wanted = plan.get_sample_ids(*plan.locate(np.arange(12))).tolist()
    assert [int(one) for batch in kept(training(packed, range(3))) for one in batch.ids] == wanted


def test_epochs_show_the_same_sample_differently(packed: Path) -> None:
    first, second = (by_id(kept(training(packed, range(3), epoch=epoch))) for epoch in (0, 1))
    common = first.keys() & second.keys()
    assert len(common) >= 8
    assert all(first[one][0] != second[one][0] for one in common)


# ------------------------------------------------------------------ resume, workers, threads
@pytest.mark.parametrize("start", [0, 1, 7, 14, 15])
def test_a_resumed_run_gives_the_tail_of_the_full_one(many: Path, start: int) -> None:
    assert same(kept(training(many, range(start, 15))), kept(training(many, range(15)))[start:])


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_sees_the_same_samples_and_pixels(many: Path, workers: int) -> None:
    alone = kept(training(many, range(15)))
    ranks = [kept(training(many, range(15), rank, workers)) for rank in range(workers)]
    for step, whole in enumerate(alone):
        together: dict[int, tuple[bytes, int, float]] = {}
        for rank in ranks:
            together |= by_id([rank[step]])
        assert sum(len(rank[step].ids) for rank in ranks) == BATCH
        assert together == by_id([whole])


def test_threads_change_nothing(many: Path) -> None:
    assert same(kept(training(many, range(15), threads=1)), kept(training(many, range(15), threads=3)))


def test_a_rank_may_have_no_sample_in_a_step(packed: Path) -> None:
    plan = order(manifest.load(str(packed)), lanes=5)
    ranks = [
        kept(loader(packed).iter_training(plan, AugmentationConfig(), 1, 3, range(4), rank, 3)) for rank in range(3)
    ]
    sizes = [[len(batch.ids) for batch in rank] for rank in ranks]
    assert [sum(step) for step in zip(*sizes, strict=True)] == [3] * 4
    assert 0 in [size for rank in sizes for size in rank], "else this test shows nothing"


# ------------------------------------------------------------------ evaluation
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 20])
def test_evaluation_sees_each_sample_exactly_once(packed: Path, workers: int) -> None:
    found = manifest.load(str(packed))
    seen: dict[int, tuple[bytes, int, float]] = {}
    for rank in range(workers):
        part = by_id(kept(loader(packed).iter_evaluation(counts(found), 3, rank, workers)))
        assert not seen.keys() & part.keys()
        seen |= part
    assert list(sorted(seen)) == list(range(13))
    for one, sample in enumerate(tiny_shards.samples(13)):
        wanted = np.empty((16, 16, 3), dtype=np.uint8)
        cut_crops(decode_image(sample.image), 16, ONE_CROP, wanted[None])
        assert seen[one] == (torch.from_numpy(wanted).permute(2, 0, 1).numpy().tobytes(), sample.label, 1.0)


def test_evaluation_of_nothing_and_of_empty_shards(packed: Path) -> None:
    assert kept(loader(packed).iter_evaluation((), 3)) == []
    ids = [batch.ids.tolist() for batch in kept(loader(packed).iter_evaluation((4, 4, 4, 1), 5))]
    assert ids == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12]]


# ------------------------------------------------------------------ the ledger
def test_a_broken_image_goes_to_the_ledger_and_harms_no_other(tmp_path: Path, packed: Path) -> None:
    broken = tiny_shards.samples(13)
    broken[5] = RawSample(broken[5].key, broken[5].image[:-60], broken[5].label)
    broken[9] = RawSample(broken[9].key, b"", broken[9].label)
    found = tiny_shards.dataset(tmp_path, broken)
    good = by_id(kept(loader(packed).iter_evaluation(counts(found), 4)))
    one = loader(tmp_path)
    batches = kept(one.iter_evaluation(counts(found), 4))
    got, bad = by_id(batches), [entry for batch in batches for entry in batch.bad]
    assert [entry.id for entry in bad] == [5, 9]
    assert got.keys() == good.keys()
    for number, value in got.items():
        black = (bytes(3 * 16 * 16), number % 3, 0.0)
        assert value == (black if number in (5, 9) else good[number])
    ledger = {entry.key: entry for entry in bad}
    assert set(ledger) == {"sample-005", "sample-009"}
    assert ledger["sample-005"].source == str(tmp_path / "train/train-000001.tar")
    assert "broken JPEG" in ledger["sample-005"].reason
    tar = (tmp_path / "train/train-000001.tar").read_bytes()
    assert tar[ledger["sample-005"].offset :].startswith(broken[5].image)


def test_imagenets_oddities_are_loaded(tmp_path: Path) -> None:
    odd = [tiny_shards.encoded("RGB", "PNG"), tiny_shards.encoded("L", "JPEG"), tiny_shards.encoded("CMYK", "JPEG")]
    found = tiny_shards.dataset(tmp_path, [RawSample(f"odd{n}", image, n) for n, image in enumerate(odd)])
    one = loader(tmp_path)
    (batch,) = kept(one.iter_evaluation(counts(found), 4))
    assert batch.weights.tolist() == [1.0] * 3
    assert batch.bad == ()
    assert (batch.images[0].float() - batch.images[2].float()).abs().mean() < 8


# ------------------------------------------------------------------ threads and buffers
def closed(batches: Any) -> None:
    next(batches)
    batches.close()


def broken_out(batches: Iterator[Batch]) -> None:
    for _ in batches:
        break


def raised_in(batches: Iterator[Batch]) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in batches:
            raise ZeroDivisionError


@pytest.mark.parametrize("leave", [closed, broken_out, raised_in, kept])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_thread_outlives_its_consumer(many: Path, leave: Callable[[Iterator[Batch]], object], threads: int) -> None:
    assert our_threads() == []
    batches = training(many, range(15), threads=threads)
    assert our_threads() == [], "nothing starts before the first batch is wanted"
    leave(batches)
    del batches
    deadline = time.monotonic() + 5
    while our_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert our_threads() == []


@pytest.mark.parametrize("threads", [1, 3])
def test_the_producers_error_reaches_the_consumer(tmp_path: Path, threads: int) -> None:
    found = tiny_shards.dataset(tmp_path, train=60)
    last = tmp_path / found.shards("train")[9].name
    tiny_shards.flip_byte(last, 1700)
    batches = loader(tmp_path, threads=threads).iter_evaluation(counts(found), 4)
    got = [next(batches).ids.tolist() for _ in range(9)]
    assert got[-1] == [32, 33, 34, 35], "what came before it is delivered"
    with pytest.raises(DataError, match=f"{last.name}: sample .* does not have the checksum in the index"):
        next(batches)
    assert our_threads() == []


def test_a_batch_stays_valid_until_the_next_but_one_is_asked_for(many: Path) -> None:
    batches = training(many, range(15))
    current = next(batches)
    copy = current.images.clone()
    places = {current.images.data_ptr()}
    for following in batches:
        time.sleep(0.02)  # let the producer run ahead as far as it may
        assert torch.equal(current.images, copy)
        current, copy = following, following.images.clone()
        places.add(current.images.data_ptr())
    assert len(places) == READY_BATCHES + DECODING_BATCHES + 3, (
        "buffers are used in turn, or the contract would cost nothing"
    )


def test_the_producer_waits_for_its_consumer(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = loader(many)
    asked = []
    take = Prefetcher.get_sample

    def noting(ahead: Prefetcher, shard: int, number: int) -> Any:
        asked.append(number)
        return take(ahead, shard, number)

    monkeypatch.setattr(Prefetcher, "get_sample", noting)
    batches = one.iter_evaluation((4,) * 15, 4)
    next(batches)
    time.sleep(0.3)
    assert len(asked) <= (1 + READY_BATCHES + 1 + DECODING_BATCHES) * 4, (
        "one at the consumer's, the queue, one put, those decoded"
    )
    assert len(kept(batches)) == 14


def test_a_sample_that_takes_long_to_decode_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    plain = decode_top_rows

    def slow(*arguments: Any) -> Image:
        begun.set()
        go_on.wait(30)
        return plain(*arguments)

    monkeypatch.setattr(random_resized_crop, "decode_top_rows", slow)
    found = manifest.load(str(packed))
    one = BatchLoader(SampleReader(str(packed), found, "train"), 16, 1)
    batches = one.iter_training(order(found), AugmentationConfig(), 0, BATCH, range(1))
    reading = threading.Thread(target=lambda: kept(batches))
    reading.start()
    assert begun.wait(30)
    (named,) = one.describe_decoding(0.0)
    assert re.match(r"sample 'sample-\d+' of .*\.tar at byte \d+, decoded for \d+ s", named)
    assert one.describe_decoding(1000.0) == []
    go_on.set()
    reading.join()
    assert one.describe_decoding(0.0) == []
    one.close()
