"""A transform of one's own: a function of a sample with arguments, and one of a batch.

python jobs/train.py googlenet-digits --augmentation.stages decode crop photometric \
        '{"kind": "examples.own_transform:erase", "args": {"share": 0.3}}' \
        --order.lanes 8 --augmentation.batch-stages examples.own_transform:brighten mixup
"""

from typing import Any

import numpy as np


def erase(sample: dict[str, Any], share: float = 0.25) -> dict[str, Any]:
    """Fill a random square of the crop, `share` of its side, with grey. Draws are the same on any worker."""
    generator = np.random.default_rng(sample["__seed__"])
    image = sample["image"].copy()
    side = round(share * len(image))
    y, x = generator.integers(0, len(image) - side + 1, size=2)
    image[y : y + side, x : x + side] = 128
    return sample | {"image": image}


def brighten(images: Any, targets: Any, partners: Any, generator: np.random.Generator) -> tuple[Any, Any]:
    """Scale a whole batch by one random factor; images are N x S x S x 3 uint8, targets N x classes."""
    factor = generator.uniform(0.8, 1.2)
    return np.clip(images * factor, 0, 255).astype(np.uint8), targets
