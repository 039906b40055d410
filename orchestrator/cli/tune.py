"""Search for the values of a recipe by many trials."""

from __future__ import annotations

from rich.console import Console

from orchestrator.cli.config import resolve_recipe
from orchestrator.cli.exit_status import EXIT_FAILURE, STOPPED_NOTICE
from orchestrator.monitor.formatting import print_line
from orchestrator.ray_backend import preflight
from orchestrator.ray_backend.run_lookup import SWEEPS
from orchestrator.ray_backend.session import open_session
from orchestrator.storage import file_io
from orchestrator.tuning import finish_sweep, named_spaces, run_sweep
from orchestrator.tuning.config import TuneJob
from orchestrator.tuning.run_sweep import SweepPlan
from orchestrator.tuning.space import check_space


def run_tune(config: TuneJob, console: Console) -> int:
    """Train the trials, rank them, write the winner to a file; return the exit status."""
    space = named_spaces.find_space(config.search.space, config.recipe)
    base = space.pin_code(resolve_recipe(config))
    check_space(space, base)
    if config.dry_run:
        for line in finish_sweep.format_plan(SweepPlan(config, base, space, "")):
            print_line(console, line)
        preflight.check_destination(config.destination, [base], config.placement)
        return 0
    with open_session(config.destination, config.placement, console) as session:
        run_sweep.count_parallel_trials(session, config)  # raises before anything is written
        preflight.check_trainable(session.manifest, session.destination.data, [base], config.placement)
        plan = SweepPlan(config, base, space, session.manifest.digest())
        plan = run_sweep.match_code(plan, session.destination.storage, session.print_line)
        folder = file_io.join(session.destination.storage, SWEEPS, plan.name)
        with session.hold_lease(folder) as lease:
            key = run_sweep.record_plan(session, plan, folder)
            trials = run_sweep.run_trials(session, plan, folder, key, lease)
            stopped = session.interruption.event
            winner, lines = (None, []) if stopped.is_set() else finish_sweep.rank_and_publish(session, trials)
            if stopped.is_set():  # also while the winner is published
                session.print_line(STOPPED_NOTICE)
                return session.interruption.exit_status
            session.recorder.set_final_status(key, "FINISHED" if winner is not None else "FAILED")
            lines += [] if winner is not None else ["no trial finished: there is no winner"]
            for line in lines:
                session.print_line(line)
            session.print_locations(folder, key)
            return 0 if winner is not None else EXIT_FAILURE
