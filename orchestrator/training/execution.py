"""How a step is carried out: changes speed and memory, and the result by no more than rounding. Needs no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config

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
