"""What an ensemble's result leaves behind: files in its folder, its run in the tracker, a model in the registry."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from orchestrator.ensemble import pictures, registry, report, results, scoring
from orchestrator.ensemble.scoring import Kind
from orchestrator.evaluation.analysis import Analysis
from orchestrator.evaluation.table3 import Table3
from orchestrator.launch import artifacts
from orchestrator.launch.config import RunSpec
from orchestrator.launch.named import SPEC
from orchestrator.launch.session import Session
from orchestrator.storage import files
from orchestrator.tracking.tracker import Point, Tracker

_TEXTS = ("table.md", report.HTML, report.MARKDOWN, SPEC)


@dataclass(frozen=True)
class Found:
    """What came of an ensemble."""

    name: str
    family: str  # what ensembles of such members are called in the model registry
    kind: Kind  # which weights were scored
    usable: tuple[RunSpec, ...]  # the members that are in it
    members: int  # that were asked for
    analysis: Analysis
    curves: Mapping[str, Sequence[tuple[float, float]]]  # by run: epochs and validation errors in percent


def report_url(folder: str) -> str:
    """Where the report of an ensemble lies."""
    return files.join(folder, report.HTML)


def record(session: Session, folder: str, key: str, found: Found, registered: bool) -> None:
    """Write everything below `folder`, and have the tracker's thread log it and register the model.

    A partial ensemble is not registered, nor one of weights that were chosen on the split that is scored.
    """
    table, about = found.analysis.table, _about(session, found)
    results.write(folder, table, about, found.curves)
    mistakes = [mistake.image for mistake in found.analysis.mistakes]
    shown = pictures.thumbnails(session.destination.data, session.manifest, found.analysis.split, mistakes)
    report.write(folder, about, found.analysis, found.curves, shown)
    session.replayer.submit(partial(_log, session, key, folder, table), needs=key)
    if registered and found.kind == "averaged" and len(found.usable) == found.members:
        session.replayer.submit(partial(_register, session, key, found, results.markdown(table)), needs=key)


def _about(session: Session, found: Found) -> dict[str, object]:
    return {
        "ensemble": found.name,
        "weights": found.kind,
        "members": [spec.name for spec in found.usable],
        "members_asked_for": found.members,
        "dataset": session.manifest.name,
        "dataset_digest": session.manifest.digest(),
        "split": scoring.SPLIT,
        "input_sizes": sorted({spec.recipe.model.image_size for spec in found.usable}),
        "weights_digests": {spec.name: scoring.weights_of(spec, found.kind).digest for spec in found.usable},
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "versions": {name: version(name) for name in ("googlenet-orchestrator", "torch", "ray")},
    }


def _log(session: Session, key: str, folder: str, table: Table3, tracker: Tracker) -> None:
    """The table in the tracker: as metrics, as a table, as text, as pictures."""
    run_id = session.replayer.run_id(key, 0.0)
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
    artifacts.log(tracker, run_id, folder, _TEXTS)


def _register(session: Session, key: str, found: Found, about: str, _tracker: Tracker) -> None:
    """The ensemble in the model registry; the same one again changes nothing."""
    dataset = session.manifest
    # The embedded data is what such presets are made for.
    own = session.destination.embedded
    made = registry.register(
        session.destination.tracking,
        session.replayer.run_id(key, 0.0),
        found.family if own else registry.model_name(found.family, dataset.name, dataset.digest()),
        found.name,
        [spec.folder for spec in found.usable],
        dataset.titles,
        about,
        former=found.family,
    )
    session.say(f"model:   {made.uri} (version {made.version}, {'new' if made.fresh else 'there already'})")
