"""End to end against decoding alone, and against webdataset: images per CPU-second, children counted.

End to end: shards on disk -> shuffled, decoded, random-resized-crop 224, mirrored uint8 batches in this process's
memory. A pass is one whole epoch of the photos; what lives through epochs (open files, indexes, the peer's processes)
is warm for all alike. Decode only: simplejpeg, the full image, from bytes in memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from statistics import median

import simplejpeg
import torch

from benchmarks import fidelity, frame, peer, photos
from benchmarks.frame import Figure
from orchestrator.data import manifest
from orchestrator.data.config import NO_PHOTOMETRIC, AugmentationConfig
from orchestrator.data.dataloader import Batch, BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.sampler import EpochOrder

SIZE, BATCH, SEED = 224, 256, 7
LANES, WINDOW = 16, 64  # 1,024 samples mixed at a time, as many as webdataset's buffer holds
ROUNDS = 5
# The peer crops, resizes and mirrors, and so do these; PAPER distorts colours too.
FOUR = AugmentationConfig(photometric=NO_PHOTOMETRIC)
BILINEAR = AugmentationConfig(interpolations=("bilinear",), photometric=NO_PHOTOMETRIC)
EXACT = AugmentationConfig(interpolations=("bilinear",), decoding="exact", photometric=NO_PHOTOMETRIC)
PAPER = AugmentationConfig()


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-data`."""
    url = photos.small(folder)
    torch.set_num_threads(
        1
    )  # torch's own threads spin while they wait, at the cost of the process that shares their core
    images = photos.images(url)
    # One thread on one core, where nothing gets in the way of anything; then two of each, as in use.
    for threads in (1, 2):
        with frame.pinned(frame.cores(threads)):
            yield from _ratios(url, images, threads)
    with frame.pinned(frame.cores(2)):
        yield from _against_processes(url)
    yield from fidelity.figures("data", url, 1024, lambda _: "small")


def _ratios(url: str, images: list[bytes], threads: int) -> Iterator[Figure]:
    setting = _best_setting(url, threads)
    parts: dict[str, Callable[[], object]] = {
        "decode_only": lambda: decode(images, threads),
        "bilinear": epochs(url, BILINEAR, threads),
        "four_interpolations": epochs(url, FOUR, threads),
        "photometric": epochs(url, PAPER, threads),
        "webdataset": _peer_pass(url, setting),
    }
    if threads == 1:
        parts["bilinear_exact"] = epochs(url, EXACT, threads)
        parts["decode_only_fast"] = lambda: decode(images, threads, fast=True)
    for part in parts.values():
        part()  # the first pass pays for what lives through epochs
    costs = frame.interleaved(parts, ROUNDS)
    cpu = {name: [taken.cpu for taken in found] for name, found in costs.items()}
    ending = f"{threads}_thread{'s' if threads > 1 else ''}"
    for name, found in costs.items():
        yield Figure(f"data.{name}.{ending}.images_per_cpu_s", len(images) / median(cpu[name]))
        yield Figure(f"data.{name}.{ending}.images_per_s", len(images) / median(one.wall for one in found))
    goals = {"bilinear": 0.80, "four_interpolations": 0.70}
    for name in parts:
        if name != "decode_only":
            figure = frame.ratio(cpu["decode_only"], cpu[name])
            yield Figure(f"data.{name}/decode_only.{ending}", figure, at_least=goals.get(name))
    yield Figure(f"data.webdataset.{ending}.best_workers", setting.workers)
    yield Figure(f"data.bilinear/webdataset.{ending}", frame.ratio(cpu["webdataset"], cpu["bilinear"]), at_least=1.25)


def decode(images: list[bytes], threads: int, fast: bool = False) -> None:
    """Decode all images in this many threads (simplejpeg lets go of the interpreter); fast: by the quick, rough DCT."""

    def some(start: int) -> None:
        for image in images[start::threads]:
            simplejpeg.decode_jpeg(image, fastdct=fast, fastupsample=fast)

    if threads == 1:
        return some(0)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(threads)))
    return None


