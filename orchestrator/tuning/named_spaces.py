"""Search spaces by name, built around a recipe, whose own values lie inside. Importable without torch or ray.

A range that suits one recipe is invalid for another: steps 8 epochs apart are never reached in 2 epochs, and the rate
grows with the batch. So a space is a function of the recipe that the sweep starts from.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.config.errors import ConfigError, FieldError, format_suggestion, format_value
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.space import Dimension, Scalar, Space, load_space

_KIND_PATH = "schedule.kind"
_MAX_RATE = 100.0  # that a schedule takes
# Smallest and largest share of the image that a crop covers.
_CROP_AREAS = ((0.08, 1.0), (0.2, 1.0), (0.4, 1.0), (0.6, 1.0), (0.8, 1.0))


def build_schedule_space(base: Recipe) -> Space:
    """Return a space of the schedule's kind, its rate within a factor of 10, its warm-up and the kind's own fields."""
    rate, epochs = base.schedule.base_rate, base.epochs
    lowest = _round_number(rate / 10)
    steps: dict[str, tuple[Scalar, ...]] = {_KIND_PATH: ("step", "exponential")}
    # Never above the lowest rate, so that every pair is valid; the paper's kind ends at 0.
    finals = (0.0, _round_number(rate / 100), lowest)
    return Space(
        dimensions={
            _KIND_PATH: Dimension(values=("step", "exponential", "polynomial", "cosine")),
            "schedule.base_rate": Dimension(low=lowest, high=_round_number(min(rate * 10, _MAX_RATE)), log=True),
            "schedule.warmup_epochs": Dimension(low=0.0, high=_round_number(epochs / 10)),
            "schedule.decay_factor": Dimension(low=0.1, high=0.97, when=steps),
            # The paper's 8 of 250 epochs is among them, and a third of training, as AlexNet's.
            "schedule.decay_epochs": Dimension(
                low=_round_number(epochs / 32), high=_round_number(epochs / 2), log=True, when=steps
            ),
            "schedule.power": Dimension(low=0.25, high=2.0, log=True, when={_KIND_PATH: ("polynomial",)}),
            "schedule.final_rate": Dimension(values=finals, when={_KIND_PATH: ("polynomial", "cosine")}),
        }
    )


def build_regularization_space(base: Recipe) -> Space:
    """Return a space of weight decay, momentum, label smoothing, crops, and dropout and heads if there are any."""
    area = base.augmentation.area
    areas = _CROP_AREAS if area in _CROP_AREAS else (*_CROP_AREAS, area)
    dimensions: dict[str, Dimension] = {}
    if hasattr(base.optimizer, "weight_decay"):
        dimensions["optimizer.weight_decay"] = Dimension(low=1e-5, high=1e-2, log=True)
    if hasattr(base.optimizer, "momentum"):
        dimensions["optimizer.momentum"] = Dimension(values=(0.8, 0.9, 0.95, 0.98))
    dimensions["loss.label_smoothing"] = Dimension(low=0.0, high=0.2)
    dimensions["augmentation.area"] = Dimension(values=areas)
    if hasattr(base.model, "dropout"):
        dimensions["model.dropout"] = Dimension(low=0.0, high=0.7)
    if isinstance(base.model, GoogLeNetConfig) and base.model.auxiliary:
        dimensions["loss.auxiliary_weight"] = Dimension(low=0.0, high=0.6)
    return Space(dimensions=dimensions)


def build_rate_space(base: Recipe) -> Space:
    """Return a space of the rate alone, within a factor of 10, under the recipe's schedule."""
    rate, high = base.schedule.base_rate, build_schedule_space(base).dimensions["schedule.base_rate"].bounds[1]
    # A schedule that ends at a rate of its own cannot start below it.
    low = max(_round_number(rate / 10), getattr(base.schedule, "final_rate", 0.0))
    return Space(dimensions={"schedule.base_rate": Dimension(low=low, high=high, log=True)})


SPACES: dict[str, Callable[[Recipe], Space]] = {
    "schedules": build_schedule_space,
    "regularisation": build_regularization_space,
    "rates": build_rate_space,
}


def find_space(space: str, base: Recipe) -> Space:
    """Return the space of that name for the recipe, else the one in the file at that path or URL.

    Raises ConfigError when it is neither.
    """
    if space in SPACES:
        return SPACES[space](base)
    if "/" not in space and "." not in space:
        got = format_value(space) + format_suggestion(space, list(SPACES), "spaces")
        raise ConfigError(FieldError("space", f"must be the name of a space, or a .json or .toml file, got {got}"))
    return load_space(space)


def _round_number(number: float) -> float:
    return float(f"{number:.2g}")
