"""What the data plane does to images and in which order, as frozen configs; importable without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config

Interpolation = Literal["bilinear", "area", "nearest", "cubic"]


class AugmentationConfig(Config):
    """Training crops of arXiv 1409.4842, section 6."""

    area: tuple[float, float] = Field(
        (0.08, 1.0),
        description="smallest and largest share of the image's area that a crop covers (section 6: 8-100%)",
    )
    aspect: tuple[float, float] = Field(
        (3 / 4, 4 / 3), description="smallest and largest width / height of a crop (section 6: 3/4 to 4/3)"
    )
    interpolations: tuple[Interpolation, ...] = Field(
        ("bilinear", "area", "nearest", "cubic"),
        min_length=1,
        description="resize methods, picked with equal probability (section 6)",
    )
    mirror: bool = Field(True, description="mirror every other crop at random (section 7 mirrors at test time too)")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise ValueError(f"area {low}, {high} is refused: 0 < smallest <= largest <= 1 is needed")
        low, high = self.aspect
        if not 0 < low <= high:
            raise ValueError(f"aspect {low}, {high} is refused: 0 < smallest <= largest is needed")
        return self


class OrderConfig(Config):
    """How an epoch is shuffled; part of a run's identity, independent of the number of workers."""

    lanes: int = Field(
        64,
        ge=1,
        le=65536,
        description="contiguous lanes that an epoch is cut into; at least the number of workers",
    )
    window: int = Field(256, ge=1, description="samples of a lane that are shuffled among themselves")
    budget: int = Field(
        16384,
        ge=1,
        description="most samples that lanes x window may hold at once, since one worker may own all lanes",
    )

    @model_validator(mode="after")
    def _within_budget(self) -> Self:
        if self.lanes * self.window > self.budget:
            raise ValueError(
                f"window {self.window} x lanes {self.lanes} = {self.lanes * self.window} samples is over the budget of "
                f"{self.budget}: lower window or lanes, or raise budget if the memory is there"
            )
        return self


class PreprocessingConfig(Config):
    """From uint8 pixels to network input: (pixel - mean) * scale, on the device."""

    mean: tuple[float, float, float] = Field(
        (123.0, 117.0, 104.0),
        description="subtracted from R, G, B (section 5: mean subtraction; the Caffe figures)",
    )
    scale: float = Field(
        1 / 58.0, gt=0, description="multiplies the centred pixels, so that inputs have about unit variance"
    )
