"""Score finished runs as one ensemble."""

from __future__ import annotations

from rich.console import Console

from orchestrator.cli.exit_status import EXIT_FAILURE, STOPPED_NOTICE, make_console
from orchestrator.cli.results import EnsembleScores, Errors
from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import finished_runs, train_and_score
from orchestrator.ensemble.config import EvaluateConfig
from orchestrator.ensemble.report import wording
from orchestrator.ensemble.train_and_score import EnsembleResult, EnsembleTask
from orchestrator.evaluation.table3 import Table3
from orchestrator.ray_backend import preflight
from orchestrator.ray_backend.session import Session, open_session


def run_evaluate(config: EvaluateConfig) -> int:
    """Score the runs, or list them; return the exit status."""
    return evaluate_runs(config, make_console()).exit_status


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
        console.print(f"{name}: is not finished: left out", highlight=False, soft_wrap=True)
    destination = finished_runs.resolve_dataset(selected, config.destination)
    if config.dry_run:
        for spec in selected:
            console.print(f"{spec.name}: {spec.folder}", highlight=False, soft_wrap=True)
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
        return summarize_result(session, task, train_and_score.run_ensemble(session, task))


def summarize_result(session: Session, task: EnsembleTask, result: EnsembleResult) -> EnsembleScores:
    """Print the table of an ensemble and where everything is; return the same as a result."""
    names = tuple(spec.name for spec in task.runs)
    counts = (result.finished_count, result.requested_count)
    if session.interruption.event.is_set():
        session.print_line(STOPPED_NOTICE)
        status = session.interruption.exit_status
        return EnsembleScores(result.name, result.folder, "stopped", names, *counts, exit_status=status)
    table = result.table
    if table is not None:
        _print_table(session, table, f"{counts[0]} of {counts[1]} models")
        session.print_line(f"report:  {result.report}")
    url = session.print_locations(result.folder, result.key)
    if not result.is_complete:
        session.print_line(f"PARTIAL: {counts[0]} of {counts[1]} models finished")
    accepted = result.is_complete or (task.reporting.allow_partial and table is not None)
    return EnsembleScores(
        result.name,
        result.folder,
        "finished" if result.is_complete else "failed",
        names,
        *counts,
        errors={} if table is None else _collect_errors(table, max(cell.models for cell in table.cells)),
        single_model_errors={} if table is None else _collect_errors(table, 1),
        images=0 if table is None else table.images,
        bad_images=0 if table is None else table.bad_images,
        report=result.report,
        mlflow_url=url,
        exit_status=0 if accepted else EXIT_FAILURE,
    )


def _print_table(session: Session, table: Table3, members: str) -> None:
    session.print_line("")
    session.print_line(wording.render_text(table))
    session.print_line(f"{members}, {table.images} images; 1 model: the mean over the single models")
    if table.bad_images:
        session.print_line(f"{table.bad_images} images could not be decoded and are not counted")
    if table.unlabelled:
        session.print_line(f"{table.unlabelled} images have no label: they are scored, and not counted")
    if not table.of_ilsvrc:
        session.print_line(wording.PAPER_NOTE)


def _collect_errors(table: Table3, models: int) -> dict[int, Errors]:
    """Return the errors of so many models by number of crops."""
    return {
        cell.crops: Errors(cell.top1_error, cell.top5_error, cell.top1_interval, cell.top5_interval)
        for cell in table.cells
        if cell.models == models
    }
