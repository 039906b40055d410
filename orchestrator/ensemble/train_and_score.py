"""The main job: train the members, score them, say what came of it, record everything."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.config import redaction
from orchestrator.config.fingerprint import compute_fingerprint
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
    """Which models, what of them is scored, and what is told."""

    runs: tuple[RunSpec, ...]
    reporting: ReportingConfig
    kind: WeightsKind = "averaged"
    plan: PlanConfig = field(default_factory=PlanConfig)
    unfinished_count: int = 0  # models that were asked for as well, and are not trained to their end
    train_members: bool = True  # what is not trained; else all of them are, and recorded, and only scored here
    other_dataset_digest: str = ""  # digest of the dataset that is scored, where it is not the runs' own

    @property
    def requested_count(self) -> int:
        """How many models were asked for."""
        return len(self.runs) + self.unfinished_count

    @property
    def name(self) -> str:
        """What the ensemble is called: its family, size and a hash of its members."""
        chosen = "" if self.kind == "averaged" else f"-{self.kind}"
        members = compute_fingerprint([spec.identity for spec in self.runs])
        on = f"-on-{self.other_dataset_digest[:8]}" if self.other_dataset_digest else ""
        return f"{get_family_name(self.runs)}-x{len(self.runs)}{chosen}{on}-{members}"


@dataclass(frozen=True)
class EnsembleResult:
    """What came of it; `table` is None when nothing could be scored."""

    name: str
    folder: str
    key: str
    finished_count: int
    requested_count: int
    table: Table3 | None
    report: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether every member was trained and all were scored."""
        return self.finished_count == self.requested_count and self.table is not None


def get_family_name(runs: Sequence[RunSpec]) -> str:
    """What an ensemble of these runs is called: the first one's name without its number as a member."""
    return re.sub(r"-m\d+(-wide)?$", "", runs[0].recipe.name)


def run_ensemble(session: Session, task: EnsembleTask) -> EnsembleResult:
    """Train what is not trained, score what is not scored, join and record.

    A partial ensemble is named so, never passed off as whole. Raises LeaseHeldError when another driver runs it.
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
            usable = [spec for spec in runs if trained.results[spec.name].status == "finished"]
            board = trained.progress
        else:
            # Each of them has its run in the tracker, to which scores add nothing.
            usable, board = list(runs), ProgressMonitor(runs)
            board.poll(waiting=True)
        table = None
        if usable and not session.interruption.event.is_set():
            table = _score_members(session, folder, key, task, usable, board)
        file_io.remove(file_io.join(folder, SCORING_FILE))
        result = EnsembleResult(
            name, folder, key, len(usable), task.requested_count, table, result_writer.get_report_url(folder)
        )
        if not session.interruption.event.is_set():
            session.set_final_status(key, "FINISHED" if result.is_complete else "FAILED")
        return result


def _open_tracked_run(session: Session, task: EnsembleTask, folder: str) -> str:
    """Write what the ensemble is made of and open its run in the tracker; its key there."""
    runs, name = task.runs, task.name
    recipes = {spec.name: flatten_config(spec.recipe) for spec in runs}
    own = session.destination.storage
    resolved = {
        "members": list(recipes),
        "elsewhere": {spec.name: redaction.redact(spec.folder) for spec in runs if spec.destination.storage != own},
        "recipes": {spec.name: spec.recipe.to_dict() for spec in runs},
        **_read_origin(folder, task.train_members),
    }
    file_io.write_bytes(file_io.join(folder, ENSEMBLE_FILE), json.dumps(resolved, indent=1).encode())
    key = session.make_tracking_key(name)
    # What all members share are the ensemble's own parameters; the children's show what differs.
    first, *others = recipes.values()
    shared = {path: str(value) for path, value in first.items() if all(other.get(path) == value for other in others)}
    params = {"members": str(len(runs)), "dataset": f"{session.manifest.name} {session.manifest.digest()}"}
    tags = {"orchestrator.folder": redaction.redact(folder), "orchestrator.members": ",".join(recipes)}
    session.record_parent_run(TrackedRun(key, name, None, params | shared, tags))
    return key


def _read_origin(folder: str, trains: bool) -> dict[str, object]:
    """Return who first made the ensemble in a folder, and when (unix seconds): what `predict` chooses by.

    An evaluation of a trained ensemble leaves it one.
    """
    before = file_io.read_json_or_empty(file_io.join(folder, ENSEMBLE_FILE))
    made_by, created = before.get("made_by"), before.get("created")
    if made_by == MADE_BY_TRAINING or (made_by == MADE_BY_EVALUATION and not trains):
        return {"made_by": made_by, "created": created if isinstance(created, int | float) else time.time()}
    return {"made_by": MADE_BY_TRAINING if trains else MADE_BY_EVALUATION, "created": time.time()}


def _score_members(
    session: Session, folder: str, key: str, task: EnsembleTask, usable: Sequence[RunSpec], board: ProgressMonitor
) -> Table3 | None:
    """Score what is trained and record it; None when a wish to stop came in between."""
    kinds = _choose_weights_kinds(task, session.manifest)
    folders, *others = scoring.score_weights_kinds(session, usable, kinds, ensemble=folder)
    raw: Sequence[str | None] = others[0] if others else [None] * len(usable)
    if session.interruption.event.is_set():
        return None
    members = [MemberScores(*one) for one in zip([spec.name for spec in usable], folders, raw, strict=True)]
    found = EnsembleOutcome(
        name=task.name,
        family=get_family_name(task.runs),
        kind=task.kind,
        scored_runs=tuple(usable),
        requested_count=task.requested_count,
        analysis=analysis.analyze_ensemble(members, session.manifest, scoring.SCORED_SPLIT),
        curves={name: row.error_curve for name, row in board.rows.items() if row.error_curve},
    )
    result_writer.record_result(session, folder, key, found, task.reporting.registered)
    return found.analysis.table


def _choose_weights_kinds(task: EnsembleTask, manifest: Manifest) -> tuple[WeightsKind, ...]:
    """Return the kinds of weights that are scored."""
    compares = task.kind == "averaged" and _should_score_raw(task.reporting, manifest)
    return ("averaged", "raw") if compares else (task.kind,)


def _should_score_raw(reporting: ReportingConfig, manifest: Manifest) -> bool:
    """Whether raw weights are scored, too."""
    if reporting.raw is not None:
        return reporting.raw
    return sum(shard.samples for shard in manifest.shards(scoring.SCORED_SPLIT)) <= MAX_IMAGES_FOR_RAW
