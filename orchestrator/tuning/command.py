"""The job that finds a schedule."""

from __future__ import annotations

from rich.console import Console

from orchestrator.launch import preflight
from orchestrator.launch.command import FAILED, console, starting_recipe
from orchestrator.launch.named import SWEEPS
from orchestrator.launch.session import Session, opened
from orchestrator.storage import files
from orchestrator.tuning import checking, concluding, explore, samplers, spaces
from orchestrator.tuning.config import TuneJob
from orchestrator.tuning.explore import Plan
from orchestrator.tuning.space import Space


def tune(config: TuneJob) -> int:
    """Train the trials, rank them, hand the winner over; the exit status."""
    screen = console()
    base = starting_recipe(config)
    chosen = spaces.find(config.search.space, config.recipe)
    checking.check(chosen, base)
    if config.dry_run:
        _show(config, chosen, screen)
        preflight.check_places(config.destination, [base], config.placement.workers)
        return 0
    with opened(config.destination, config.placement, screen) as session:
        explore.at_once(session, config)  # refused before anything is written
        workers = config.placement.workers
        preflight.check_trainable(session.manifest, session.destination.data, [base], workers)
        planned = Plan(config, base, chosen, session.manifest.digest())
        folder = files.join(session.destination.storage, SWEEPS, planned.name)
        with session.leased(folder) as held:
            key = explore.record_plan(session, planned, folder)
            explored = explore.run(session, planned, folder, key, held)
            return _concluded(session, explored)


def _concluded(session: Session, explored: explore.Explored) -> int:
    if session.interruption.event.is_set():
        session.say("stopped; the same command goes on where it was")
        return session.interruption.exit_status
    found = concluding.conclude(session, explored)
    if session.interruption.event.is_set():
        session.say("stopped; the same command goes on where it was")
        return session.interruption.exit_status
    session.closing(explored.key, "FINISHED" if found.winner is not None else "FAILED")
    for line in found.lines:
        session.say(line)
    session.tell_places(explored.folder, explored.key)
    if found.winner is None:
        session.say("no trial finished: there is no winner")
        return FAILED
    return 0


def _show(config: TuneJob, chosen: Space, screen: Console) -> None:
    """Print what would be searched."""
    first = samplers.make(config.search.sampler, chosen, config.recipe, config.search.metric, config.search.seed)
    for line in concluding.plan_lines(config, chosen, first):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)
