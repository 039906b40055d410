"""The embedded dataset: scikit-learn's 1,797 real handwritten digits (UCI "Optical Recognition of Handwritten Digits").

8 x 8 grey images in 17 levels, enlarged once to 48 x 48 (cubic) so that crops of several scales make sense, and stored
as JPEGs. 1,437 are for training and 360, stratified by class, are held out.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from orchestrator.data.build.config import DIGITS_SEED, DigitsSource, PackConfig
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.manifest import Manifest


class Digits:
    """The digits as a source; the split and every byte are the same each time."""

    splits = ("train", "validation")
    samples_per_shard = 60  # 24 training and 6 validation tars: enough for lanes and workers to have their own

    def __init__(self) -> None:
        self._digits = load_digits()
        self.classes = [str(name) for name in self._digits.target_names]
        numbers, target = np.arange(len(self._digits.target)), self._digits.target
        train, validation = train_test_split(numbers, test_size=360, stratify=target, random_state=DIGITS_SEED)
        self._numbers = {"train": train, "validation": np.sort(validation)}

    def iter_samples(self, split: str) -> Iterator[RawSample]:
        """Yield the samples of a split."""
        for number in self._numbers[split].tolist():
            grey = (self._digits.images[number] * (255 / 16)).round().astype(np.uint8)
            large = cv2.resize(grey, (48, 48), interpolation=cv2.INTER_CUBIC)[:, :, None]
            image = simplejpeg.encode_jpeg(large, quality=95, colorspace="GRAY", colorsubsampling="Gray")
            yield RawSample(f"digit-{number:04d}", image, int(self._digits.target[number]))


def pack_digits(url: str) -> Manifest:
    """Pack the digits below `url` and return the manifest."""
    source = Digits()
    splits = {split: source.iter_samples(split) for split in source.splits}
    how = PackConfig(source=DigitsSource()).to_manifest_values()
    return write_dataset(url, "digits", source.classes, splits, source.samples_per_shard, how)
