"""Around every job that uses a cluster: errors as one line each and an exit status."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.cli import exit_status
from orchestrator.cli.exit_status import EXIT_FAILURE
from orchestrator.ray_backend.launch_errors import ClusterError, NotRecordedError, PreflightError, TaskError
from orchestrator.ray_backend.run_spec import JobConfig
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.plugin_code import pin_code

__all__ = ["resolve_recipe", "run_cluster_command"]


def run_cluster_command(prog: str, main: Callable[[], int]) -> int:
    """The exit status of a job: 0 done, 1 failed, 2 refused, 128 + n stopped by signal n."""
    with exit_status.tolerate_closed_output():
        return exit_status.run_command(prog, lambda: _report_cluster_errors(prog, main))


def resolve_recipe(config: JobConfig) -> Recipe:
    """Return the recipe of a job, with digests of its plug-ins' code and of the weights that it is to start from.

    Raises ConfigError for plug-ins that cannot be found and weights that cannot be used; StorageError.
    """
    recipe = pin_code(config.recipe)
    if not config.weights and not recipe.initial_weights:
        return recipe
    # Imported for those who ask: it takes torch, and torch two seconds.
    from orchestrator.training import warm_start  # torch takes two seconds to import

    return warm_start.resolve_initial_weights(recipe, config.weights)


def _report_cluster_errors(prog: str, main: Callable[[], int]) -> int:
    try:
        return main()
    except PreflightError as error:
        return exit_status.print_errors(prog, list(error.problems), EXIT_FAILURE)
    except (ClusterError, TaskError, NotRecordedError) as error:
        return exit_status.print_errors(prog, [str(error)], EXIT_FAILURE)
