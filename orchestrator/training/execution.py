"""How a step is carried out: changes speed and memory, and the result by no more than rounding. Needs no torch."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.models.config import normalises_batches
from orchestrator.recipe.config import Recipe

# A batch norm over maps of 1 x 1 has no statistics of one image; torch raises ValueError for it.
LEAST_NORMALISED = 2  # images of a pass
MOST_PROFILED = 1000  # steps; a trace holds thousands of events of each


class Execution(Config):
    """Micro-batches, compiling, and a profile on demand."""

    micro_batch: int | None = Field(
        None,
        ge=1,
        description="most images of one forward and backward pass on a worker; by default its whole part of the "
        "batch, or on a GPU the most that fits",
    )
    compile: bool = Field(False, description="run the network through torch.compile, which needs a C++ compiler")
    profile: tuple[int, int] | None = Field(
        None, description="first and last step of each attempt that rank 0 traces, counted from 0; off by default"
    )

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.profile is not None:
            first, last = self.profile
            if not 0 <= first <= last < first + MOST_PROFILED:
                raise ValueError(
                    f"profile {first} {last} is refused: give the first and the last step, counted from 0, "
                    f"of at most {MOST_PROFILED}, such as 10 14"
                )
        return self


def count_passes(images: int, micro_batch: int | None, normalises: bool) -> int:
    """Return the number of passes, of nearly equal size, for a worker's part of a batch; 1 for an empty part.

    A pass holds `micro_batch` images at most. With batch norm (`normalises`) none holds a single one, unless the part
    does: then a micro-batch of 2 leaves one pass of 3 in a part of odd size.
    """
    passes = max(1, math.ceil(images / (micro_batch or max(1, images))))
    return min(passes, max(1, images // LEAST_NORMALISED)) if normalises else passes


def largest_pass(images: int, micro_batch: int | None, normalises: bool) -> int:
    """Return the most images of any pass over parts of at most `images`."""
    most = min(images, micro_batch or images)
    odd = normalises and most == LEAST_NORMALISED < images
    return most + 1 if odd else most


def check_batch_norm(recipe: Recipe, execution: Execution, workers: int) -> None:
    """Raise ValueError where workers would train a network with batch norm on single images."""
    if not normalises_batches(recipe.model):
        return
    if execution.micro_batch is not None and execution.micro_batch < LEAST_NORMALISED:
        raise ValueError(
            f"execution.micro_batch must be at least {LEAST_NORMALISED} for a network with batch norm, which has no "
            f"statistics of a single image, got {execution.micro_batch}; set --placement.execution.micro-batch "
            f"{LEAST_NORMALISED} or more"
        )
    if recipe.batch_size < LEAST_NORMALISED * workers:
        raise ValueError(
            f"batch_size must be at least {LEAST_NORMALISED} for each worker of a network with batch norm, which has "
            f"no statistics of a single image, got {recipe.batch_size} for {workers} workers; set --batch-size "
            f"{LEAST_NORMALISED * workers} or more, or fewer --placement.workers"
        )
