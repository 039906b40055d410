"""What an ensemble's result leaves behind: files in its folder, its run in the tracker, a model in the registry."""

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
from orchestrator.tracking import artifacts
from orchestrator.tracking.tracker import MetricPoint, Tracker

_LOGGED_FILES = ("table.md", ensemble_report.HTML_FILE, ensemble_report.MARKDOWN_FILE, ENSEMBLE_FILE)


@dataclass(frozen=True)
class EnsembleOutcome:
    """What came of an ensemble."""

    name: str
    family: str  # what ensembles of such members are called in the model registry
    kind: WeightsKind  # which weights were scored
    scored_runs: tuple[RunSpec, ...]  # the members that are in it
    requested_count: int  # that were asked for
    analysis: Analysis
    curves: Mapping[str, Sequence[tuple[float, float]]]  # by run: epochs and validation errors in percent


def get_report_url(folder: str) -> str:
    """Where the report of an ensemble lies."""
    return file_io.join(folder, ensemble_report.HTML_FILE)


def record_result(session: Session, folder: str, key: str, found: EnsembleOutcome, registered: bool) -> None:
    """Write everything below `folder`, and have the tracker's thread log it and register the model.

    A partial ensemble is not registered, nor one of weights that were chosen on the split that is scored.
    """
    table, about = found.analysis.table, _describe_result(session, found)
    table_files.write_files(folder, table, about, found.curves)
    mistakes = [mistake.image for mistake in found.analysis.mistakes]
    shown = thumbnails.make_thumbnails(session.destination.data, session.manifest, found.analysis.split, mistakes)
    ensemble_report.write_report(folder, about, found.analysis, found.curves, shown)
    session.recorder.replayer.submit(partial(_log_result, session, key, folder, table), needs=key)
    if registered and found.kind == "averaged" and len(found.scored_runs) == found.requested_count:
        session.recorder.replayer.submit(
            partial(_register_model, session, key, found, table_files.render_markdown(table)), needs=key
        )


def _describe_result(session: Session, found: EnsembleOutcome) -> dict[str, object]:
    return {
        "ensemble": found.name,
        "weights": found.kind,
        "members": [spec.name for spec in found.scored_runs],
        "members_asked_for": found.requested_count,
        "dataset": session.manifest.name,
        "dataset_digest": session.manifest.digest(),
        "split": scoring.SCORED_SPLIT,
        "input_sizes": sorted({spec.recipe.model.image_size for spec in found.scored_runs}),
        "weights_digests": {spec.name: scoring.find_weights(spec, found.kind).digest for spec in found.scored_runs},
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "versions": {name: version(name) for name in ("googlenet-orchestrator", "torch", "ray")},
    }


def _log_result(session: Session, key: str, folder: str, table: Table3, tracker: Tracker) -> None:
    """The table in the tracker: as metrics, as a table, as text, as pictures."""
    run_id = session.recorder.replayer.wait_for_run_id(key, 0.0)
    metrics = {
        f"ensemble/top{rank}_error_{cell.models}x{cell.crops}": value
        for cell in table.cells
        for rank, value in ((1, cell.top1_error), (5, cell.top5_error))
    }
    now = time.time()
    tracker.log_metrics(run_id, [MetricPoint(name, value, 0, now) for name, value in metrics.items()])
    tracker.log_table(run_id, "table3.json", table_files.build_columns(table))
    # MLflow shows this tag, as Markdown, at the head of the run's page.
    tracker.set_tags(run_id, {"mlflow.note.content": table_files.render_markdown(table)})
    artifacts.log_run_folder(tracker, run_id, folder, _LOGGED_FILES)


def _register_model(session: Session, key: str, found: EnsembleOutcome, about: str, _tracker: Tracker) -> None:
    """The ensemble in the model registry; the same one again changes nothing."""
    dataset = session.manifest
    # The embedded data is what such presets are made for.
    own = session.destination.is_embedded
    made = ensemble_registry.register_ensemble(
        session.destination.tracking,
        session.recorder.replayer.wait_for_run_id(key, 0.0),
        found.family if own else ensemble_registry.make_model_name(found.family, dataset.name, dataset.digest()),
        found.name,
        [spec.folder for spec in found.scored_runs],
        dataset.titles,
        about,
        former=found.family,
    )
    session.print_line(f"model:   {made.uri} (version {made.version}, {'new' if made.is_new else 'there already'})")
