"""Table 1 of arXiv 1409.4842 (section 5) as data: every row in order, with the paper's own cost figures.

Everything else about the network's shape is derived from these rows: modules, widths, the cost table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvolutionRow:
    """A k x k convolution with stride; `reduce` filters of 1x1 in front of it when not 0."""

    name: str
    kernel: int
    stride: int
    filters: int
    reduce: int = 0
    paper_params: float = 0.0
    paper_ops: float = 0.0


@dataclass(frozen=True)
class MaxPoolRow:
    """A 3x3 max pool with stride 2, rounding up (Table 1's sizes need it)."""

    name: str
    kernel: int = 3
    stride: int = 2


@dataclass(frozen=True)
class InceptionRow:
    """One Inception module with dimension reductions (Figure 2b): filters of its six convolutions."""

    name: str
    conv1: int
    reduce3: int
    conv3: int
    reduce5: int
    conv5: int
    pool_proj: int
    paper_params: float = 0.0
    paper_ops: float = 0.0

    @property
    def filters(self) -> int:
        """Channels of the concatenated output."""
        return self.conv1 + self.conv3 + self.conv5 + self.pool_proj


TableRow = ConvolutionRow | MaxPoolRow | InceptionRow

K = 1024.0  # The paper's K is 1024 in most rows (5a: 1072K, 5b: 1388K weights without biases).
M = 1e6

TABLE_1: tuple[TableRow, ...] = (
    ConvolutionRow("conv1", kernel=7, stride=2, filters=64, paper_params=2.7 * K, paper_ops=34 * M),
    MaxPoolRow("pool1"),
    ConvolutionRow("conv2", kernel=3, stride=1, filters=192, reduce=64, paper_params=112 * K, paper_ops=360 * M),
    MaxPoolRow("pool2"),
    InceptionRow("3a", 64, 96, 128, 16, 32, 32, paper_params=159 * K, paper_ops=128 * M),
    InceptionRow("3b", 128, 128, 192, 32, 96, 64, paper_params=380 * K, paper_ops=304 * M),
    MaxPoolRow("pool3"),
    InceptionRow("4a", 192, 96, 208, 16, 48, 64, paper_params=364 * K, paper_ops=73 * M),
    InceptionRow("4b", 160, 112, 224, 24, 64, 64, paper_params=437 * K, paper_ops=88 * M),
    InceptionRow("4c", 128, 128, 256, 24, 64, 64, paper_params=463 * K, paper_ops=100 * M),
    InceptionRow("4d", 112, 144, 288, 32, 64, 64, paper_params=580 * K, paper_ops=119 * M),
    InceptionRow("4e", 256, 160, 320, 32, 128, 128, paper_params=840 * K, paper_ops=170 * M),
    MaxPoolRow("pool4"),
    InceptionRow("5a", 256, 160, 320, 32, 128, 128, paper_params=1072 * K, paper_ops=54 * M),
    InceptionRow("5b", 384, 192, 384, 48, 128, 128, paper_params=1388 * K, paper_ops=71 * M),
)
LINEAR_ROW_NAME = "linear"  # the row behind the modules
AUX_ROW_PREFIX = "head "  # before the name of the module that an auxiliary head reads
LINEAR_PAPER_PARAMS = 1000 * K
LINEAR_PAPER_OPS = 1 * M

# Local response normalisation follows these rows (Figure 3).
LRN_AFTER = ("pool1", "conv2")

# Auxiliary classifiers read the outputs of these modules (section 5).
AUX_AFTER = ("4a", "4d")
AUX_POOL_KERNEL = 5
AUX_POOL_STRIDE = 3
AUX_FILTERS = 128
AUX_HIDDEN = 1024
