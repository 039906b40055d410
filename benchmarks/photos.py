"""Photo sets made from scikit-learn's two sample images (640 x 427), packed by our own packer.

- `small`: 500 x 375 cut-outs at random places, mirrored, upside down, brighter or darker, so no two are the same;
  JPEG of quality 92 with 4:2:0 chroma, as cameras write it: about 60 kB each.
- `large`: 2000 x 1500, quality 92: every other one a mosaic of 4 x 4 such cut-outs (full detail in every pixel, the
  hardest case for scaled decoding), the rest cut-outs enlarged four times (soft, as large photos mostly are).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from sklearn.datasets import load_sample_image

from benchmarks import frame
from orchestrator.data import index, manifest
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.manifest import Manifest
from orchestrator.storage import file_io

WIDTH, HEIGHT, QUALITY = 500, 375, 92
TILES = 4  # a large photo is this many small ones wide and high
SMALL, LARGE = 3072, 96
PER_SHARD = 256
CLASSES = tuple(f"class-{number:03d}" for number in range(100))
SPLIT = "train"

Picture = NDArray[np.uint8]


def small(folder: str, copies: int = 1) -> str:
    """The folder of the packed small photos, made when it is not there; every photo `copies` times, by another key."""

    def samples() -> Iterator[RawSample]:
        kept = [_jpeg(cut_out(number)) for number in range(SMALL)]
        for copy in range(copies):
            yield from (_sample(copy * SMALL + number, image) for number, image in enumerate(kept))

    return _packed(os.path.join(folder, f"small-{copies}"), samples(), PER_SHARD)


def large(folder: str) -> str:
    """The folder of the packed large photos, made when it is not there; even ones are mosaics, odd ones enlarged."""
    return _packed(
        os.path.join(folder, "large"), (_sample(number, _jpeg(large_picture(number))) for number in range(LARGE)), 16
    )


def large_picture(number: int) -> Picture:
    """1500 x 2000 x 3 uint8."""
    if number % 2:
        return np.asarray(
            cv2.resize(cut_out(number), (TILES * WIDTH, TILES * HEIGHT), interpolation=cv2.INTER_CUBIC), dtype=np.uint8
        )
    tiles = iter([cut_out(1000 * number + tile) for tile in range(TILES * TILES)])
    return np.vstack([np.hstack([next(tiles) for _ in range(TILES)]) for _ in range(TILES)])


def cut_out(number: int) -> Picture:
    """375 x 500 x 3 uint8, another for each number."""
    source = _sources()[number % 2]
    random = np.random.default_rng(number)
    y, x = random.integers(0, source.shape[0] - HEIGHT + 1), random.integers(0, source.shape[1] - WIDTH + 1)
    part = source[y : y + HEIGHT, x : x + WIDTH]
    part = part[:: random.choice((-1, 1)), :: random.choice((-1, 1))]
    lit = cv2.convertScaleAbs(np.ascontiguousarray(part), alpha=random.uniform(0.8, 1.2), beta=random.uniform(-20, 20))
    return np.asarray(lit, dtype=np.uint8)


def images(url: str) -> list[bytes]:
    """The encoded images of a packed set, in the manifest's order, each in memory of its own."""
    found = []
    packed = manifest.load(url)
    for shard in packed.shards(SPLIT):
        tar, listing = file_io.read_bytes(packed.tar_url(url, shard)), index.load(url, shard)
        spans = zip(listing.offsets.tolist(), listing.lengths.tolist(), strict=True)
        found += [tar[offset : offset + length] for offset, length in spans]
    return found


def counts(packed: Manifest) -> tuple[int, ...]:
    """Samples of each shard."""
    return tuple(shard.samples for shard in packed.shards(SPLIT))


@cache
def _sources() -> tuple[Picture, Picture]:
    return load_sample_image("china.jpg"), load_sample_image("flower.jpg")


def _jpeg(picture: Picture) -> bytes:
    return bytes(simplejpeg.encode_jpeg(picture, quality=QUALITY, colorsubsampling="420"))


def _sample(number: int, image: bytes) -> RawSample:
    return RawSample(f"photo-{number:06d}", image, number % len(CLASSES))


def _packed(url: str, samples: Iterable[RawSample], per_shard: int) -> str:
    if file_io.exists(file_io.join(url, manifest.FILE_NAME)):
        return url
    frame.progress(f"making {os.path.basename(url)} photos")
    packed = write_dataset(
        url, "photos", CLASSES, {SPLIT: samples}, per_shard, {"decode": True}
    )  # as `shards.py pack` does
    total, count = sum(shard.bytes for shard in packed.shards(SPLIT)), packed.count_samples(SPLIT)
    frame.progress(f"{count} photos, {total / count / 1000:.1f} kB each, {len(packed.shards(SPLIT))} shards")
    return url
