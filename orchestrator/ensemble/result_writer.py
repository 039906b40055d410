"""The results of an ensemble: files in its folder, its run in the tracker, a model in the registry."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from orchestrator.ensemble import ensemble_registry, scoring
from orchestrator.ensemble.report import ensemble_report, table_files, thumbnails
from orchestrator.ensemble.scoring import WeightsKind
from orchestrator.evaluation.analysis_results import Analysis
from orchestrator.evaluation.table3 import Table3
from orchestrator.ray_backend.run_lookup import ENSEMBLE_FILE
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.storage import file_io
from orchestrator.tracking.connect import MLFLOW
from orchestrator.tracking.tracker import MetricPoint, Tracker, log_run_folder

_LOGGED_FILES = ("table.md", ensemble_report.HTML_FILE, ensemble_report.MARKDOWN_FILE, ENSEMBLE_FILE)


@dataclass(frozen=True)
class EnsembleOutcome:
    """The scores of an ensemble, and what they are of."""

    name: str
    family: str  # name of such ensembles in the model registry
    kind: WeightsKind  # which weights were scored
    scored_runs: tuple[RunSpec, ...]  # its members
    requested_count: int  # of members
    analysis: Analysis
    curves: Mapping[str, Sequence[tuple[float, float]]]  # by run: epochs and validation errors in percent


def get_report_url(folder: str) -> str:
    """Return the URL of an ensemble's report."""
    return file_io.join(folder, ensemble_report.HTML_FILE)


def record_result(session: Session, folder: str, key: str, outcome: EnsembleOutcome, registered: bool) -> None:
    """Write the report below `folder`, and have the tracker's thread log it and register the model.

    Only complete ensembles of averaged weights are registered; the best weights were chosen on the scored split.
    """
    table, about = outcome.analysis.table, _describe_result(session, outcome)
    mistakes = [mistake.image for mistake in outcome.analysis.mistakes]
    shown = thumbnails.make_thumbnails(session.destination.data, session.manifest, outcome.analysis.split, mistakes)
    ensemble_report.write_report(folder, about, outcome.analysis, outcome.curves, shown)
    session.recorder.replayer.submit(partial(_log_result, session, key, folder, table), required_key=key)
    registered = registered and session.destination.tracker.kind == MLFLOW  # the registry is MLflow's
    if registered and outcome.kind == "averaged" and len(outcome.scored_runs) == outcome.requested_count:
        session.recorder.replayer.submit(
            partial(_register_model, session, key, outcome, table_files.render_markdown(table)), required_key=key
        )


def _describe_result(session: Session, outcome: EnsembleOutcome) -> dict[str, object]:
    return {
        "ensemble": outcome.name,
        "weights": outcome.kind,
        "members": [spec.name for spec in outcome.scored_runs],
        "members_asked_for": outcome.requested_count,
        "dataset": session.manifest.name,
        "dataset_digest": session.manifest.digest(),
        "split": scoring.SCORED_SPLIT,
        "input_sizes": sorted({spec.recipe.model.image_size for spec in outcome.scored_runs}),
        "weights_digests": {spec.name: scoring.find_weights(spec, outcome.kind).digest for spec in outcome.scored_runs},
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "versions": {name: version(name) for name in ("googlenet-orchestrator", "torch", "ray")},
    }


def _log_result(session: Session, key: str, folder: str, table: Table3, tracker: Tracker) -> None:
    """Log the table in the tracker: as metrics, a table, text and pictures."""
    run_id = session.recorder.replayer.wait_for_run_id(key, 0.0)
    metrics = {
        f"ensemble/top{rank}_error_{cell.models}x{cell.crops}": value
        for cell in table.cells
        for rank, value in ((1, cell.top1_error), (5, cell.top5_error))
    }
    now = time.time()
    tracker.log_metrics(run_id, [MetricPoint(name, value, 0, now) for name, value in metrics.items()])
    tracker.log_table(run_id, "table3.json", table_files.build_columns(table))
    # MLflow shows this tag, as Markdown, at the top of the run's page.
    tracker.set_tags(run_id, {"mlflow.note.content": table_files.render_markdown(table)})
    log_run_folder(tracker, run_id, folder, _LOGGED_FILES)


def _register_model(session: Session, key: str, outcome: EnsembleOutcome, about: str, _tracker: Tracker) -> None:
    """Register the ensemble; the same one again changes nothing."""
    dataset = session.manifest
    # The presets of such families are made for the embedded data.
    is_embedded = session.destination.is_embedded
    model = ensemble_registry.register_ensemble(
        session.destination.tracking,
        session.recorder.replayer.wait_for_run_id(key, 0.0),
        outcome.family
        if is_embedded
        else ensemble_registry.make_model_name(outcome.family, dataset.name, dataset.digest()),
        outcome.name,
        [spec.folder for spec in outcome.scored_runs],
        dataset.titles,
        about,
        former=outcome.family,
    )
    session.print_line(f"model:   {model.uri} (version {model.version}, {'new' if model.is_new else 'there already'})")
