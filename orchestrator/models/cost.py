"""Parameters and multiply-adds of one image, measured on the meta device: nothing is computed."""

from __future__ import annotations

from functools import lru_cache

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.models.config import AnyModelConfig, CostConfig, ModelPlugin, format_label
from orchestrator.models.registry import create_uninitialized_model


@lru_cache(maxsize=256)
def measure_cost(config: AnyModelConfig, classes: int = 1000, training: bool = True) -> tuple[int, int]:
    """Return a network's parameters and the multiply-adds of its convolutions and linear layers for one image.

    training: with the auxiliary heads, which inference does without.
    Raises ValueError for fewer than 2 classes, ConfigError for a plug-in that cannot be built or run.
    """
    # LRN has no parameters and no products with weights, and would need what the meta device is slow to load.
    plain = config.model_copy(update={"lrn": False}) if "lrn" in type(config).model_fields else config
    try:
        return _measure_on("meta", plain, classes, training)
    except Exception:  # a plug-in may look at numbers, which the meta device does not have
        if not isinstance(config, ModelPlugin):
            raise
        return _measure_on("cpu", plain, classes, training)


def _measure_on(device: str, config: AnyModelConfig, classes: int, training: bool) -> tuple[int, int]:
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = create_uninitialized_model(config, classes).train()
        if not training:
            model.drop_auxiliary()
        # Two, since batch norms of a 1 x 1 map cannot train on one.
        images = torch.zeros(2, 3, config.image_size, config.image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images)
    # torch counts a product and its sum as two operations.
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // (2 * len(images))


def print_cost(config: CostConfig, console: Console) -> int:
    """Print the cost of a network at inference and while training; return the exit status."""
    side = config.model.image_size
    lines = [f"{format_label(config.model)}, {side} x {side} pixels, {config.classes} classes"]
    for name, training in (("inference", False), ("training", True)):
        params, multiply_adds = measure_cost(config.model, config.classes, training)
        lines.append(f"{name:<9} {params:>13,} parameters {multiply_adds:>15,} multiply-adds for an image")
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True, markup=False)
    return 0
