"""What a network costs, row by row, measured on a built network that holds and computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from orchestrator.models import table1
from orchestrator.models.config import AnyModelConfig, GoogLeNetConfig
from orchestrator.models.registry import create_uninitialized_model

IMAGENET_CLASSES = 1000  # of ImageNet


@dataclass(frozen=True)
class RowCost:
    """A part of a network (for GoogLeNet a row of Table 1 or an auxiliary head): its size and what one image costs."""

    name: str
    output: tuple[int, int, int]  # height, width, channels
    weights: int  # parameters without biases and batch norms, as the paper counts
    params: int  # all of them
    multiply_adds: int  # of convolutions and linear layers, for one image
    paper_weights: float | None = None  # None: the paper gives no figure
    paper_multiply_adds: float | None = None

    @property
    def is_head(self) -> bool:
        """Whether it is an auxiliary head, which inference does without."""
        return self.name.startswith(table1.AUX_ROW_PREFIX)


@dataclass(frozen=True)
class CostTotals:
    """Sums over rows."""

    weights: int
    params: int
    multiply_adds: int


def measure_row_costs(config: AnyModelConfig, classes: int) -> list[RowCost]:
    """The network's rows in order, auxiliary heads last if the config has them.

    Shapes, parameters and multiply-adds are measured; only the columns of GoogLeNet's paper are data.
    Raises ValueError for fewer than 2 classes.
    """
    # LRN has no parameters and no products with weights, and would need what the meta device is slow to load.
    plain = config.model_copy(update={"lrn": False}) if "lrn" in type(config).model_fields else config
    with torch.device("meta"):
        model = create_uninitialized_model(plain, classes).train()
        # Two, since batch norms of a 1 x 1 map refuse to train on one.
        images = torch.empty(2, 3, config.image_size, config.image_size)
    parts = model.get_cost_rows()
    outputs, products = _register_shape_hooks(parts), _register_multiply_add_hooks(model)
    with torch.no_grad():
        model(images)
    paper = _get_paper_costs() if isinstance(config, GoogLeNetConfig) else {}
    return [
        _make_row(name, part, outputs[name], products, *paper.get(name, (None, None))) for name, part in parts.items()
    ]


def sum_costs(rows: Sequence[RowCost], heads: bool = False) -> CostTotals:
    """What all rows cost together; auxiliary heads, which inference does without, only if asked for."""
    counted = [row for row in rows if heads or not row.is_head]
    return CostTotals(
        sum(row.weights for row in counted),
        sum(row.params for row in counted),
        sum(row.multiply_adds for row in counted),
    )


@lru_cache(maxsize=256)
def count_image_multiply_adds(config: AnyModelConfig) -> int:
    """Multiply-adds of one image's way forward through the network in training."""
    return sum_costs(measure_row_costs(config, IMAGENET_CLASSES), heads=True).multiply_adds


def _get_paper_costs() -> dict[str, tuple[float, float]]:
    found = {
        row.name: (row.paper_params, row.paper_ops) for row in table1.TABLE_1 if not isinstance(row, table1.MaxPoolRow)
    }
    return {**found, table1.LINEAR_ROW_NAME: (table1.LINEAR_PAPER_PARAMS, table1.LINEAR_PAPER_OPS)}


def _make_row(
    name: str, part: nn.Module, shape: torch.Size, products: dict[nn.Module, int], paper_weights: float | None,
    paper_multiply_adds: float | None,
) -> RowCost:  # fmt: skip
    _, channels, height, width = (*shape, 1, 1)[:4]
    return RowCost(
        name,
        (height, width, channels),
        sum(p.numel() for p in part.parameters() if p.ndim > 1),
        sum(p.numel() for p in part.parameters()),
        sum(products.get(module, 0) for module in part.modules()),
        paper_weights,
        paper_multiply_adds,
    )


def _register_shape_hooks(parts: dict[str, nn.Module]) -> dict[str, torch.Size]:
    """Shapes of the outputs of modules, by name, filled as they run."""
    shapes: dict[str, torch.Size] = {}
    for name, part in parts.items():

        def note(_module: nn.Module, _inputs: object, out: Tensor, name: str = name) -> None:
            shapes[name] = out.shape

        part.register_forward_hook(note)
    return shapes


def _register_multiply_add_hooks(model: nn.Module) -> dict[nn.Module, int]:
    """Multiply-adds of each convolution and linear layer for one image, filled as they run."""
    products: dict[nn.Module, int] = {}

    def note(module: nn.Module, _inputs: object, out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # Every number of the output is a sum of as many products as a filter has weights.
        products[module] = out[0].numel() * weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    return products
