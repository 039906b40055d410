"""Configs of order, reading and transforms of images; importable without torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from orchestrator.config.base import Config
from orchestrator.config.json_text import parse_json
from orchestrator.config.plugins import Plugin

Interpolation = Literal["bilinear", "area", "nearest", "cubic"]


def _amount(effect: str) -> Any:
    return Field(0.5, ge=0, le=1, description=f"{effect} (Howard: 0.5 .. 1.5)")


class PhotometricConfig(Config):
    """Brightness, contrast and saturation in random order, then lighting noise; each amount 0 is off.

    Section 6 of arXiv 1409.4842 names Andrew Howard's distortions and no amounts: these are his (arXiv 1312.5402).
    """

    brightness: float = _amount("pixels are scaled by a factor in 1 - amount .. 1 + amount")
    contrast: float = _amount("the same for the distance from the image's mean grey")
    saturation: float = _amount("the same for the distance from each pixel's own grey")
    lighting: float = Field(
        0.1,
        ge=0,
        le=1,
        description="standard deviation of the shift along each principal component of ImageNet's RGB, in units of the "
        "component's own (Krizhevsky 2012, section 4.1: 0.1)",
    )


# For images without colours, or with colours that mean something.
NO_PHOTOMETRIC = PhotometricConfig(brightness=0.0, contrast=0.0, saturation=0.0, lighting=0.0)


class AugmentationConfig(Config):
    """Training crops and distortions of arXiv 1409.4842, section 6."""

    area: tuple[float, float] = Field(
        (0.08, 1.0), description="smallest and largest share of the image's area that a crop covers (section 6: 8-100%)"
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
    decoding: Literal["fast", "exact"] = Field(
        "fast",
        description="fast: quick DCT and chroma, no row below the crop, and 1/2, 1/4 or 1/8 size where the crop still "
        "has the input's size (about 40 dB from exact); exact: every pixel, as for test crops",
    )
    photometric: PhotometricConfig = PhotometricConfig()
    stages: tuple[str | Plugin, ...] = Field(
        ("decode", "crop", "photometric"),
        min_length=1,
        description="transforms of a sample, in turn: decode, crop, photometric, rand_augment, or your own "
        "package.module:attribute that takes and returns a sample dict, as WebDataset's map() does; with arguments as "
        '{"kind": "rand_augment", "args": {"num_ops": 2}}',
    )
    batch_stages: tuple[str | Plugin, ...] = Field(  # names become plug-ins when validated
        (),
        description="transforms of a batch, in turn: mixup, cutmix or your own package.module:attribute; with "
        'arguments as {"kind": "mixup", "args": {"alpha": 0.2}}',
        exclude_if=lambda stages: not stages,
    )

    @field_validator("stages", "batch_stages", mode="before")
    @classmethod
    def _parse_stages(cls, value: Any, info: ValidationInfo) -> Any:
        """Return sample transforms without arguments as names, batch transforms as mappings: one recipe in any form."""
        if not isinstance(value, list | tuple):
            return value
        stages = [parse_json(stage) if isinstance(stage, str) and stage.startswith("{") else stage for stage in value]
        stages = [stage.to_dict() if isinstance(stage, Plugin) else stage for stage in stages]
        if info.field_name == "batch_stages":
            return tuple({"kind": stage, "args": {}} if isinstance(stage, str) else stage for stage in stages)
        return tuple(
            stage["kind"] if isinstance(stage, dict) and "kind" in stage and not stage.get("args") else stage
            for stage in stages
        )

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise ValueError(f"area must be 0 < smallest <= largest <= 1, got {low}, {high}")
        low, high = self.aspect
        if not 0 < low <= high:
            raise ValueError(f"aspect must be 0 < smallest <= largest, got {low}, {high}")
        return self


class OrderConfig(Config):
    """Shuffling of an epoch; part of a run's identity, independent of the number of workers."""

    lanes: int = Field(
        64, ge=1, le=65536, description="contiguous lanes that an epoch is cut into; at least the number of workers"
    )
    window: int = Field(256, ge=1, description="samples of a lane that are shuffled among themselves")
    budget: int = Field(
        16384,
        ge=1,
        description="most samples that lanes x window may hold at the same time, since one worker may own all lanes",
    )
    balance: Literal["none", "class"] = Field(
        "none",
        description="class: an epoch has as many samples as before, and each class equally often: some samples of "
        "frequent classes are left out, another choice in each epoch, and those of rare classes repeat",
        exclude_if=lambda balance: balance == "none",
    )

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.lanes * self.window > self.budget:
            raise ValueError(
                f"window {self.window} x lanes {self.lanes} = {self.lanes * self.window} samples is over the budget of "
                f"{self.budget}: lower window or lanes, or raise budget if the memory is there"
            )
        return self


def check_batch_stages(augmentation: AugmentationConfig, order: OrderConfig, batch_size: int) -> None:
    """Raise ValueError when batch transforms have no partner to mix a sample with: another one of its lane."""
    if augmentation.batch_stages and batch_size < 2 * order.lanes:
        raise ValueError(
            f"batch_size must be at least 2 x order.lanes ({order.lanes}) for augmentation.batch_stages, which mix "
            f"samples of one lane, got {batch_size}; lower order.lanes"
        )


class ReadingConfig(Config):
    """Options of reading data; they change no result."""

    cache: str = Field(
        "", description="folder on each node's own disk that keeps what was read from remote data; none by default"
    )
    cache_gib: float = Field(64.0, ge=0.0625, description="most that the cache may hold, in GiB, for all of a node")
    read_ahead_mib: int = Field(
        256, ge=1, description="most that a worker holds of remote windows that are not open yet, in MiB"
    )
    streams: int = Field(16, ge=1, le=256, description="requests that a worker has in flight at the same time")


class PreprocessingConfig(Config):
    """From uint8 pixels to network input: (pixel - mean) * scale, on the device."""

    mean: tuple[float, float, float] = Field(
        (123.0, 117.0, 104.0), description="subtracted from R, G, B (section 5: mean subtraction; the Caffe figures)"
    )
    scale: float = Field(
        1 / 58.0, gt=0, description="multiplies the centred pixels, so that inputs have about unit variance"
    )
