"""Resuming at half of an epoch against a cold start: seconds to the first batch, each in a fresh process.

From the local disk, and from S3 with 30 ms added to every request. Time runs from before the manifest is loaded to the
first batch in memory, imports not included. Bytes: all that is read until the windows which are open at the position
are there, against what those windows hold.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import numpy as np

from benchmarks import frame, photos
from benchmarks.frame import Figure
from benchmarks.s3 import store
from orchestrator.data import index, manifest, sampler
from orchestrator.data.config import AugmentationConfig, ReadingConfig
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.sampler import EpochOrder

COPIES = 2
# A batch is a part of what the windows hold that is primed; with the ImageNet preset it is a smaller one.
SIZE, THREADS, BATCH, SEED, LANES, WINDOW = 224, 2, 48, 7, 16, 64
ROUNDS = 5
QUIET_SECONDS, MOST_SECONDS = 1.0, 60.0


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-resume`."""
    local = photos.small(folder, COPIES)
    steps = photos.SMALL * COPIES // BATCH
    with store(local, []) as (remote, variables):
        yield from _starts("local", local, steps // 2, {})
        yield from _starts("s3", remote, steps // 2, variables)
        read = frame.child("resume", "bytes", remote, steps // 2, environment=variables)
    yield Figure("resume.s3.read_mb", read["read"] / 1e6)
    yield Figure("resume.s3.windows_mb", read["windows"] / 1e6)
    yield Figure("resume.s3.read/windows", read["read"] / read["windows"], at_most=1.0)


def _starts(name: str, url: str, half: int, variables: Mapping[str, str]) -> Iterator[Figure]:
    seconds: dict[int, list[float]] = {0: [], half: []}
    for turn in range(ROUNDS):
        for step in (0, half) if turn % 2 == 0 else (half, 0):
            found = frame.child("resume", "start", url, step, environment=variables)
            seconds[step].append(found["seconds"])
        frame.progress(f"{name}: cold {seconds[0][-1]:.2f} s, resumed {seconds[half][-1]:.2f} s")
    yield Figure(f"resume.{name}.cold_s", median(seconds[0]))
    yield Figure(f"resume.{name}.resumed_s", median(seconds[half]))
    yield Figure(f"resume.{name}.resumed/cold", frame.ratio(seconds[half], seconds[0]), at_most=1.5)


# ------------------------------------------------------------------ in a process of its own
def start(url: str, step: int) -> dict[str, Any]:
    """Seconds from nothing to the batch `step`."""
    began = time.perf_counter()
    packed = manifest.load(url)
    reader = SampleReader(url, packed, photos.SPLIT)
    order = _order(packed)
    steps = range(step, order.samples // BATCH)
    batches = BatchLoader(reader, SIZE, THREADS).iter_training(order, AugmentationConfig(), SEED, BATCH, steps)
    batch = next(batches)
    seconds = time.perf_counter() - began
    assert len(batch.ids) == BATCH and bool(batch.weights.all()), batch.bad
    batches.close()  # type: ignore[attr-defined]
    return {"seconds": seconds}


def windows(url: str, step: int) -> dict[str, Any]:
    """Bytes that are read at batch `step` until its open windows are in memory, and the bytes that these hold."""
    packed = manifest.load(url)
    # The least read-ahead there is: what opens later is not asked for here.
    reader = SampleReader(url, packed, photos.SPLIT, ReadingConfig(read_ahead_mib=1))
    order = _order(packed)
    plan = sampler.plan_epoch(order, BATCH, range(step, order.samples // BATCH), 0, 1)
    with reader.open_prefetcher(plan) as ahead:
        ahead.advance(step)
        read, since, deadline = -1, 0.0, time.monotonic() + MOST_SECONDS
        while reader.get_read_stats().bytes != read or time.monotonic() - since < QUIET_SECONDS:
            if reader.get_read_stats().bytes != read:
                read, since = reader.get_read_stats().bytes, time.monotonic()
            assert time.monotonic() < deadline, f"still reading after {MOST_SECONDS:g} s"
            time.sleep(0.05)
    return {"read": read, "windows": open_bytes(url, packed, order, step * BATCH)}


def open_bytes(url: str, packed: Manifest, order: EpochOrder, position: int) -> int:
    """Bytes of the tars that the windows hold which are open at a position of the epoch."""
    total = 0
    for lane in range(order.lanes):
        step = max(0, -(-(position - lane) // order.lanes))
        places = np.arange(*order.find_window(lane, step), dtype=np.int64) + order.lane_starts[lane]
        shards, numbers = order.locate_places(places)
        for shard in np.unique(shards).tolist():
            listing = index.load(url, packed.shards(photos.SPLIT)[shard])
            first, last = numbers[shards == shard][[0, -1]]
            total += int(listing.offsets[last] + listing.lengths[last] - listing.offsets[first])
    return total


def _order(packed: Manifest) -> EpochOrder:
    return EpochOrder(photos.counts(packed), SEED, 0, LANES, WINDOW)


if __name__ == "__main__":
    part = {"start": start, "bytes": windows}[sys.argv[1]]
    print(json.dumps(part(sys.argv[2], int(sys.argv[3]))))
