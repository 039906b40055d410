"""The main job: train the members, score them, join the table, record everything."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from orchestrator.config.fingerprint import fingerprint
from orchestrator.config.overrides import paths
from orchestrator.ensemble import results, scoring
from orchestrator.evaluation import table3
from orchestrator.evaluation.table3 import Table3
from orchestrator.fleet import fleet
from orchestrator.launch.config import RunSpec
from orchestrator.launch.named import SPEC
from orchestrator.launch.session import Session
from orchestrator.storage import files, urls
from orchestrator.tracking.replay import Replayer
from orchestrator.tracking.tracker import Point, TrackedRun, Tracker


@dataclass(frozen=True)
class EnsembleResult:
    """What came of it; `table` is None when nothing could be scored."""

    name: str
    folder: str
    key: str
    finished: int
    members: int
    table: Table3 | None

    @property
    def whole(self) -> bool:
        """Whether every member was trained and all were scored."""
        return self.finished == self.members and self.table is not None


def family(runs: Sequence[RunSpec]) -> str:
    """What an ensemble of these runs is called: the first one's name without its number as a member."""
    return re.sub(r"-m\d+(-wide)?$", "", runs[0].recipe.name)


def run(session: Session, runs: Sequence[RunSpec]) -> EnsembleResult:
    """Train what is not trained, score what is not scored, join and record.

    A partial ensemble is named so, never passed off as whole. Raises LeaseHeldError when another driver runs it.
    """
    name = f"{family(runs)}-x{len(runs)}-{fingerprint([spec.identity for spec in runs])}"
    folder = files.join(session.destination.storage, "ensembles", name)
    with session.leased(folder):
        key = _record(session, name, folder, runs)
        trained = fleet.train(session, runs, key)
        usable = [spec for spec in runs if trained.ended[spec.name].status == "finished"]
        table = None
        if usable and not session.interruption.event.is_set():
            table = _score(session, folder, key, usable, trained)
        result = EnsembleResult(name, folder, key, len(usable), len(runs), table)
        if not session.interruption.event.is_set():
            session.closing(key, "FINISHED" if result.whole else "FAILED")
        return result


def _record(session: Session, name: str, folder: str, runs: Sequence[RunSpec]) -> str:
    """Write what the ensemble is made of and open its run in the tracker; its key there."""
    recipes = {spec.name: paths(spec.recipe) for spec in runs}
    resolved = {"members": list(recipes), "recipes": {spec.name: spec.recipe.to_dict() for spec in runs}}
    files.write_bytes(files.join(folder, SPEC), json.dumps(resolved, indent=1).encode())
    key = session.key(name)
    # What all members share are the ensemble's own parameters; the children's show what differs.
    first, *others = recipes.values()
    shared = {path: str(value) for path, value in first.items() if all(other[path] == value for other in others)}
    params = {"members": str(len(runs)), "dataset": f"{session.manifest.name} {session.manifest.digest()}"}
    tags = {"orchestrator.folder": urls.redact(folder)}
    session.opened_run(TrackedRun(key, name, None, params | shared, tags))
    return key


def _score(
    session: Session, folder: str, key: str, usable: Sequence[RunSpec], trained: fleet.FleetResult
) -> Table3 | None:
    folders = scoring.score(session, usable)
    if session.interruption.event.is_set():
        return None
    table = table3.table(folders, session.manifest, scoring.SPLIT)
    about: dict[str, object] = {
        "ensemble": folder.rsplit("/", 1)[-1],
        "members": [spec.name for spec in usable],
        "dataset_digest": session.manifest.digest(),
        "split": scoring.SPLIT,
    }
    curves = {name: row.curve for name, row in trained.board.rows.items() if row.curve}
    results.write(folder, table, about, curves)
    session.replayer.submit(partial(_log, session.replayer, key, folder, table), needs=key)
    return table


def _log(replayer: Replayer, key: str, folder: str, table: Table3, tracker: Tracker) -> None:
    """The table in the tracker: as metrics, as a table, as text, as pictures."""
    run_id = replayer.run_id(key, 0.0)
    metrics = {
        f"ensemble/top{rank}_error_{cell.models}x{cell.crops}": value
        for cell in table.cells
        for rank, value in ((1, cell.top1_error), (5, cell.top5_error))
    }
    now = time.time()
    tracker.log(run_id, [Point(name, value, 0, now) for name, value in metrics.items()])
    tracker.log_table(run_id, "table3.json", results.columns(table))
    # MLflow shows this tag, as Markdown, at the head of the run's page.
    tracker.set_tags(run_id, {"mlflow.note.content": results.markdown(table)})
    for name in ("table.md", SPEC):
        tracker.log_text(run_id, name, files.read_bytes(files.join(folder, name)).decode())
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("table.png", "curves.png"):
            path = os.path.join(scratch, name)
            with open(path, "wb") as file:
                file.write(files.read_bytes(files.join(folder, name)))
            tracker.log_file(run_id, path)
