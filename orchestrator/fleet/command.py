"""The job that trains one model."""

from __future__ import annotations

from orchestrator.fleet import dryrun, fleet
from orchestrator.fleet.config import TrainModel
from orchestrator.launch import preflight
from orchestrator.launch.command import FAILED, console, starting_recipe
from orchestrator.launch.session import opened


def train(config: TrainModel) -> int:
    """Train the config's recipe; the exit status."""
    screen = console()
    recipe = starting_recipe(config)
    if config.dry_run:
        dryrun.show(config, [recipe], config.plan, screen)
        preflight.check_places(config.destination, [recipe], config.placement.workers)
        return 0
    with opened(config.destination, config.placement, screen) as session:
        spec = config.spec(recipe, session.destination, session.manifest.digest())
        preflight.check_trainable(session.manifest, spec.destination.data, [recipe], spec.placement.workers)
        result = fleet.train(session, [spec], config=config.plan)
        session.tell_places(spec.folder, session.key(spec.name))
        if session.interruption.event.is_set():
            session.say("stopped; the same command goes on from the last checkpoint")
            return session.interruption.exit_status
        end = result.ended[spec.name]
        if end.outcome is not None:
            for name, value in sorted(end.outcome.metrics.items()):
                session.say(f"{name:32} {value:.4g}")
        return 0 if end.status == "finished" else FAILED
