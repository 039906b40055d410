"""Train one model."""

from __future__ import annotations

from rich.console import Console

from orchestrator.cli.config import TrainResult, resolve_recipe
from orchestrator.cli.exit_status import EXIT_FAILURE, STOPPED_NOTICE
from orchestrator.ray_backend import preflight
from orchestrator.ray_backend.run_lookup import match_code
from orchestrator.ray_backend.session import open_session
from orchestrator.scheduler import dry_run, multi_run
from orchestrator.scheduler.config import TrainModel
from orchestrator.training.run_dir import load_validation_result


def train_model(config: TrainModel, console: Console) -> TrainResult:
    """Train the recipe of `config`, or resume it; print progress. With `dry_run` only the plan is printed.

    Raises ConfigError, ClusterError or PreflightError before anything is started; NotRecordedError when the run ended
    and MLflow lacks part of it.
    """
    recipe = resolve_recipe(config)
    if config.dry_run:
        dry_run.print_dry_run(config, [recipe], config.plan, console)
        preflight.check_destination(config.destination, [recipe], config.placement)
        return TrainResult("", "", "stopped")
    with open_session(config.destination, config.placement, console) as session:
        spec = config.build_run_spec(recipe, session.destination, session.manifest.digest())
        preflight.check_trainable(session.manifest, spec.destination.data, [recipe], spec.placement)
        (spec,) = match_code([spec], config.same_code_anyway, session.print_line)
        end = multi_run.train_runs(session, [spec], config=config.plan).results[spec.name]
        url = session.print_locations(spec.folder, session.recorder.make_tracking_key(spec.name))
        if session.interruption.event.is_set():
            session.print_line(STOPPED_NOTICE)
            status = session.interruption.exit_status
            return TrainResult(spec.name, spec.folder, "stopped", end.message, {}, url, status)
        metrics = {} if end.outcome is None else dict(sorted(end.outcome.metrics.items()))
        for name, value in metrics.items():
            session.print_line(f"{name:32} {value:.4g}")
        validation = load_validation_result(spec.folder) if end.outcome is not None else None
        for line in validation.describe() if validation is not None else ():
            session.print_line(line)
        if end.status == "finished":
            return TrainResult(spec.name, spec.folder, "finished", end.message, metrics, url)
        return TrainResult(spec.name, spec.folder, "failed", end.message, metrics, url, EXIT_FAILURE)
