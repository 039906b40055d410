"""Passes over a worker's part of a batch: their number and sizes. Importable without torch."""

from __future__ import annotations

import math

from orchestrator.models.config import has_batch_norm
from orchestrator.recipe.config import Recipe
from orchestrator.training.config import Execution

# A batch norm over maps of 1 x 1 has no statistics of one image; torch raises ValueError for it.
MIN_BATCH_NORM_IMAGES = 2  # images of a pass


def count_passes(images: int, micro_batch: int | None, normalises: bool) -> int:
    """Return the number of passes, of nearly equal size, for a worker's part of a batch; 1 for an empty part.

    A pass holds `micro_batch` images at most. With batch norm (`normalises`) none holds a single one, unless the part
    does: then a micro-batch of 2 leaves one pass of 3 in a part of odd size.
    """
    passes = max(1, math.ceil(images / (micro_batch or max(1, images))))
    return min(passes, max(1, images // MIN_BATCH_NORM_IMAGES)) if normalises else passes


def compute_largest_pass(images: int, micro_batch: int | None, normalises: bool) -> int:
    """Return the most images of any pass over parts of at most `images`."""
    most = min(images, micro_batch or images)
    odd = normalises and most == MIN_BATCH_NORM_IMAGES < images
    return most + 1 if odd else most


def check_batch_norm(recipe: Recipe, execution: Execution, workers: int) -> None:
    """Raise ValueError where workers would train a network with batch norm on single images."""
    is_micro = execution.micro_batch is not None and execution.micro_batch < MIN_BATCH_NORM_IMAGES
    # Last, since a plug-in has to be built to find out.
    if not (is_micro or recipe.batch_size < MIN_BATCH_NORM_IMAGES * workers) or not has_batch_norm(recipe.model):
        return
    if is_micro:
        raise ValueError(
            f"execution.micro_batch must be at least {MIN_BATCH_NORM_IMAGES} for a network with batch "
            "norm, which has no "
            f"statistics of a single image, got {execution.micro_batch}; set --placement.execution.micro-batch "
            f"{MIN_BATCH_NORM_IMAGES} or more"
        )
    raise ValueError(
        f"batch_size must be at least {MIN_BATCH_NORM_IMAGES} for each worker of a network with batch "
        "norm, which has "
        f"no statistics of a single image, got {recipe.batch_size} for {workers} workers; set --batch-size "
        f"{MIN_BATCH_NORM_IMAGES * workers} or more, or fewer --placement.workers"
    )
