"""Planning an epoch of 10^9 samples in 10^5 shards, in a fresh process, and what a batch then costs.

Planned means: the manifest loaded, the split's reader made, and at a random position of an epoch the first batch
located and the windows that are open there listed. Time runs from before the process's start, imports included; memory
is the process's peak until then. Planning needs no torch; that of a loader's process with torch is printed beside it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import frame
from benchmarks.frame import Figure
from orchestrator.data import manifest, rng, sampler
from orchestrator.data.config import OrderConfig
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.sampler import EpochOrder, count_steps, select_rank_positions
from orchestrator.data.transforms.random_resized_crop import DRAWS

PER_SHARD, SHARD_BYTES = 10_000, 1_100_000_000
SHARDS, FEW_SHARDS = 100_000, 100
BATCH, LARGE_BATCH = 256, 4096
REPEATS = 3
SPLIT = "train"


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-plan`."""
    many, few = (_dataset(os.path.join(folder, f"plan-{shards}"), shards) for shards in (SHARDS, FEW_SHARDS))
    random.seed(7)
    found = [_planned(many, random.random()) for _ in range(REPEATS)]
    yield Figure("plan.manifest_mb", os.path.getsize(os.path.join(many, manifest.FILE_NAME)) / 1e6)
    for part in ("imports", "manifest", "reader", "position"):
        yield Figure(f"plan.{part}_s", max(one[part] for one in found))
    yield Figure("plan.seconds", max(one["seconds"] for one in found), at_most=10)
    yield Figure("plan.peak_mb", max(one["peak_mb"] for one in found), at_most=500)
    yield Figure("plan.peak_with_torch_mb", _planned(many, 0.5, "orchestrator.data.dataloader")["peak_mb"])
    small = _planned(few, 0.5)
    for place, microseconds in found[0]["per_sample"].items():
        yield Figure(f"plan.microseconds_per_sample.{place}", microseconds)
    yield Figure("plan.microseconds_per_sample.of_10^6_samples", small["per_sample"]["middle"])
    # A batch costs O(B): not more per sample when it is large, nor (but for a bisection) when the epoch is.
    pairs = [(one["per_sample"]["large_batches"], one["per_sample"]["middle"]) for one in found]
    yield Figure("plan.large_batch/small_batch", min(large / usual for large, usual in pairs), at_most=1.5)
    least = min(one["per_sample"]["middle"] for one in found)
    yield Figure("plan.10^9_samples/10^6_samples", least / small["per_sample"]["middle"], at_most=2)


def _dataset(url: str, shards: int) -> str:
    """The folder of a manifest of so many shards, which are not there."""
    frame.progress(f"writing a manifest of {shards} shards")
    listed = tuple(
        Shard(
            name=f"{SPLIT}/{SPLIT}-{number:06d}.tar",
            samples=PER_SHARD,
            bytes=SHARD_BYTES + number,
            sha256=f"{number:064x}",
            index_sha256=f"{-number % 2**256:064x}",
        )
        for number in range(shards)
    )
    classes = tuple(f"n{number:08d}" for number in range(1000))
    manifest.save(url, Manifest(name="plan", classes=classes, splits={SPLIT: listed}))
    return url


def _planned(url: str, position: float, *modules: str) -> dict[str, Any]:
    began = time.monotonic()
    found: dict[str, Any] = frame.child("plan", url, position, *modules)
    found["imports"] = found["started"] - began
    found["seconds"] = found["ended"] - began
    frame.progress(f"planned at {position:.0%} in {found['seconds']:.1f} s, {found['peak_mb']:.0f} MB")
    return found


# ------------------------------------------------------------------ in a process of its own
def planned(url: str, position: float) -> dict[str, Any]:
    """Seconds of each part, the peak until then, and microseconds per sample of batches at several places."""
    times = [time.monotonic()]
    packed = manifest.load(url)
    times.append(time.monotonic())
    reader = SampleReader(url, packed, SPLIT)
    times.append(time.monotonic())
    settings = OrderConfig()
    counts = tuple(shard.samples for shard in packed.shards(SPLIT))
    order = EpochOrder(counts, 7, 3, settings.lanes, settings.window)
    steps = count_steps(order.samples, BATCH)
    _batches(order, int(position * steps), 1, BATCH)
    times.append(time.monotonic())
    peak = frame.memory("VmHWM") * 2**20 / 1e6
    places = {"start": 0, "middle": steps // 2, "random": int(position * steps), "end": steps - 201}
    per_sample = {place: _batches(order, step, 200, BATCH) for place, step in places.items()}
    per_sample["large_batches"] = _batches(order, steps // 2 * BATCH // LARGE_BATCH, 40, LARGE_BATCH)
    reader.close()
    parts = dict(zip(("manifest", "reader", "position"), np.diff(times).tolist(), strict=True))
    return {"started": times[0], "ended": times[-1], "peak_mb": peak, "per_sample": per_sample, **parts}


def _batches(order: EpochOrder, start: int, number: int, batch_size: int) -> float:
    """Microseconds per sample of planning batches in turn as a loader does: places, ids, draws, windows to read.

    The first of them, which opens a window in every lane, is left out; the windows that the others open are not.
    """
    steps = range(start, count_steps(order.samples, batch_size))
    windows = sampler.plan_epoch(order, batch_size, steps, 0, 1)
    ahead = next(windows, None)
    began = 0.0
    for step in range(start, start + number + 1):
        shard, numbers = order.locate(select_rank_positions(step, batch_size, order.lanes, 0, 1))
        ids = order.get_sample_ids(shard, numbers)
        rng.uniform(rng.derive_key(7, "augment", 3), ids, DRAWS)
        while ahead is not None and ahead.step <= step:
            ahead = next(windows, None)
        began = began or time.perf_counter()
    return (time.perf_counter() - began) / number / batch_size * 1e6


if __name__ == "__main__":
    for module in sys.argv[3:]:
        importlib.import_module(module)
    print(json.dumps(planned(sys.argv[1], float(sys.argv[2]))))
