"""The code of a recipe's plug-ins as part of what a run is: changed code is another run. Importable without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.introspection import KIND
from orchestrator.config.plugins import compute_source_digest
from orchestrator.models.config import ModelPlugin
from orchestrator.recipe.config import OptimizerPlugin, Recipe
from orchestrator.recipe.lr_schedule import SchedulePlugin, compute_lr


def pin_code(recipe: Recipe) -> Recipe:
    """Return the recipe with the digests of its plug-ins' code as it is now; a recipe without plug-ins as it is.

    Raises ConfigError for a plug-in whose module cannot be found.
    """
    code = collect_code(recipe)
    return recipe if code == recipe.code else recipe.model_copy(update={"code": code})


def collect_code(*configs: Config) -> dict[str, str]:
    """Return the digests of the code of all plug-ins in some configs as it is now. Raises ConfigError as pin_code."""
    kinds = {kind for config in configs for kind in _iter_kinds(config.to_dict())}
    digests = {kind: compute_source_digest(kind) for kind in sorted(kinds)}
    return {kind: digest for kind, digest in digests.items() if digest is not None}


def check_plugins(recipe: Recipe, num_classes: int) -> None:
    """Build and try the recipe's plug-ins on CPU, before anything is started. Raises ConfigError, a line.

    The transforms are checked by the room that applies them.
    """
    if recipe.loss.class_weights and len(recipe.loss.class_weights) != num_classes:
        raise ConfigError(
            f"loss.class_weights must have {num_classes} numbers, one for each class, got "
            f"{len(recipe.loss.class_weights)}"
        )
    if isinstance(recipe.schedule, SchedulePlugin):
        for epochs_done in (0.0, recipe.epochs / 2, float(recipe.epochs)):
            compute_lr(recipe.schedule, epochs_done, 1.0, recipe.epochs)
    if isinstance(recipe.model, ModelPlugin):
        from orchestrator.models import plugin_model  # torch takes two seconds to import

        plugin_model.check_model(recipe.model, num_classes)
    if isinstance(recipe.optimizer, OptimizerPlugin):
        from orchestrator.recipe import optimizer  # torch takes two seconds to import

        optimizer.check_optimizer(recipe.optimizer)


def _iter_kinds(data: Any, above: str = "") -> Iterator[str]:
    """Yield the text of every `kind`, and of every transform, in the JSON form of a recipe."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _iter_kinds(value, key)
    elif isinstance(data, list):
        for value in data:
            yield from _iter_kinds(value, above)
    elif isinstance(data, str) and above in (KIND, "stages", "batch_stages"):
        yield data
