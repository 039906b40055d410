"""The jobs about ensembles: train one, evaluate one that is trained."""

from __future__ import annotations

from orchestrator.cli.exit_status import EXIT_FAILURE, make_console
from orchestrator.cli.run_command import resolve_recipe
from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import finished_runs, members, train_and_score
from orchestrator.ensemble.config import EvaluateConfig, TrainEnsembleConfig
from orchestrator.ensemble.report import table_files
from orchestrator.ensemble.train_and_score import EnsembleResult, EnsembleTask
from orchestrator.ray_backend import preflight
from orchestrator.ray_backend.session import Session, open_session
from orchestrator.scheduler import dry_run


def run_train_ensemble(config: TrainEnsembleConfig) -> int:
    """Train, score and record the ensemble; the exit status."""
    screen = make_console()
    recipes = members.build_recipes(resolve_recipe(config), config.ensemble)
    destination = config.destination.resolve()
    # What was asked is checked before anything is started.
    included = finished_runs.find_runs(destination.storage, config.include, "include").runs
    if config.dry_run:
        dry_run.print_dry_run(config, [*recipes, *(spec.recipe for spec in included)], config.plan, screen)
        preflight.check_destination(config.destination, recipes, config.placement.workers)
        return 0
    with open_session(config.destination, config.placement, screen) as session:
        digest = session.manifest.digest()
        runs = [config.build_run_spec(recipe, session.destination, digest) for recipe in recipes]
        preflight.check_trainable(session.manifest, session.destination.data, recipes, config.placement.workers)
        taken = [finished_runs.adapt_to_session(session, spec, "include") for spec in included]
        if twice := {spec.name for spec in runs} & {spec.name for spec in taken}:
            raise ConfigError(f"include: {min(twice)}: is a member already; leave it out")
        result = train_and_score.run_ensemble(
            session, EnsembleTask((*runs, *taken), config.reporting, plan=config.plan)
        )
        return _print_result(session, result, config.reporting.allow_partial)


def run_evaluate(config: EvaluateConfig) -> int:
    """Score finished runs, or the members of ensembles, as one ensemble; the exit status."""
    if not config.runs:
        raise ConfigError("runs: give the name of at least one finished run or ensemble")
    storage, partial = config.provisional_destination.resolve().storage, config.reporting.allow_partial
    found = finished_runs.find_runs(storage, config.runs, "runs", config.members, partial)
    screen = make_console()
    for name in found.unfinished:
        screen.print(f"{name}: is not trained to its end: left out", highlight=False, soft_wrap=True)
    if config.dry_run:
        for spec in found.runs:
            screen.print(f"{spec.name}: {spec.folder}", highlight=False, soft_wrap=True)
        preflight.check_destination(finished_runs.resolve_dataset(found.runs, config.destination))
        return 0
    with open_session(
        finished_runs.resolve_dataset(found.runs, config.destination), config.placement, screen
    ) as session:
        runs = tuple(finished_runs.adapt_to_session(session, spec, "runs", other_data=True) for spec in found.runs)
        digest = session.manifest.digest()
        other_data = digest if any(spec.dataset_digest != digest for spec in runs) else ""
        if other_data:
            if config.reporting.registered:
                raise ConfigError("registered: needs the dataset that the runs were trained on; leave out --data")
            session.print_line(
                f"scoring on another dataset than the runs were trained on: {session.manifest.name} {digest}"
            )
        task = EnsembleTask(
            runs,
            config.reporting,
            config.kind,
            unfinished_count=len(found.unfinished),
            train_members=False,
            other_dataset_digest=other_data,
        )
        result = train_and_score.run_ensemble(session, task)
        return _print_result(session, result, config.reporting.allow_partial)


def _print_result(session: Session, result: EnsembleResult, allow_partial: bool) -> int:
    if session.interruption.event.is_set():
        session.print_line("stopped; the same command goes on where it was")
        return session.interruption.exit_status
    if result.table is not None:
        session.print_line("")
        session.print_line(table_files.render_text(result.table))
        members_scored = f"{result.finished_count} of {result.requested_count} models"
        session.print_line(f"{members_scored}, {result.table.images} images; 1 model: the mean over the single models")
        if result.table.bad_images:
            session.print_line(f"{result.table.bad_images} images could not be decoded and are not counted")
        if result.table.unlabelled:
            session.print_line(f"{result.table.unlabelled} images have no label: they are scored, and not counted")
        if not result.table.of_ilsvrc:
            session.print_line(table_files.PAPER_NOTE)
        session.print_line(f"report:  {result.report}")
    session.print_locations(result.folder, result.key)
    if not result.is_complete:
        session.print_line(f"PARTIAL: {result.finished_count} of {result.requested_count} models finished")
        return 0 if allow_partial and result.table is not None else EXIT_FAILURE
    return 0
