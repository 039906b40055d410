"""A source of one's own: images that are drawn on the fly. Pack them into shards.

python jobs/shards.py pack plugin --source.plugin examples.own_source:Shapes --source.args '{"count": 300}' \
    --url /tmp/shapes --name shapes
"""

from collections.abc import Iterator

import cv2
import numpy as np

from orchestrator.data.build.tar_writer import RawSample


class Shapes:
    """Discs and squares; any object with classes, splits and iter_samples is a source."""

    classes = ("disc", "square")
    splits = ("train", "validation")

    def __init__(self, count: int = 200) -> None:
        self._counts = {"train": count, "validation": count // 5}

    def iter_samples(self, split: str) -> Iterator[RawSample]:
        """Yield the samples in random order, the same ones at each call."""
        generator = np.random.default_rng(self.splits.index(split))
        for number in range(self._counts[split]):
            image, label = np.full((48, 48, 3), 30, dtype=np.uint8), int(generator.integers(2))
            (x, y), radius = generator.integers(16, 32, size=2).tolist(), int(generator.integers(6, 14))
            if label == 0:
                cv2.circle(image, (x, y), radius, (200, 200, 60), thickness=-1)
            else:
                cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), (60, 200, 200), thickness=-1)
            yield RawSample(f"{split}-{number:05d}", cv2.imencode(".png", image)[1].tobytes(), label)
