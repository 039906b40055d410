"""VGG-16 (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

from orchestrator.models.baselines.conv_fc import ConvFCNetwork, ConvSpec, LayerSpec, PoolSpec
from orchestrator.models.config import VGG16Config

# Table 1, column D: filters and number of the 3x3 convolutions in front of each 2x2 pool.
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
HIDDEN_UNITS = 4096  # of the first two fully connected layers (Table 1)


class VGG16(ConvFCNetwork):
    """138,357,544 parameters at 224 px and 1000 classes."""

    def __init__(self, config: VGG16Config, classes: int) -> None:
        super().__init__(_build_rows(), classes, config.image_size, HIDDEN_UNITS, config.dropout)


def _build_rows() -> list[LayerSpec]:
    rows: list[LayerSpec] = []
    for block, (filters, depth) in enumerate(BLOCKS, 1):
        rows += [ConvSpec(f"conv{block}-{number}", filters, kernel=3, padding=1) for number in range(1, depth + 1)]
        rows.append(PoolSpec(f"pool{block}", kernel=2, stride=2))
    return rows
