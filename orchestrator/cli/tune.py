"""The job that finds a schedule."""

from __future__ import annotations

from rich.console import Console

from orchestrator.cli.exit_status import EXIT_FAILURE, make_console
from orchestrator.cli.run_command import resolve_recipe
from orchestrator.ray_backend import preflight
from orchestrator.ray_backend.run_lookup import SWEEPS
from orchestrator.ray_backend.session import Session, open_session
from orchestrator.storage import file_io
from orchestrator.tuning import finish_sweep, named_spaces, run_sweep, samplers, validate_space
from orchestrator.tuning.config import TuneJob
from orchestrator.tuning.run_sweep import SweepPlan
from orchestrator.tuning.space import Space


def run_tune(config: TuneJob) -> int:
    """Train the trials, rank them, hand the winner over; the exit status."""
    screen = make_console()
    base = resolve_recipe(config)
    chosen = named_spaces.find_space(config.search.space, config.recipe)
    validate_space.check_space(chosen, base)
    if config.dry_run:
        _print_plan(config, chosen, screen)
        preflight.check_destination(config.destination, [base], config.placement.workers)
        return 0
    with open_session(config.destination, config.placement, screen) as session:
        run_sweep.count_parallel_trials(session, config)  # refused before anything is written
        workers = config.placement.workers
        preflight.check_trainable(session.manifest, session.destination.data, [base], workers)
        planned = SweepPlan(config, base, chosen, session.manifest.digest())
        folder = file_io.join(session.destination.storage, SWEEPS, planned.name)
        with session.hold_lease(folder) as held:
            key = run_sweep.record_plan(session, planned, folder)
            explored = run_sweep.run_trials(session, planned, folder, key, held)
            return _finish_sweep(session, explored)


def _finish_sweep(session: Session, explored: run_sweep.SweepResult) -> int:
    if session.interruption.event.is_set():
        session.print_line("stopped; the same command goes on where it was")
        return session.interruption.exit_status
    found = finish_sweep.rank_and_publish(session, explored)
    if session.interruption.event.is_set():
        session.print_line("stopped; the same command goes on where it was")
        return session.interruption.exit_status
    session.recorder.set_final_status(explored.key, "FINISHED" if found.winner is not None else "FAILED")
    for line in found.lines:
        session.print_line(line)
    session.print_locations(explored.folder, explored.key)
    if found.winner is None:
        session.print_line("no trial finished: there is no winner")
        return EXIT_FAILURE
    return 0


def _print_plan(config: TuneJob, chosen: Space, screen: Console) -> None:
    """Print what would be searched."""
    first = samplers.make_sampler(
        config.search.sampler, chosen, config.recipe, config.search.objective, config.search.seed
    )
    for line in finish_sweep.format_plan(config, chosen, first):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)
