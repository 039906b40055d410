"""A distributed training orchestrator that reproduces GoogLeNet / ILSVRC-2014 (arXiv 1409.4842).

The public Python API, described in docs/api.md. Each name is imported on first use: `import orchestrator` takes
milliseconds, and workers import nothing that they do not need.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import Model, Predictions, evaluate, load, train, train_ensemble
    from orchestrator.cli.config import EnsembleScores, Errors, TrainResult
    from orchestrator.config.errors import ConfigError
    from orchestrator.recipe import presets
    from orchestrator.recipe.config import Recipe

__all__ = [
    "ConfigError", "EnsembleScores", "Errors", "Model", "Predictions", "Recipe", "TrainResult", "evaluate", "load",
    "presets", "train", "train_ensemble",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator import api  # only users of the API need it, not every process that imports a module of ours

    return getattr(api, name)


def __dir__() -> list[str]:
    """List the public names as well."""
    return sorted({*globals(), *__all__})
