"""uint8 pixels to network input, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.data.config import PreprocessingConfig


class Normalizer:
    """(pixel - mean) * scale on a device."""

    def __init__(self, config: PreprocessingConfig, device: torch.device) -> None:
        self._mean = torch.tensor(config.mean, device=device).view(1, 3, 1, 1)
        self._scale = config.scale

    def __call__(self, images: Tensor) -> Tensor:
        """Return N x 3 x S x S uint8 images in float32, shape and memory format as they are."""
        return images.float().sub_(self._mean).mul_(self._scale)
