"""The embedded dataset: scikit-learn's 1,797 real handwritten digits (UCI "Optical Recognition of Handwritten Digits").

8 x 8 grey images in 17 levels, enlarged once to 48 x 48 (cubic) so that crops of several scales make sense, and stored
as JPEGs. 1,437 are for training and 360, stratified by class, are held out.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.manifest import Manifest

DATASET_NAME = "digits"
IMAGE_SIDE = 48
JPEG_QUALITY = 95
NUM_IMAGES = 1797
NUM_VALIDATION = 360
SPLIT_SEED = 1409
SAMPLES_PER_SHARD = 60  # 24 training and 6 validation tars: enough for lanes and workers to have their own.


def pack_digits(url: str) -> Manifest:
    """Pack the digits below `url`; the manifest. The split and every byte are the same at each call."""
    digits = load_digits()
    train, validation = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_VALIDATION, stratify=digits.target, random_state=SPLIT_SEED
    )
    splits = {"train": train, "validation": np.sort(validation)}
    return write_dataset(
        url,
        DATASET_NAME,
        [str(name) for name in digits.target_names],
        {split: _encode_samples(digits.images, digits.target, chosen) for split, chosen in splits.items()},
        SAMPLES_PER_SHARD,
        {"source": DATASET_NAME, "seed": SPLIT_SEED},
    )


def _encode_samples(
    images: NDArray[np.float64], labels: NDArray[np.int64], chosen: NDArray[np.int64]
) -> Iterator[RawSample]:
    for number in chosen.tolist():
        grey = (images[number] * (255 / 16)).round().astype(np.uint8)
        large = cv2.resize(grey, (IMAGE_SIDE, IMAGE_SIDE), interpolation=cv2.INTER_CUBIC)
        image = simplejpeg.encode_jpeg(
            np.ascontiguousarray(large[:, :, None]),
            quality=JPEG_QUALITY,
            colorspace="GRAY",
            colorsubsampling="Gray",
        )
        yield RawSample(f"digit-{number:04d}", image, int(labels[number]))
