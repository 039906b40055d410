"""What a network costs, row by row, measured on a built network that holds and computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.models import table1
from orchestrator.models.config import AnyModelConfig, GoogLeNetConfig, ModelPlugin
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
    """Return the network's rows in order, auxiliary heads last if the config has them; a plug-in is one row.

    Shapes, parameters and multiply-adds are measured; only the columns of GoogLeNet's paper are data.
    Raises ValueError for fewer than 2 classes, ConfigError for a plug-in that cannot be built or run.
    """
    # LRN has no parameters and no products with weights, and would need what the meta device is slow to load.
    plain = config.model_copy(update={"lrn": False}) if "lrn" in type(config).model_fields else config
    try:
        return _measure_on(torch.device("meta"), plain, classes)
    except Exception:  # a plug-in may look at numbers, which the meta device does not have
        if not isinstance(config, ModelPlugin):
            raise
        return _measure_on(torch.device("cpu"), plain, classes)


def _measure_on(device: torch.device, config: AnyModelConfig, classes: int) -> list[RowCost]:
    with device, torch.random.fork_rng(devices=[]):
        model = create_uninitialized_model(config, classes).train()
        # Two, since batch norms of a 1 x 1 map cannot train on one.
        images = torch.zeros(2, 3, config.image_size, config.image_size)
        parts = model.get_cost_rows()
        outputs, multiply_adds = _register_hooks(parts)
        with torch.no_grad():
            model(images)
    paper = _get_paper_costs() if isinstance(config, GoogLeNetConfig) else {}
    return [
        _make_row(name, part, outputs[name], multiply_adds[name] // len(images), *paper.get(name, (None, None)))
        for name, part in parts.items()
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
    name: str, part: nn.Module, shape: torch.Size, multiply_adds: int, paper_weights: float | None,
    paper_multiply_adds: float | None,
) -> RowCost:  # fmt: skip
    _, channels, height, width = (*shape, 1, 1)[:4]
    return RowCost(
        name,
        (height, width, channels),
        sum(p.numel() for p in part.parameters() if p.ndim > 1),
        sum(p.numel() for p in part.parameters()),
        multiply_adds,
        paper_weights,
        paper_multiply_adds,
    )


def _register_hooks(parts: dict[str, nn.Module]) -> tuple[dict[str, torch.Size], dict[str, int]]:
    """Return shapes of the outputs of modules and multiply-adds of a batch in each, by name, filled as they run."""
    shapes: dict[str, torch.Size] = {}
    multiply_adds: dict[str, int] = dict.fromkeys(parts, 0)
    for name, part in parts.items():
        counter = FlopCounterMode(display=False)

        def start(_module: nn.Module, _inputs: object, counter: FlopCounterMode = counter) -> None:
            counter.__enter__()  # type: ignore[no-untyped-call]

        def stop(
            _module: nn.Module, _inputs: object, out: Tensor, name: str = name, counter: FlopCounterMode = counter
        ) -> None:
            counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            shapes[name] = out.shape
            multiply_adds[name] += counter.get_total_flops() // 2  # torch counts a product and its sum as two

        part.register_forward_pre_hook(start)
        part.register_forward_hook(stop)
    return shapes, multiply_adds
