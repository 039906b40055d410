"""The recipes of an ensemble's members (arXiv 1409.4842, section 7)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe.config import Recipe


class EnsembleConfig(Config):
    """The number of members, and their differences from the base recipe."""

    members: int = Field(7, ge=1, le=1000, description="independently trained models (section 7: 7)")
    wider: float | None = Field(
        None,
        ge=1,
        le=8,
        description="width of the wider member relative to the base (section 7: one is wider; 1: none is); by default "
        "1.25, and 1 for networks without a width",
    )
    wider_member: int | None = Field(
        None,
        ge=1,
        description="number of the wider member, from 1; by default the seventh, or the last of fewer",
    )
    vary_crops: bool = Field(
        True,
        description="members differ in the range of training crops (section 6: some saw smaller, some larger ones)",
    )


DEFAULT_WIDTH_FACTOR = 1.25  # section 7 gives no factor
PAPER_MEMBERS = 7  # section 7; the wider member keeps this place when members are added
# Parts of the base's range of crop areas for the members in turn: all of it, its lower and its upper three quarters.
# Section 6: some models were trained on smaller relative crops, others on larger ones.
CROP_AREA_PARTS = ((0.0, 1.0), (0.0, 0.75), (0.25, 1.0))


def build_recipes(base: Recipe, config: EnsembleConfig) -> tuple[Recipe, ...]:
    """Return the members' recipes, which share policy and initial weights; order, augmentation, dropout, crops differ.

    Raises ConfigError for an invalid wider member.
    """
    if (config.wider_member or 1) > config.members:
        raise ConfigError(
            f"ensemble.wider_member: must be at most ensemble.members ({config.members}), got {config.wider_member}; "
            "set a lower number, or leave it out"
        )
    has_width = isinstance(base.model, GoogLeNetConfig)
    wider = config.wider or (DEFAULT_WIDTH_FACTOR if has_width else 1.0)
    if wider > 1 and not has_width:
        raise ConfigError(
            f"ensemble.wider: must be 1 for model.kind {base.model.kind}, which has no width, got {wider:g}; set 1, or "
            "leave it out"
        )
    return tuple(_build_member(base, config, number, wider) for number in range(config.members))


def select_members(count: int, numbers: Sequence[int]) -> Sequence[int]:
    """Return these numbers of so many members, by default all. Raises ConfigError."""
    if len(set(numbers)) < len(numbers) or not all(1 <= number <= count for number in numbers):
        shown = ",".join(map(str, numbers))
        raise ConfigError(f"members: must be different numbers from 1 to {count}, got {shown}")
    return numbers or range(1, count + 1)


def _build_member(base: Recipe, config: EnsembleConfig, number: int, wider: float) -> Recipe:
    own_seeds = {name: getattr(base.seeds, name) + number for name in ("order", "augmentation", "dropout")}
    low, high = base.augmentation.area
    begin, end = CROP_AREA_PARTS[number % len(CROP_AREA_PARTS)] if config.vary_crops else CROP_AREA_PARTS[0]
    area = (round(low + begin * (high - low), 6), round(low + end * (high - low), 6))
    widened = config.wider_member or min(config.members, PAPER_MEMBERS)
    is_wider = wider > 1 and number == widened - 1 and config.members > 1
    model = base.model
    if is_wider:
        assert isinstance(model, GoogLeNetConfig)
        model = model.model_copy(update={"width": model.width * wider})
    member = base.model_copy(
        update={
            "name": f"{base.name}-m{number + 1}" + ("-wide" if is_wider else ""),
            "seeds": base.seeds.model_copy(update=own_seeds),
            "augmentation": base.augmentation.model_copy(update={"area": area}),
            "model": model,
        }
    )
    return Recipe.from_dict(member.to_dict())  # model_copy validates nothing
