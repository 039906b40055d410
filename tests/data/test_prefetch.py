"""Reading ahead from a remote place: the same bytes, bounded memory, and one clear error for each failure."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from orchestrator.data import dataset as reader_module
from orchestrator.data import index, manifest, sampler
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.config import AugmentationConfig, OrderConfig, ReadingConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Shard
from orchestrator.data.sampler import EpochOrder
from tests.support import tiny_shards
from tests.support.tiny_shards import counts, kept

URL = "memory://read-ahead"
SAMPLES = 240


@pytest.fixture
def remote() -> Iterator[str]:
    write_dataset(
        URL,
        "many",
        tiny_shards.CLASSES,
        {"train": tiny_shards.samples(SAMPLES), "validation": tiny_shards.samples(9)},
        20,
    )
    yield URL
    fsspec.filesystem("memory").rm("/read-ahead", recursive=True)


def order(lanes: int = 6, window: int = 8, epoch: int = 0) -> EpochOrder:
    return EpochOrder(counts(manifest.load(URL)), 3, epoch, lanes, window)


def reader(**config: Any) -> SampleReader:
    return SampleReader(URL, manifest.load(URL), "train", ReadingConfig(**config))


def places(plan: EpochOrder, step: int) -> list[tuple[int, int]]:
    """Shard and number of each sample of a batch of 16."""
    shard, number = plan.locate(np.arange(step * 16, step * 16 + 16))
    return list(zip(shard.tolist(), number.tolist(), strict=True))


def test_remote_and_local_batches_are_the_same(remote: str, tmp_path: Path) -> None:
    found = write_dataset(str(tmp_path), "many", tiny_shards.CLASSES, {"train": tiny_shards.samples(SAMPLES)}, 20)
    local = BatchLoader(SampleReader(str(tmp_path), found, "train"), 16, 2)
    distant = BatchLoader(reader(), 16, 2)
    for start in (0, 7):
        one, other = (
            kept(each.iter_training(order(), AugmentationConfig(), 1, 16, range(start, 15)))
            for each in (local, distant)
        )
        assert len(one) == len(other) == 15 - start
        assert all(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(one, other, strict=True))
    evaluated = kept(distant.iter_evaluation(order().counts, 16, 1, 3))
    assert [one for batch in evaluated for one in batch.ids.tolist()] == list(range(80, 160))


def test_windows_are_read_once_and_released(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 4000)
    source = reader()
    plan, sizes = order(), []
    per_sample = sum(shard.bytes for shard in manifest.load(URL).shards("train")) / SAMPLES
    with source.open_prefetcher(sampler.plan_epoch(plan, 16, range(15), 0, 1)) as ahead:
        ahead._budget = int(10 * per_sample)
        for step in range(15):
            ahead.advance(step)
            for place in places(plan, step):
                ahead.get_sample(*place)
            held = {id(piece): len(piece.result()[1]) for piece, _ in ahead._pieces.values()}
            sizes.append(sum(held.values()))
        assert sizes[-1] == 0, "the last sample of the last window was taken"
    # Open windows, ten samples of later ones, and what rounding adds.
    assert max(sizes) <= (6 * 8 + 10 + 6) * per_sample
    total = sum(int(source.load_index(s).lengths.sum()) for s in range(12))
    primed = 2 * 16 * per_sample
    assert source.get_read_stats().bytes <= 1.9 * total + primed, (
        "each byte about once (the tars' headers lie between images)"
    )


@pytest.mark.parametrize("start", [0, 8])
def test_no_more_than_the_open_windows_is_read_to_begin(remote: str, start: int) -> None:
    source = reader()
    plan = order()
    windows = list(sampler.plan_epoch(plan, 16, range(start, 15), 0, 1))
    with source.open_prefetcher(iter(windows)) as ahead:
        ahead._budget = 0
        ahead.advance(start)
        for place in places(plan, start):
            ahead.get_sample(*place)
        opening = sum(ahead._estimate_bytes(span) for span in windows if span.step <= start and not span.is_single)
    singles = sum(ahead._estimate_bytes(span) for span in windows if span.is_single)
    assert source.get_read_stats().bytes <= opening + singles


def test_a_sample_outside_the_plan_is_read_all_the_same(remote: str) -> None:
    with reader().open_prefetcher(iter(())) as ahead:
        assert bytes(ahead.get_sample(11, 19).image) == tiny_shards.samples(SAMPLES)[-1].image


def test_a_sample_damaged_in_transfer_is_read_again(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = reader()
    plain, calls = source.read_into, []

    def damaging(shard: int, start: int, view: memoryview, bypass_cache: bool = False) -> None:
        plain(shard, start, view, bypass_cache)
        if not bypass_cache:
            view[len(view) // 2] ^= 1
            calls.append(shard)

    monkeypatch.setattr(source, "read_into", damaging)
    assert bytes(source.read(3, 3).image) == tiny_shards.samples(SAMPLES)[63].image
    assert calls == [3]


def test_a_shard_that_was_replaced_is_named(remote: str) -> None:
    other = [RawSample(one.key, one.image[:-3] + b"xyz", one.label) for one in tiny_shards.samples(20)]
    found = manifest.load(URL)
    write_dataset("memory://elsewhere", "x", tiny_shards.CLASSES, {"train": other}, 20)
    memory = fsspec.filesystem("memory")
    memory.pipe("/read-ahead/train/train-000000.tar", memory.cat("/elsewhere/train/train-000000.tar"))
    memory.rm("/elsewhere", recursive=True)
    loader = BatchLoader(SampleReader(URL, found, "train"), 16, 2)
    with pytest.raises(
        DataError, match=r"memory://read-ahead/train/train-000000.tar: sample 'sample-0.*' at byte \d+ does"
    ):
        kept(loader.iter_training(order(), AugmentationConfig(), 1, 16, range(15)))


@pytest.mark.parametrize("what", ["tar", "index", "cut"])
def test_a_missing_or_cut_file_is_named_and_nothing_hangs(remote: str, what: str) -> None:
    memory = fsspec.filesystem("memory")
    path = "/read-ahead/train/train-000004.tar"
    if what == "cut":
        memory.pipe(path, memory.cat(path)[:9000])
    else:
        memory.rm(path + (".index.json" if what == "index" else ""))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"train/train-000004.tar.*(missing|9000 bytes, the manifest)"):
        kept(BatchLoader(reader(), 16, 2).iter_training(order(), AugmentationConfig(), 1, 16, range(15)))
    assert time.monotonic() - began < 30


def test_more_windows_than_indexes_are_kept(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "CACHED_INDEXES", 2)
    loaded = []
    load = index.load

    def counting(url: str, shard: Shard) -> ShardIndex:
        loaded.append(shard.name)
        return load(url, shard)

    monkeypatch.setattr(index, "load", counting)
    kept(BatchLoader(reader(), 16, 2).iter_training(order(lanes=12, window=4), AugmentationConfig(), 1, 16, range(15)))
    assert len(loaded) == 12, "each once"


def test_closing_starts_no_more_reads(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 4000)
    source, begun = reader(streams=2), []
    plain = source.read_into

    def slow(shard: int, start: int, view: memoryview) -> None:
        begun.append(shard)
        time.sleep(0.05)
        plain(shard, start, view)

    monkeypatch.setattr(source, "read_into", slow)
    batches = BatchLoader(source, 16, 2).iter_training(order(), AugmentationConfig(), 1, 16, range(15))
    next(batches)
    before = len(begun)
    batches.close()  # type: ignore[attr-defined]
    assert before < 100, "else nothing was left to be read"
    # Two reads were under way, and the producer may have been a moment ahead of us.
    assert len(begun) <= before + 12


def test_windows_larger_than_the_free_memory_are_an_error(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = BatchLoader(reader(), 16, 1)
    config = OrderConfig(lanes=100, window=100)
    one.check_config(config, AugmentationConfig(), 1)
    monkeypatch.setattr(reader_module, "_read_available_memory", lambda: 1_000_000)
    with pytest.raises(DataError, match=r"the 10000 samples that a worker holds open are .* MiB .* lower order.window"):
        one.check_config(config, AugmentationConfig(), 1)
    one.check_config(config, AugmentationConfig(), 100)
    with pytest.raises(DataError, match="transform 'flip' is unknown"):
        one.check_config(config, AugmentationConfig(stages=("decode", "crop", "flip")), 100)
