"""The main command: train the members, score them, join and record the scores."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.config.overrides import flatten_config
from orchestrator.data.manifest import Manifest
from orchestrator.ensemble import result_writer, scoring
from orchestrator.ensemble.config import MAX_IMAGES_FOR_RAW, ReportingConfig
from orchestrator.ensemble.result_writer import EnsembleOutcome
from orchestrator.ensemble.scoring import WeightsKind
from orchestrator.evaluation import analysis
from orchestrator.evaluation.analysis import MemberScores
from orchestrator.evaluation.table3 import Table3
from orchestrator.ray_backend.run_lookup import ENSEMBLE_FILE, MADE_BY_EVALUATION, MADE_BY_TRAINING, SCORING_FILE
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.scheduler import multi_run
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.progress import ProgressMonitor
from orchestrator.storage import file_io
from orchestrator.tracking.tracker import TrackedRun


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
            scored = len(_choose_weights_kinds(task, session.manifest)) * session.manifest.count_samples(
                scoring.SCORED_SPLIT
            )
            trained = multi_run.train_runs(session, runs, key, task.plan, scored)
            finished = [spec for spec in runs if trained.results[spec.name].status == "finished"]
            progress = trained.progress
        else:
            # Their runs in the tracker are complete.
            finished, progress = list(runs), ProgressMonitor(runs)
            progress.poll(waiting=True)
        table = None
        if finished and not session.interruption.event.is_set():
            table = _score_members(session, folder, key, task, finished, progress)
        file_io.remove(file_io.join(folder, SCORING_FILE))
        result = EnsembleResult(
            name, folder, key, len(finished), task.requested_count, table, result_writer.get_report_url(folder)
        )
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


def _score_members(
    session: Session, folder: str, key: str, task: EnsembleTask, finished: Sequence[RunSpec], progress: ProgressMonitor
) -> Table3 | None:
    """Score the finished members and record the result; None when a stop was requested meanwhile."""
    kinds = _choose_weights_kinds(task, session.manifest)
    folders, *others = scoring.score_weights_kinds(session, finished, kinds, ensemble=folder)
    raw: Sequence[str | None] = others[0] if others else [None] * len(finished)
    if session.interruption.event.is_set():
        return None
    names = [spec.name for spec in finished]
    members = [MemberScores(*scores) for scores in zip(names, folders, raw, strict=True)]
    outcome = EnsembleOutcome(
        name=task.name,
        family=get_family_name(task.runs),
        kind=task.kind,
        scored_runs=tuple(finished),
        requested_count=task.requested_count,
        analysis=analysis.analyze_ensemble(members, session.manifest, scoring.SCORED_SPLIT),
        curves={name: row.error_curve for name, row in progress.rows.items() if row.error_curve},
    )
    result_writer.record_result(session, folder, key, outcome, task.reporting.registered)
    return outcome.analysis.table


def _choose_weights_kinds(task: EnsembleTask, manifest: Manifest) -> tuple[WeightsKind, ...]:
    """Return the kinds of weights to score."""
    scores_raw = task.kind == "averaged" and _should_score_raw(task.reporting, manifest)
    return ("averaged", "raw") if scores_raw else (task.kind,)


def _should_score_raw(reporting: ReportingConfig, manifest: Manifest) -> bool:
    """Return whether raw weights are scored, too."""
    if reporting.raw is not None:
        return reporting.raw
    return manifest.count_samples(scoring.SCORED_SPLIT) <= MAX_IMAGES_FOR_RAW
