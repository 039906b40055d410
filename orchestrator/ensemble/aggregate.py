"""The main job: train the members, score them, say what came of it, record everything."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.config.fingerprint import fingerprint
from orchestrator.config.overrides import paths
from orchestrator.data.manifest import Manifest
from orchestrator.ensemble import recorded, scoring
from orchestrator.ensemble.config import RAW_IMAGES, Reporting
from orchestrator.ensemble.recorded import Found
from orchestrator.ensemble.scoring import Kind
from orchestrator.evaluation import analysis
from orchestrator.evaluation.analysis import Scored
from orchestrator.evaluation.table3 import Table3
from orchestrator.fleet import fleet
from orchestrator.fleet.board import Board
from orchestrator.fleet.config import PlanConfig
from orchestrator.launch.config import RunSpec
from orchestrator.launch.named import EVALUATED, SCORING, SPEC, TRAINED
from orchestrator.launch.session import Session
from orchestrator.storage import files, urls
from orchestrator.tracking.tracker import TrackedRun


@dataclass(frozen=True)
class Task:
    """Which models, what of them is scored, and what is told."""

    runs: tuple[RunSpec, ...]
    reporting: Reporting
    kind: Kind = "averaged"
    plan: PlanConfig = field(default_factory=PlanConfig)
    left_out: int = 0  # models that were asked for as well, and are not trained to their end
    trains: bool = True  # what is not trained; else all of them are, and recorded, and only scored here
    other_data: str = ""  # digest of the dataset that is scored, where it is not the runs' own

    @property
    def members(self) -> int:
        """How many models were asked for."""
        return len(self.runs) + self.left_out

    @property
    def name(self) -> str:
        """What the ensemble is called: its family, size and a hash of its members."""
        chosen = "" if self.kind == "averaged" else f"-{self.kind}"
        members = fingerprint([spec.identity for spec in self.runs])
        on = f"-on-{self.other_data[:8]}" if self.other_data else ""
        return f"{family(self.runs)}-x{len(self.runs)}{chosen}{on}-{members}"


@dataclass(frozen=True)
class EnsembleResult:
    """What came of it; `table` is None when nothing could be scored."""

    name: str
    folder: str
    key: str
    finished: int
    members: int
    table: Table3 | None
    report: str = ""

    @property
    def whole(self) -> bool:
        """Whether every member was trained and all were scored."""
        return self.finished == self.members and self.table is not None


def family(runs: Sequence[RunSpec]) -> str:
    """What an ensemble of these runs is called: the first one's name without its number as a member."""
    return re.sub(r"-m\d+(-wide)?$", "", runs[0].recipe.name)


def run(session: Session, task: Task) -> EnsembleResult:
    """Train what is not trained, score what is not scored, join and record.

    A partial ensemble is named so, never passed off as whole. Raises LeaseHeldError when another driver runs it.
    """
    runs, name = task.runs, task.name
    folder = files.join(session.destination.storage, "ensembles", name)
    with session.leased(folder):
        key = _record(session, task, folder)
        if task.trains:
            scored = len(_kinds(task, session.manifest)) * session.manifest.samples(scoring.SPLIT)
            trained = fleet.train(session, runs, key, task.plan, session.stop_one, scored)
            usable = [spec for spec in runs if trained.ended[spec.name].status == "finished"]
            board = trained.board
        else:
            # Each of them has its run in the tracker, to which scores add nothing.
            usable, board = list(runs), Board(runs)
            board.poll(waiting=True)
        table = None
        if usable and not session.interruption.event.is_set():
            table = _score(session, folder, key, task, usable, board)
        files.remove(files.join(folder, SCORING))
        result = EnsembleResult(name, folder, key, len(usable), task.members, table, recorded.report_url(folder))
        if not session.interruption.event.is_set():
            session.closing(key, "FINISHED" if result.whole else "FAILED")
        return result


def _record(session: Session, task: Task, folder: str) -> str:
    """Write what the ensemble is made of and open its run in the tracker; its key there."""
    runs, name = task.runs, task.name
    recipes = {spec.name: paths(spec.recipe) for spec in runs}
    own = session.destination.storage
    resolved = {
        "members": list(recipes),
        "elsewhere": {spec.name: urls.redact(spec.folder) for spec in runs if spec.destination.storage != own},
        "recipes": {spec.name: spec.recipe.to_dict() for spec in runs},
        **_origin(folder, task.trains),
    }
    files.write_bytes(files.join(folder, SPEC), json.dumps(resolved, indent=1).encode())
    key = session.key(name)
    # What all members share are the ensemble's own parameters; the children's show what differs.
    first, *others = recipes.values()
    shared = {path: str(value) for path, value in first.items() if all(other.get(path) == value for other in others)}
    params = {"members": str(len(runs)), "dataset": f"{session.manifest.name} {session.manifest.digest()}"}
    tags = {"orchestrator.folder": urls.redact(folder), "orchestrator.members": ",".join(recipes)}
    session.opened_run(TrackedRun(key, name, None, params | shared, tags))
    return key


def _origin(folder: str, trains: bool) -> dict[str, object]:
    """Return who first made the ensemble in a folder, and when (unix seconds): what `predict` chooses by.

    An evaluation of a trained ensemble leaves it one.
    """
    before = files.read_record(files.join(folder, SPEC))
    made_by, created = before.get("made_by"), before.get("created")
    if made_by == TRAINED or (made_by == EVALUATED and not trains):
        return {"made_by": made_by, "created": created if isinstance(created, int | float) else time.time()}
    return {"made_by": TRAINED if trains else EVALUATED, "created": time.time()}


def _score(
    session: Session, folder: str, key: str, task: Task, usable: Sequence[RunSpec], board: Board
) -> Table3 | None:
    """Score what is trained and record it; None when a wish to stop came in between."""
    kinds = _kinds(task, session.manifest)
    folders, *others = scoring.score_kinds(session, usable, kinds, ensemble=folder)
    raw: Sequence[str | None] = others[0] if others else [None] * len(usable)
    if session.interruption.event.is_set():
        return None
    members = [Scored(*one) for one in zip([spec.name for spec in usable], folders, raw, strict=True)]
    found = Found(
        name=task.name,
        family=family(task.runs),
        kind=task.kind,
        usable=tuple(usable),
        members=task.members,
        analysis=analysis.analyse(members, session.manifest, scoring.SPLIT),
        curves={name: row.curve for name, row in board.rows.items() if row.curve},
    )
    recorded.record(session, folder, key, found, task.reporting.registered)
    return found.analysis.table


def _kinds(task: Task, manifest: Manifest) -> tuple[Kind, ...]:
    """Return the kinds of weights that are scored."""
    compares = task.kind == "averaged" and _compares(task.reporting, manifest)
    return ("averaged", "raw") if compares else (task.kind,)


def _compares(reporting: Reporting, manifest: Manifest) -> bool:
    """Whether raw weights are scored, too."""
    if reporting.raw is not None:
        return reporting.raw
    return sum(shard.samples for shard in manifest.shards(scoring.SPLIT)) <= RAW_IMAGES
