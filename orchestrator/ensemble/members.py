"""The members of an ensemble (arXiv 1409.4842, section 7): what they share, what differs, which is wider."""

from __future__ import annotations

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe.config import Recipe


class EnsembleConfig(Config):
    """How the members come from the base recipe."""

    members: int = Field(7, ge=1, le=1000, description="independently trained models (section 7: 7)")
    wider: float | None = Field(
        None,
        ge=1,
        le=8,
        description="width of the wider member relative to the base (section 7: one is wider; 1: none); by default "
        "1.25, and 1 for networks without a width",
    )
    wider_member: int | None = Field(
        None,
        ge=1,
        description="number of the wider member, from 1; by default the seventh, or the last where there are fewer",
    )
    vary_crops: bool = Field(
        True,
        description="members differ in the range of training crops (section 6: some saw smaller, some larger ones)",
    )


DEFAULT_WIDTH_FACTOR = 1.25  # section 7 gives no factor
PAPER_MEMBERS = 7  # section 7; a wider member that stays in its place leaves the others as they are when some are added
# Parts of the base's range of crop areas that members in turn draw from: all of it, its smaller and its larger three
# quarters. Section 6 says that some models were trained on smaller relative crops and others on larger ones.
CROP_AREA_PARTS = ((0.0, 1.0), (0.0, 0.75), (0.25, 1.0))


def build_recipes(base: Recipe, config: EnsembleConfig) -> tuple[Recipe, ...]:
    """The members' recipes. All share policy and initial weights; order, augmentation, dropout and crops differ.

    Raises ConfigError when there is no such wider member, or it cannot be as wide as asked for.
    """
    if (config.wider_member or 1) > config.members:
        raise ConfigError(
            f"ensemble.wider_member: {config.wider_member} is refused: there are {config.members} members; give one of "
            "them, or leave it out"
        )
    wider = _resolve_width_factor(base, config)
    return tuple(_build_member(base, config, number, wider) for number in range(config.members))


def _resolve_width_factor(base: Recipe, config: EnsembleConfig) -> float:
    """How much wider the wider member is."""
    has_width = isinstance(base.model, GoogLeNetConfig)
    if config.wider is None:
        return DEFAULT_WIDTH_FACTOR if has_width else 1.0
    if config.wider > 1 and not has_width:
        raise ConfigError(
            f"ensemble.wider: {config.wider:g} is refused: model.kind {base.model.kind} has no width; give 1, or leave "
            "it out"
        )
    return config.wider


def _build_member(base: Recipe, config: EnsembleConfig, number: int, wider: float) -> Recipe:
    seeds = base.seeds.model_copy(
        update={
            "order": base.seeds.order + number,
            "augmentation": base.seeds.augmentation + number,
            "dropout": base.seeds.dropout + number,
        }
    )
    low, high = base.augmentation.area
    begin, end = CROP_AREA_PARTS[number % len(CROP_AREA_PARTS)] if config.vary_crops else CROP_AREA_PARTS[0]
    area = (round(low + begin * (high - low), 6), round(low + end * (high - low), 6))
    widened = config.wider_member or min(config.members, PAPER_MEMBERS)
    is_wider = wider > 1 and number == widened - 1 and config.members > 1
    model = base.model
    if is_wider:
        assert isinstance(model, GoogLeNetConfig)
        model = model.model_copy(update={"width": model.width * wider})
    changed = base.model_copy(
        update={
            "name": f"{base.name}-m{number + 1}" + ("-wide" if is_wider else ""),
            "seeds": seeds,
            "augmentation": base.augmentation.model_copy(update={"area": area}),
            "model": model,
        }
    )
    return Recipe.from_dict(changed.to_dict())  # validated as a whole; model_copy validates nothing
