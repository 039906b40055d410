"""Distance of the loader's crops from those of a full, exact decode: PSNR in dB, per interpolation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from benchmarks import photos
from benchmarks.frame import Figure
from orchestrator.data import manifest, rng
from orchestrator.data.config import NO_PHOTOMETRIC, AugmentationConfig
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.sampler import EpochOrder
from orchestrator.data.transforms.random_resized_crop import (
    DRAWS,
    INTERPOLATIONS,
    CropBox,
    choose_denominator,
    draw_crop_box,
    reduce_box,
)

SIZE, SEED, BATCH = 224, 11, 32
SAME = 99.0  # dB given to crops without any difference

Pixels = NDArray[np.uint8]


def figures(benchmark: str, url: str, samples: int, kind: Callable[[int], str]) -> Iterator[Figure]:
    """PSNR of `samples` crops by default settings, colours left alone, per kind of photo (by its id) and interpolation.

    Against the crop as drawn; and, where the loader puts the crop's box on the grid of a scaled decode, against the
    exact crop of that box, by the same interpolation and by pixel areas (which alone does not alias when it shrinks).
    """
    for name, found in _psnr(url, samples, AugmentationConfig(photometric=NO_PHOTOMETRIC), kind).items():
        drawn, same_box, by_area = zip(*found, strict=True)
        yield Figure(f"{benchmark}.psnr_db.{name}.median", median(drawn))
        yield Figure(f"{benchmark}.psnr_db.{name}.worst", min(drawn))
        if same_box != drawn:
            yield Figure(f"{benchmark}.psnr_db.{name}.same_box.median", median(same_box))
            yield Figure(f"{benchmark}.psnr_db.{name}.same_box_by_area.median", median(by_area))


def _psnr(
    url: str, samples: int, augmentation: AugmentationConfig, kind: Callable[[int], str]
) -> dict[str, list[tuple[float, float, float]]]:
    packed = manifest.load(url)
    order = EpochOrder(photos.counts(packed), SEED, 0, 4, 16)
    images = photos.images(url)
    loader = BatchLoader(SampleReader(url, packed, photos.SPLIT), SIZE, 1)
    found = defaultdict(list)
    for batch in loader.iter_training(order, augmentation, SEED, BATCH, range(samples // BATCH)):
        draws = rng.uniform(rng.derive_key(SEED, "augment", 0), batch.ids.numpy(), DRAWS)
        delivered = batch.images.permute(0, 2, 3, 1).numpy()
        for got, number, row in zip(delivered, batch.ids.tolist(), draws, strict=True):
            image, method = simplejpeg.decode_jpeg(images[number]), interpolation(augmentation, row)
            box = draw_crop_box(image.shape[1], image.shape[0], augmentation, row)
            by = choose_denominator(box, SIZE)
            x, y, w, h = (by * side for side in reduce_box(box, by, SIZE))
            on_grid = (x, y, w, h)
            wanted = [(box, method), (on_grid, method), (on_grid, "area")]
            mirrored = augmentation.mirror and row[-1] < 0.5
            one, two, three = (decibels(got, crop(image, *each, mirrored)) for each in wanted)
            found[f"{kind(number)}.{method}"].append((one, two, three))
    return dict(sorted(found.items()))


def exact(data: bytes, augmentation: AugmentationConfig, draws: NDArray[np.float64]) -> Pixels:
    """The crop (SIZE x SIZE x 3) by these draws, from every pixel of the image."""
    image = simplejpeg.decode_jpeg(data)
    box = draw_crop_box(image.shape[1], image.shape[0], augmentation, draws)
    return crop(image, box, interpolation(augmentation, draws), augmentation.mirror and draws[-1] < 0.5)


def interpolation(augmentation: AugmentationConfig, draws: NDArray[np.float64]) -> str:
    """The resize method by these draws."""
    return augmentation.interpolations[int(draws[-2] * len(augmentation.interpolations))]


def crop(image: Pixels, box: CropBox, method: str, mirrored: bool) -> Pixels:
    """SIZE x SIZE x 3 uint8 of a box of the image."""
    x, y, w, h = box
    resized = cv2.resize(image[y : y + h, x : x + w], (SIZE, SIZE), interpolation=INTERPOLATIONS[method])
    return np.asarray(cv2.flip(resized, 1) if mirrored else resized, dtype=np.uint8)


def decibels(one: Pixels, other: Pixels) -> float:
    """PSNR of two 8-bit images; SAME at most."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return min(SAME, 10 * np.log10(255**2 / error)) if error else SAME
