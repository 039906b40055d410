"""What a network costs, row by row, measured on a built network that holds and computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from orchestrator.models import table1
from orchestrator.models.build import network
from orchestrator.models.config import AnyModel, GoogLeNetConfig

CLASSES = 1000  # of ImageNet


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
        return self.name.startswith(table1.HEAD)


@dataclass(frozen=True)
class Totals:
    """Sums over rows."""

    weights: int
    params: int
    multiply_adds: int


def cost_table(config: AnyModel, classes: int) -> list[RowCost]:
    """The network's rows in order, auxiliary heads last if the config has them.

    Shapes, parameters and multiply-adds are measured; only the columns of GoogLeNet's paper are data.
    Raises ValueError for fewer than 2 classes.
    """
    # LRN has no parameters and no products with weights, and would need what the meta device is slow to load.
    plain = config.model_copy(update={"lrn": False}) if "lrn" in type(config).model_fields else config
    with torch.device("meta"):
        model = network(plain, classes).train()
        # Two, since batch norms of a 1 x 1 map refuse to train on one.
        images = torch.empty(2, 3, config.image_size, config.image_size)
    parts = model.rows()
    outputs, products = _note_shapes(parts), _note_products(model)
    with torch.no_grad():
        model(images)
    paper = _paper() if isinstance(config, GoogLeNetConfig) else {}
    return [_row(name, part, outputs[name], products, *paper.get(name, (None, None))) for name, part in parts.items()]


def totals(rows: Sequence[RowCost], heads: bool = False) -> Totals:
    """What all rows cost together; auxiliary heads, which inference does without, only if asked for."""
    counted = [row for row in rows if heads or not row.is_head]
    return Totals(
        sum(row.weights for row in counted),
        sum(row.params for row in counted),
        sum(row.multiply_adds for row in counted),
    )


@lru_cache(maxsize=256)
def image_cost(config: AnyModel) -> int:
    """Multiply-adds of one image's way forward through the network in training."""
    return totals(cost_table(config, CLASSES), heads=True).multiply_adds


def _paper() -> dict[str, tuple[float, float]]:
    found = {
        row.name: (row.paper_params, row.paper_ops) for row in table1.TABLE_1 if not isinstance(row, table1.MaxPool)
    }
    return {**found, table1.LINEAR: (table1.LINEAR_PAPER_PARAMS, table1.LINEAR_PAPER_OPS)}


def _row(
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


def _note_shapes(parts: dict[str, nn.Module]) -> dict[str, torch.Size]:
    """Shapes of the outputs of modules, by name, filled as they run."""
    shapes: dict[str, torch.Size] = {}
    for name, part in parts.items():

        def note(_module: nn.Module, _inputs: object, out: Tensor, name: str = name) -> None:
            shapes[name] = out.shape

        part.register_forward_hook(note)
    return shapes


def _note_products(model: nn.Module) -> dict[nn.Module, int]:
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
