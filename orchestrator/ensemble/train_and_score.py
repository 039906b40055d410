"""The main command: train the members, score them, join and record the scores."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.config.overrides import flatten_config
from orchestrator.ensemble import ensemble_registry, scoring
from orchestrator.ensemble.config import ReportingConfig
from orchestrator.ensemble.report import ensemble_report, wording
from orchestrator.ensemble.report.ensemble_plots import ErrorCurves
from orchestrator.ensemble.scoring import WeightsKind
from orchestrator.evaluation.analysis import analyze_ensemble
from orchestrator.evaluation.analysis_results import Analysis
from orchestrator.evaluation.table3 import Table3
from orchestrator.ray_backend.run_lookup import ENSEMBLE_FILE, MADE_BY_EVALUATION, MADE_BY_TRAINING, SCORING_FILE
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.recipe.config import MetricPlugin
from orchestrator.scheduler import multi_run
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.progress import ProgressMonitor
from orchestrator.storage import file_io
from orchestrator.tracking.connect import MLFLOW
from orchestrator.tracking.tracker import MetricPoint, TrackedRun, Tracker, log_run_folder

_LOGGED_FILES = ("table.md", ensemble_report.HTML_FILE, ensemble_report.MARKDOWN_FILE, ENSEMBLE_FILE)


@dataclass(frozen=True)
class EnsembleTask:
    """The models of an ensemble, and what of them is scored and reported."""

    runs: tuple[RunSpec, ...]
    reporting: ReportingConfig
    kind: WeightsKind = "averaged"
    plan: PlanConfig = field(default_factory=PlanConfig)
    unfinished_count: int = 0  # of requested models
    train_members: bool = True  # else all are trained and recorded, and only scored here
    other_dataset_digest: str = ""  # of the scored dataset, unless it is the runs' own
    metrics: tuple[MetricPlugin, ...] = ()  # of the user, for the table

    @property
    def requested_count(self) -> int:
        """The number of requested models."""
        return len(self.runs) + self.unfinished_count

    @property
    def name(self) -> str:
        """The name of the ensemble: its family, size and a hash of its members."""
        kind = "" if self.kind == "averaged" else f"-{self.kind}"
        members = compute_fingerprint([spec.identity for spec in self.runs])
        on = f"-on-{self.other_dataset_digest[:8]}" if self.other_dataset_digest else ""
        return f"{get_family_name(self.runs)}-x{len(self.runs)}{kind}{on}-{members}"


@dataclass(frozen=True)
class EnsembleResult:
    """The result of an ensemble; `table` is None when nothing could be scored."""

    name: str
    folder: str
    key: str
    finished_count: int
    requested_count: int
    table: Table3 | None
    report: str = ""

    @property
    def is_complete(self) -> bool:
        """True if every member was trained and scored."""
        return self.finished_count == self.requested_count and self.table is not None


def get_family_name(runs: Sequence[RunSpec]) -> str:
    """Return the first run's name without its number as a member."""
    return re.sub(r"-m\d+(-wide)?$", "", runs[0].recipe.name)


def run_ensemble(session: Session, task: EnsembleTask) -> EnsembleResult:
    """Train and score the members that are not yet, join and record the scores.

    A partial ensemble is called partial. Raises LeaseHeldError when another driver runs the ensemble.
    """
    runs, name = task.runs, task.name
    folder = file_io.join(session.destination.storage, "ensembles", name)
    with session.hold_lease(folder):
        key = _open_tracked_run(session, task, folder)
        if task.train_members:
            images = session.manifest.count_samples(scoring.SCORED_SPLIT)
            trained = multi_run.train_runs(session, runs, key, task.plan, images)
            finished = [spec for spec in runs if trained.results[spec.name].status == "finished"]
            progress = trained.progress
        else:
            # Their runs in the tracker are complete.
            finished, progress = list(runs), ProgressMonitor(runs)
            progress.poll(waiting=True)
        table = None
        if finished and not session.interruption.event.is_set():
            scores = scoring.score_runs(session, finished, task.kind, folder)
            if not session.interruption.event.is_set():
                analysis = analyze_ensemble(scores, session.manifest, scoring.SCORED_SPLIT, task.metrics)
                curves = {name: row.error_curve for name, row in progress.rows.items() if row.error_curve}
                _record_result(session, task, folder, key, finished, analysis, curves)
                table = analysis.table
        file_io.remove(file_io.join(folder, SCORING_FILE))
        report = file_io.join(folder, ensemble_report.HTML_FILE)
        result = EnsembleResult(name, folder, key, len(finished), task.requested_count, table, report)
        if not session.interruption.event.is_set():
            session.recorder.set_final_status(key, "FINISHED" if result.is_complete else "FAILED")
        return result


