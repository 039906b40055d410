"""The job that trains one model."""

from __future__ import annotations

from orchestrator.cli.exit_status import EXIT_FAILURE, make_console
from orchestrator.cli.run_command import resolve_recipe
from orchestrator.ray_backend import preflight
from orchestrator.ray_backend.run_lookup import match_code
from orchestrator.ray_backend.session import open_session
from orchestrator.scheduler import dry_run, multi_run
from orchestrator.scheduler.config import TrainModel
from orchestrator.training.run_dir import load_validation_result


def train_model(config: TrainModel) -> int:
    """Train the config's recipe; the exit status."""
    screen = make_console()
    recipe = resolve_recipe(config)
    if config.dry_run:
        dry_run.print_dry_run(config, [recipe], config.plan, screen)
        preflight.check_destination(config.destination, [recipe], config.placement.workers)
        return 0
    with open_session(config.destination, config.placement, screen) as session:
        spec = config.build_run_spec(recipe, session.destination, session.manifest.digest())
        preflight.check_trainable(session.manifest, spec.destination.data, [recipe], spec.placement.workers)
        (spec,) = match_code([spec], config.same_code_anyway, session.print_line)
        result = multi_run.train_runs(session, [spec], config=config.plan)
        session.print_locations(spec.folder, session.make_tracking_key(spec.name))
        if session.interruption.event.is_set():
            session.print_line("stopped; the same command goes on from the last checkpoint")
            return session.interruption.exit_status
        end = result.results[spec.name]
        if end.outcome is not None:
            for name, value in sorted(end.outcome.metrics.items()):
                session.print_line(f"{name:32} {value:.4g}")
            if (validation := load_validation_result(spec.folder)) is not None:
                for line in validation.describe():
                    session.print_line(line)
        return 0 if end.status == "finished" else EXIT_FAILURE