def epochs(url: str, augmentation: AugmentationConfig, threads: int) -> Callable[[], None]:
    """A function that loads another whole epoch each time, by one reader and one loader."""
    packed = manifest.load(url)
    loader = BatchLoader(SampleReader(url, packed, photos.SPLIT), SIZE, threads)
    numbers = count()

    def one() -> None:
        order = EpochOrder(photos.counts(packed), SEED, next(numbers), LANES, WINDOW)
        steps = range(order.samples // BATCH)
        assert len(steps) * BATCH == order.samples, "an epoch's tail would be dropped, and with it work"
        got = delivered(loader.iter_training(order, augmentation, SEED, BATCH, steps))
        assert got == order.samples, f"{got} of {order.samples} samples came"

    return one


def delivered(batches: Iterator[Batch]) -> int:
    """Samples of all batches; raises AssertionError when one is bad or of the wrong shape."""
    number = 0
    for batch in batches:
        assert batch.images.dtype is torch.uint8 and batch.images.shape[1:] == (3, SIZE, SIZE), batch.images.shape
        assert batch.images[-1].any() and bool(batch.weights.all()), batch.bad
        number += len(batch.ids)
    return number


# ------------------------------------------------------------------ webdataset
def _best_setting(url: str, cores: int) -> peer.Setting:
    """The peer's best for so many cores, of one pass each: by CPU on one core; on two, by wall time.

    With two cores the least CPU would be that of one process alone: a core whose hyperthread sleeps is faster, and half
    of the images a second is what it costs. A process more than there are cores can only lose.
    """
    taken = {}
    for setting in peer.SETTINGS:
        if setting.workers <= cores:
            taken[setting] = frame.cost(_peer_pass(url, setting))
            frame.progress(f"webdataset, {setting}: {taken[setting].cpu:.2f} s of CPU, {taken[setting].wall:.2f} s")
    return min(taken, key=lambda setting: taken[setting].cpu if cores == 1 else taken[setting].wall)


def _peer_pass(url: str, setting: peer.Setting) -> Callable[[], None]:
    loader = peer.loader(url, BATCH, setting)

    def one() -> None:
        got = peer.delivered(iter(loader))
        assert got == photos.SMALL, f"{got} of {photos.SMALL} samples came"

    return one


# ------------------------------------------------------------------ threads or processes
def _against_processes(url: str) -> Iterator[Figure]:
    """Two threads, and two processes of one thread, each with every other lane (their batches stay: no hand-over)."""
    parts = {"threads": [(0, 1, 2)], "processes": [(0, 2, 1), (1, 2, 1)]}
    samples = 0
    rates: dict[str, list[float]] = {name: [] for name in parts}
    per_cpu: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(2):
        for name, shares in parts.items():
            with ThreadPoolExecutor(len(shares)) as pool:
                ends = list(pool.map(lambda share: frame.child("data", url, *share), shares))
            samples = sum(end["samples"] for end in ends)
            seconds = max(end["ended"] for end in ends) - min(end["started"] for end in ends)
            rates[name].append(samples / seconds)
            per_cpu[name].append(samples / sum(end["cpu"] for end in ends))
            frame.progress(f"two {name}: {rates[name][-1]:.0f} images/s, {per_cpu[name][-1]:.0f} per CPU-second")
    for name in parts:
        yield Figure(f"data.two_{name}.images_per_s", median(rates[name]))
        yield Figure(f"data.two_{name}.images_per_cpu_s", median(per_cpu[name]))
    yield Figure("data.two_threads/two_processes.images_per_s", frame.ratio(rates["threads"], rates["processes"]))


def share(url: str, rank: int, workers: int, threads: int) -> dict[str, float]:
    """One rank's part of an epoch after an epoch to warm up: samples, CPU seconds, when it began and ended."""
    packed = manifest.load(url)
    loader = BatchLoader(SampleReader(url, packed, photos.SPLIT), SIZE, threads)
    for epoch in range(2):
        order = EpochOrder(photos.counts(packed), SEED, epoch, LANES, WINDOW)
        cpu, started = time.process_time(), time.monotonic()
        steps = range(order.samples // BATCH)
        samples = delivered(loader.iter_training(order, BILINEAR, SEED, BATCH, steps, rank, workers))
    return {"samples": samples, "cpu": time.process_time() - cpu, "started": started, "ended": time.monotonic()}


if __name__ == "__main__":
    print(json.dumps(share(sys.argv[1], *map(int, sys.argv[2:]))))