def _open_tracked_run(session: Session, task: EnsembleTask, folder: str) -> str:
    """Write the ensemble's definition and open its run in the tracker; return the run's key there."""
    runs, name = task.runs, task.name
    recipes = {spec.name: flatten_config(spec.recipe) for spec in runs}
    storage = session.destination.storage
    definition = {
        "members": list(recipes),
        "elsewhere": {spec.name: redaction.redact(spec.folder) for spec in runs if spec.destination.storage != storage},
        "recipes": {spec.name: spec.recipe.to_dict() for spec in runs},
        **_read_origin(folder, task.train_members),
    }
    file_io.write_bytes(file_io.join(folder, ENSEMBLE_FILE), json.dumps(definition, indent=1).encode())
    key = session.recorder.make_tracking_key(name)
    # Values that all members share are the ensemble's parameters.
    first, *others = recipes.values()
    shared = {path: str(value) for path, value in first.items() if all(other.get(path) == value for other in others)}
    params = {"members": str(len(runs)), "dataset": f"{session.manifest.name} {session.manifest.digest()}"}
    tags = {"orchestrator.folder": redaction.redact(folder), "orchestrator.members": ",".join(recipes)}
    session.recorder.record_parent_run(TrackedRun(key, name, None, params | shared, tags))
    return key


def _read_origin(folder: str, trains: bool) -> dict[str, object]:
    """Return which command first made the ensemble in a folder, and when (unix seconds); `predict` chooses by it.

    A trained ensemble stays one when it is evaluated.
    """
    before = file_io.read_json_or_empty(file_io.join(folder, ENSEMBLE_FILE))
    made_by, created = before.get("made_by"), before.get("created")
    if made_by == MADE_BY_TRAINING or (made_by == MADE_BY_EVALUATION and not trains):
        return {"made_by": made_by, "created": created if isinstance(created, int | float) else time.time()}
    return {"made_by": MADE_BY_TRAINING if trains else MADE_BY_EVALUATION, "created": time.time()}


def _record_result(
    session: Session, task: EnsembleTask, folder: str, key: str, finished: Sequence[RunSpec], analysis: Analysis,
    curves: ErrorCurves,
) -> None:  # fmt: skip
    """Write the report below `folder`, and have the tracker's thread log it and register the model.

    Only complete ensembles of averaged weights are registered; the best weights were chosen on the scored split.
    """
    table, manifest = analysis.table, session.manifest
    about = {
        "ensemble": task.name,
        "weights": task.kind,
        "members": [spec.name for spec in finished],
        "members_asked_for": task.requested_count,
        "dataset": manifest.name,
        "dataset_digest": manifest.digest(),
        "split": scoring.SCORED_SPLIT,
        "input_sizes": sorted({spec.recipe.model.image_size for spec in finished}),
        "weights_digests": {spec.name: scoring.find_weights(spec, task.kind).digest for spec in finished},
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "versions": {name: version(name) for name in ("googlenet-orchestrator", "torch", "ray")},
    }
    ensemble_report.write_report(folder, about, analysis, curves)
    replayer = session.recorder.replayer
    replayer.submit(partial(_log_result, session, key, folder, table), required_key=key)
    registered = task.reporting.registered and session.destination.tracker.kind == MLFLOW  # the registry is MLflow's
    if registered and task.kind == "averaged" and len(finished) == task.requested_count:
        replayer.submit(partial(_register_model, session, key, task, wording.render_markdown(table)), required_key=key)


def _log_result(session: Session, key: str, folder: str, table: Table3, tracker: Tracker) -> None:
    """Log the table in the tracker: as metrics, a table, text and pictures."""
    run_id = session.recorder.replayer.wait_for_run_id(key, 0.0)
    points = [
        MetricPoint(f"ensemble/{name}_{cell.models}x{cell.crops}", value, 0, time.time())
        for cell in table.cells
        for name, value in {"top1_error": cell.top1_error, "top5_error": cell.top5_error, **cell.metrics}.items()
    ]
    tracker.log_metrics(run_id, points)
    tracker.log_table(run_id, "table3.json", wording.build_columns(table))
    # MLflow shows this tag, as Markdown, at the top of the run's page.
    tracker.set_tags(run_id, {"mlflow.note.content": wording.render_markdown(table)})
    log_run_folder(tracker, run_id, folder, _LOGGED_FILES)


def _register_model(session: Session, key: str, task: EnsembleTask, about: str, _tracker: Tracker) -> None:
    """Register the ensemble; the same one again changes nothing."""
    dataset, model = session.manifest, get_family_name(task.runs)
    # The presets of such families are made for the embedded data.
    if not session.destination.is_embedded:
        model = ensemble_registry.make_model_name(model, dataset.name, dataset.digest())
    registered = ensemble_registry.register_ensemble(
        session.destination.tracking,
        session.recorder.replayer.wait_for_run_id(key, 0.0),
        model,
        task.name,
        [spec.folder for spec in task.runs],
        dataset.titles,
        about,
    )
    age = "new" if registered.is_new else "there already"
    session.print_line(f"model:   {registered.uri} (version {registered.version}, {age})")
