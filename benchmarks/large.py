"""Large photos (2000 x 1500): end to end against decoding them whole and taking the same crop, and how near they are.

Both are images per CPU-second in one thread on one core; the loader reads shards on disk, its peer bytes in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from statistics import median

import numpy as np

from benchmarks import fidelity, frame, photos
from benchmarks.frame import Figure
from orchestrator.data import manifest, rng
from orchestrator.data.config import NO_PHOTOMETRIC, AugmentationConfig
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.sampler import EpochOrder
from orchestrator.data.transforms.random_resized_crop import DRAWS

SIZE, BATCH, SEED = 224, 32, 7
ROUNDS = 7


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-large`."""
    url, augmentation = photos.large(folder), AugmentationConfig(photometric=NO_PHOTOMETRIC)
    packed, images = manifest.load(url), photos.images(url)
    loader = BatchLoader(SampleReader(url, packed, photos.SPLIT), SIZE, 1)
    ids = np.arange(len(images), dtype=np.int64)
    # Drawn beforehand: the peer pays for nothing but its decoding and its crop. Its epochs are ours: the same crops.
    draws = [rng.uniform(rng.derive_key(SEED, "augment", epoch), ids, DRAWS) for epoch in range(ROUNDS + 1)]
    ours_next, peer_next = count(), count()

    def ours() -> None:
        order = EpochOrder(photos.counts(packed), SEED, next(ours_next), 4, 8)
        got = 0
        for batch in loader.iter_training(order, augmentation, SEED, BATCH, range(len(images) // BATCH)):
            assert bool(batch.weights.all()), batch.bad
            got += len(batch.ids)
        assert got == len(images), f"{got} of {len(images)} samples came"

    def full_decode() -> None:
        for image, row in zip(images, draws[next(peer_next)], strict=True):
            fidelity.exact(image, augmentation, row)

    with frame.pinned(frame.cores(1)):
        ours()
        full_decode()
        costs = frame.interleaved({"full_decode": full_decode, "ours": ours}, ROUNDS)
    cpu = {name: [taken.cpu for taken in found] for name, found in costs.items()}
    for name, seconds in cpu.items():
        yield Figure(f"large.{name}.images_per_cpu_s", len(images) / median(seconds))
    yield Figure("large.ours/full_decode", frame.ratio(cpu["full_decode"], cpu["ours"]), 2.0)
    yield from fidelity.figures("large", url, len(images), lambda number: ("mosaic", "enlarged")[number % 2])
