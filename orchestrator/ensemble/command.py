"""The jobs about ensembles: train one, evaluate one that is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import aggregate, members, results
from orchestrator.ensemble.aggregate import EnsembleResult
from orchestrator.ensemble.config import Evaluate, TrainEnsemble
from orchestrator.launch import dryrun
from orchestrator.launch.command import FAILED, console
from orchestrator.launch.config import RunSpec
from orchestrator.launch.session import Session, opened
from orchestrator.storage import files
from orchestrator.training.outcome import finished


def train_ensemble(config: TrainEnsemble) -> int:
    """Train, score and record the ensemble; the exit status."""
    screen = console()
    recipes = members.recipes(config.recipe, config.ensemble)
    if config.dry_run:
        dryrun.show(recipes, config.destination.resolved(), config.placement, screen)
        return 0
    with opened(config.destination, config.placement, screen) as session:
        digest = session.manifest.digest()
        result = aggregate.run(session, [config.spec(recipe, session.destination, digest) for recipe in recipes])
        return _conclude(session, result)


def evaluate(config: Evaluate) -> int:
    """Score finished runs, or the members of ensembles, as one ensemble; the exit status."""
    if not config.runs:
        raise ConfigError("runs: give the name of at least one finished run or ensemble")
    with opened(config.destination, config.placement, console()) as session:
        return _conclude(session, aggregate.run(session, _stored(session, config.runs)))


def _conclude(session: Session, result: EnsembleResult) -> int:
    if session.interruption.event.is_set():
        session.say("stopped; the same command goes on where it was")
        return session.interruption.exit_status
    if result.table is not None:
        session.say("")
        session.say(results.text(result.table))
        members_scored = f"{result.finished} of {result.members} models"
        session.say(f"{members_scored}, {result.table.images} images; 1 model: the mean over the single models")
        if result.table.bad_images:
            session.say(f"{result.table.bad_images} images could not be decoded and are not counted")
    session.tell_places(result.folder, result.key)
    if not result.whole:
        session.say(f"PARTIAL: {result.finished} of {result.members} models finished")
        return FAILED
    return 0


def _stored(session: Session, names: Sequence[str]) -> list[RunSpec]:
    """The finished runs of these names, ensembles replaced by their members. Raises ConfigError."""
    storage = session.destination.storage
    runs: dict[str, RunSpec] = {}
    for name in names:
        for member in _members_of(storage, name):
            spec = _spec(session, storage, member)
            if finished(spec.folder) is None:
                raise ConfigError(f"runs: {member}: is not trained to its end; submit its training again")
            runs[member] = spec
    return list(runs.values())


def _members_of(storage: str, name: str) -> list[str]:
    try:
        return list(json.loads(files.read_bytes(files.join(storage, "ensembles", name, aggregate.SPEC)))["members"])
    except FileNotFoundError:
        return [name]


def _spec(session: Session, storage: str, name: str) -> RunSpec:
    try:
        stored = RunSpec.from_dict(json.loads(files.read_bytes(files.join(storage, "models", name, "spec.json"))))
    except FileNotFoundError:
        there = files.list_names(files.join(storage, "ensembles")) + files.list_names(files.join(storage, "models"))
        known = ", ".join(there) or "none"
        raise ConfigError(f"runs: {name!r}: there is no such run or ensemble; there are: {known}") from None
    if stored.dataset_digest != session.manifest.digest():
        raise ConfigError(f"runs: {name}: was trained on another dataset; give that one with --data")
    return stored.model_copy(update={"destination": session.destination, "placement": session.placement})
