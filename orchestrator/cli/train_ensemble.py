"""Train an ensemble and score it."""

from __future__ import annotations

from rich.console import Console

from orchestrator.cli.config import resolve_recipe
from orchestrator.cli.evaluate import summarize_result
from orchestrator.cli.exit_status import make_console
from orchestrator.cli.results import EnsembleScores
from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import finished_runs, members, train_and_score
from orchestrator.ensemble.config import TrainEnsembleConfig
from orchestrator.ensemble.train_and_score import EnsembleTask
from orchestrator.ray_backend import preflight
from orchestrator.ray_backend.run_lookup import match_code
from orchestrator.ray_backend.session import open_session
from orchestrator.scheduler import dry_run


def run_train_ensemble(config: TrainEnsembleConfig) -> int:
    """Train and score the ensemble, or print the plan; return the exit status."""
    return train_ensemble(config, make_console()).exit_status


def train_ensemble(config: TrainEnsembleConfig, console: Console) -> EnsembleScores:
    """Train what is not trained, score what is not scored, record everything; print progress and table.

    With `dry_run` only the plan is printed. Raises as `train_model` does.
    """
    recipes = members.build_recipes(resolve_recipe(config), config.ensemble)
    # The request is checked before anything is started.
    included = finished_runs.find_runs(config.destination.resolve().storage, config.include, "include")[0]
    if config.dry_run:
        dry_run.print_dry_run(config, [*recipes, *(spec.recipe for spec in included)], config.plan, console)
        preflight.check_destination(config.destination, recipes, config.placement.workers)
        return EnsembleScores("", "", "stopped", (), 0, len(recipes) + len(included))
    with open_session(config.destination, config.placement, console) as session:
        digest = session.manifest.digest()
        runs = [config.build_run_spec(recipe, session.destination, digest) for recipe in recipes]
        preflight.check_trainable(session.manifest, session.destination.data, recipes, config.placement.workers)
        runs = match_code(runs, config.same_code_anyway, session.print_line)
        adapted = [finished_runs.adapt_to_session(session, spec, "include") for spec in included]
        if twice := {spec.name for spec in runs} & {spec.name for spec in adapted}:
            raise ConfigError(f"include: {min(twice)}: is a member already; leave it out")
        task = EnsembleTask(
            (*runs, *adapted), config.reporting, plan=config.plan, metrics=config.placement.execution.metrics
        )
        return summarize_result(session, task, train_and_score.run_ensemble(session, task))
