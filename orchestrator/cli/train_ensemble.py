"""Train an ensemble and score it, or score finished runs as one."""

from __future__ import annotations

from rich.console import Console

from orchestrator.cli.config import EnsembleScores, Errors, resolve_recipe
from orchestrator.cli.exit_status import EXIT_FAILURE, STOPPED_NOTICE
from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import finished_runs, members, train_and_score
from orchestrator.ensemble.config import EvaluateConfig, TrainEnsembleConfig
from orchestrator.ensemble.report import wording
from orchestrator.ensemble.train_and_score import EnsembleTask
from orchestrator.evaluation.table3 import Table3
from orchestrator.monitor.formatting import print_line
from orchestrator.ray_backend import preflight
from orchestrator.ray_backend.run_lookup import match_code
from orchestrator.ray_backend.session import Session, open_session
from orchestrator.scheduler import dry_run


def train_ensemble(config: TrainEnsembleConfig, console: Console) -> EnsembleScores:
    """Train what is not trained, score what is not scored, record everything; print progress and table.

    With `dry_run` only the plan is printed. Raises as `train_model` does.
    """
    recipes = members.build_recipes(resolve_recipe(config), config.ensemble)
    # The request is checked before anything is started.
    included = finished_runs.find_runs(config.destination.resolve().storage, config.include, "include")[0]
    if config.dry_run:
        dry_run.print_dry_run(config, [*recipes, *(spec.recipe for spec in included)], config.plan, console)
        preflight.check_destination(config.destination, recipes, config.placement)
        return EnsembleScores("", "", "stopped", (), 0, len(recipes) + len(included))
    with open_session(config.destination, config.placement, console) as session:
        digest = session.manifest.digest()
        runs = [config.build_run_spec(recipe, session.destination, digest) for recipe in recipes]
        preflight.check_trainable(session.manifest, session.destination.data, recipes, config.placement)
        runs = match_code(runs, config.same_code_anyway, session.print_line)
        adapted = [finished_runs.adapt_to_session(session, spec, "include") for spec in included]
        if twice := {spec.name for spec in runs} & {spec.name for spec in adapted}:
            raise ConfigError(f"include: {min(twice)}: is a member already; leave it out")
        metrics = config.placement.execution.metrics
        return _run_task(session, EnsembleTask((*runs, *adapted), config.reporting, plan=config.plan, metrics=metrics))


def evaluate_runs(config: EvaluateConfig, console: Console) -> EnsembleScores:
    """Score finished runs, or the members of ensembles, as one ensemble; print progress and table.

    With `dry_run` the runs are only listed. Raises ConfigError, ClusterError or PreflightError before anything is
    started; NotRecordedError when the scores are kept and MLflow lacks part of them.
    """
    if not config.runs:
        raise ConfigError("runs: give the name of at least one finished run or ensemble")
    storage, partial = config.provisional_destination.resolve().storage, config.reporting.allow_partial
    selected, unfinished = finished_runs.find_runs(storage, config.runs, "runs", config.members, partial)
    for name in unfinished:
        print_line(console, f"{name}: is not finished: left out")
    destination = finished_runs.resolve_dataset(selected, config.destination)
    if config.dry_run:
        for spec in selected:
            print_line(console, f"{spec.name}: {spec.folder}")
        preflight.check_destination(destination)
        return EnsembleScores("", "", "stopped", tuple(spec.name for spec in selected), len(selected), 0)
    with open_session(destination, config.placement, console) as session:
        runs = tuple(finished_runs.adapt_to_session(session, spec, "runs", other_data=True) for spec in selected)
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
            unfinished_count=len(unfinished),
            train_members=False,
            other_dataset_digest=other_data,
            metrics=config.placement.execution.metrics or selected[0].placement.execution.metrics,
        )
        return _run_task(session, task)


def _run_task(session: Session, task: EnsembleTask) -> EnsembleScores:
    """Train and score an ensemble; print its table and where everything is; return the same as a result."""
    result = train_and_score.run_ensemble(session, task)
    names, finished, requested = tuple(spec.name for spec in task.runs), result.finished_count, result.requested_count
    if session.interruption.event.is_set():
        session.print_line(STOPPED_NOTICE)
        status = session.interruption.exit_status
        return EnsembleScores(result.name, result.folder, "stopped", names, finished, requested, exit_status=status)
    table = result.table
    if table is not None:
        _print_table(session, table, f"{finished} of {requested} models")
        session.print_line(f"report:  {result.report}")
    url = session.print_locations(result.folder, result.key)
    if not result.is_complete:
        session.print_line(f"PARTIAL: {finished} of {requested} models finished")
    accepted = result.is_complete or (task.reporting.allow_partial and table is not None)
    return EnsembleScores(
        result.name,
        result.folder,
        "finished" if result.is_complete else "failed",
        names,
        finished,
        requested,
        errors={} if table is None else _collect_errors(table, max(cell.models for cell in table.cells)),
        single_model_errors={} if table is None else _collect_errors(table, 1),
        images=0 if table is None else table.images,
        bad_images=0 if table is None else table.bad_images,
        report=result.report,
        mlflow_url=url,
        exit_status=0 if accepted else EXIT_FAILURE,
    )


def _print_table(session: Session, table: Table3, models: str) -> None:
    session.print_line("")
    session.print_line(wording.render_text(table))
    session.print_line(f"{models}, {table.images} images; 1 model: the mean over the single models")
    if table.bad_images:
        session.print_line(f"{table.bad_images} images could not be decoded and are not counted")
    if table.unlabelled:
        session.print_line(f"{table.unlabelled} images have no label: they are scored, and not counted")
    if not table.of_ilsvrc:
        session.print_line(wording.PAPER_NOTE)


def _collect_errors(table: Table3, models: int) -> dict[int, Errors]:
    return {
        cell.crops: Errors(cell.top1_error, cell.top5_error, cell.top1_interval, cell.top5_interval)
        for cell in table.cells
        if cell.models == models
    }
