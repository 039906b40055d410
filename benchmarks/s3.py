"""From a real S3 server behind 30 ms added to every request, against the same shards on the local disk.

The loader is held on one core and the server with its proxy on another, for the local passes too. Images per second
are counted from the first batch after 5 s until nothing is left to be read ahead, so that as much is read meanwhile as
is delivered (a figure of its own). The epoch has every photo several times.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import frame, photos
from benchmarks.frame import Figure
from orchestrator.data import manifest
from orchestrator.data.config import AugmentationConfig, ReadingConfig
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.sampler import EpochOrder
from tests.support.faulty import delayed
from tests.support.s3 import environment, served

LATENCY_SECONDS = 0.030
COPIES = 5
READ_AHEAD_MIB = 64
SETTLED_SECONDS = 5.0
LEAST_SECONDS = 3.0  # after them
SIZE, BATCH, SEED, LANES, WINDOW = 224, 256, 7, 16, 64
ROUNDS = 3


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-s3`."""
    local = photos.small(folder, COPIES)
    mine, theirs = frame.cores(2)
    with store(local, [theirs]) as (remote, variables), frame.pinned([mine]):
        found: dict[str, list[dict[str, float]]] = {"local": [], "s3": []}
        for turn in range(ROUNDS):
            for name in ("local", "s3") if turn % 2 == 0 else ("s3", "local"):
                one = frame.child("s3", remote if name == "s3" else local, environment=variables)
                found[name].append(one)
                frame.progress(
                    f"{name}: {one['per_second']:.0f} images/s over {one['seconds']:.1f} s, "
                    f"{one['requests']:.0f} requests, {one['retries']:.0f} retries"
                )
    rates = {name: [one["per_second"] for one in each] for name, each in found.items()}
    for name, measured in rates.items():
        yield Figure(f"s3.{name}.images_per_s", median(measured))
        yield Figure(f"s3.{name}.images_per_cpu_s", median(one["per_cpu_second"] for one in found[name]))
    yield Figure("s3.read/delivered", min(one["read"] / one["delivered"] for one in found["s3"]), at_least=0.90)
    # Decoding keeps a core busy. Where others had a part of it, the passes had unequal shares and tell nothing.
    share = min(one["per_second"] / one["per_cpu_second"] for one in found["local"])
    yield Figure("s3.local.share_of_core", share, at_least=0.90)
    yield Figure("s3.s3/local", frame.ratio(rates["s3"], rates["local"]), at_least=0.90)


@contextmanager
def store(url: str, cores: list[int]) -> Iterator[tuple[str, dict[str, str]]]:
    """The s3:// URL of a local dataset behind the delay, and the environment that leads a client there."""
    folder = Path(url)
    with (
        served(folder.parent, cpus=cores) as server,
        delayed(server.endpoint, LATENCY_SECONDS, cpus=cores) as endpoint,
    ):
        yield server.bucket(folder.name), environment(endpoint)


# ------------------------------------------------------------------ in a process of its own
def throughput(url: str) -> dict[str, Any]:
    """Images per second of an epoch after its first seconds, and what was read meanwhile."""
    began = time.perf_counter()
    packed = manifest.load(url)
    reader = SampleReader(url, packed, photos.SPLIT, ReadingConfig(read_ahead_mib=READ_AHEAD_MIB))
    order = EpochOrder(photos.counts(packed), SEED, 0, LANES, WINDOW)
    mean = sum(shard.bytes for shard in packed.shards(photos.SPLIT)) / order.samples
    ahead = LANES * WINDOW + int(READ_AHEAD_MIB * 2**20 / mean)  # samples that are in memory before their turn
    steps = range(order.samples // BATCH)
    images, settled, cpu, before = 0, 0.0, 0.0, reader.get_read_stats()
    batches = BatchLoader(reader, SIZE, 1).iter_training(order, AugmentationConfig(), SEED, BATCH, steps)
    for _, batch in zip(range((order.samples - ahead) // BATCH), batches, strict=False):
        assert bool(batch.weights.all()), batch.bad
        if settled:
            images += len(batch.ids)
        elif time.perf_counter() - began >= SETTLED_SECONDS:
            settled, cpu, before = time.perf_counter(), time.process_time(), reader.get_read_stats()
    seconds, cpu, traffic = time.perf_counter() - settled, time.process_time() - cpu, reader.get_read_stats()
    assert settled and seconds >= LEAST_SECONDS, f"it was over after {time.perf_counter() - began:.1f} s"
    batches.close()  # type: ignore[attr-defined]
    reader.close()
    return {
        "seconds": seconds,
        "per_second": images / seconds,
        "per_cpu_second": images / cpu,
        "read": traffic.bytes - before.bytes,
        "delivered": images * mean,
        "requests": traffic.requests - before.requests,
        "retries": traffic.retries,
    }


if __name__ == "__main__":
    print(json.dumps(throughput(sys.argv[1])))
