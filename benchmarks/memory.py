"""Memory of a loader over three epochs, from the local disk and from S3: flat, and within what its settings say.

The resident memory of a fresh process is looked at after every batch. What the settings allow: the ring of batches, the
open windows and those that take their place while they empty, the read-ahead, and a share for indexes, connections and
the decoder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import frame, photos
from benchmarks.frame import Figure
from benchmarks.s3 import store
from orchestrator.data import dataloader, manifest
from orchestrator.data.config import AugmentationConfig, ReadingConfig
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.sampler import EpochOrder

COPIES = 3
EPOCHS = 3
SIZE, THREADS, BATCH, SEED, LANES, WINDOW = 224, 2, 128, 7, 16, 64
READ_AHEAD_MIB = 32
OTHER_MIB = 96
GROWTH_MIB = 16


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-memory`."""
    local = photos.small(folder, COPIES)
    with store(local, []) as (remote, variables):
        for name, url in (("local", local), ("s3", remote)):
            found = frame.child("memory", url, environment=variables if name == "s3" else {})
            peaks = found["peaks"]
            frame.progress(f"{name}: {found['before']:.0f} MiB before, then {', '.join(f'{one:.0f}' for one in peaks)}")
            yield Figure(f"memory.{name}.before_mib", found["before"])
            for epoch, peak in enumerate(peaks, 1):
                yield Figure(f"memory.{name}.epoch_{epoch}_mib", peak)
            yield Figure(f"memory.{name}.growth_mib", peaks[-1] - peaks[0], at_most=GROWTH_MIB)
            yield Figure(f"memory.{name}.settings_mib", found["settings"])
            yield Figure(f"memory.{name}.peak/settings", (max(peaks) - found["before"]) / found["settings"], at_most=1)


# ------------------------------------------------------------------ in a process of its own
def watched(url: str) -> dict[str, Any]:
    """MiB of this process before there is a loader, at the peak of each epoch, and what the settings allow beyond."""
    before = frame.memory("VmRSS")
    packed = manifest.load(url)
    reader = SampleReader(url, packed, photos.SPLIT, ReadingConfig(read_ahead_mib=READ_AHEAD_MIB))
    loads = BatchLoader(reader, SIZE, THREADS)
    peaks = []
    for epoch in range(EPOCHS):
        order = EpochOrder(photos.counts(packed), SEED, epoch, LANES, WINDOW)
        steps, seen, peak = range(order.samples // BATCH), 0, 0.0
        for batch in loads.iter_training(order, AugmentationConfig(), SEED, BATCH, steps):
            assert bool(batch.weights.all()), batch.bad
            seen, peak = seen + len(batch.ids), max(peak, frame.memory("VmRSS"))
        assert seen == order.samples, f"{seen} of {order.samples} samples came"
        peaks.append(peak)
    return {"before": before, "peaks": peaks, "settings": _settings(packed)}


def _settings(packed: manifest.Manifest) -> float:
    shards = packed.shards(photos.SPLIT)
    sample = sum(shard.bytes for shard in shards) / packed.count_samples(photos.SPLIT)
    ring = (dataloader.READY_BATCHES + dataloader.DECODING_BATCHES + 3) * BATCH * SIZE * SIZE * 3
    return (ring + 2 * LANES * WINDOW * sample) / 2**20 + READ_AHEAD_MIB + OTHER_MIB


if __name__ == "__main__":
    print(json.dumps(watched(sys.argv[1])))
