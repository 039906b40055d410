"""The jobs about ensembles: train one, evaluate one that is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import aggregate, members, results
from orchestrator.ensemble.aggregate import EnsembleResult
from orchestrator.ensemble.config import Evaluate, TrainEnsemble
from orchestrator.launch import dryrun, named
from orchestrator.launch.command import FAILED, console
from orchestrator.launch.config import RunSpec
from orchestrator.launch.session import Session, opened
from orchestrator.storage import files, urls
from orchestrator.training.initial import given
from orchestrator.training.outcome import finished


def train_ensemble(config: TrainEnsemble) -> int:
    """Train, score and record the ensemble; the exit status."""
    screen = console()
    recipes = members.recipes(given(config.recipe, config.weights), config.ensemble)
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
    # What was asked is checked before anything is started.
    stored = _stored(config.destination.resolved().storage, config.runs)
    screen = console()
    if config.dry_run:
        for spec in stored:
            screen.print(f"{spec.name}: {spec.folder}", highlight=False, soft_wrap=True)
        return 0
    with opened(config.destination, config.placement, screen) as session:
        return _conclude(session, aggregate.run(session, [_placed(session, spec) for spec in stored]))


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


def _stored(storage: str, names: Sequence[str]) -> list[RunSpec]:
    """The finished runs of these names, ensembles replaced by their members. Raises ConfigError."""
    runs: dict[str, RunSpec] = {}
    for name in names:
        for member in _members_of(storage, name):
            spec = _spec(storage, member)
            if finished(files.join(storage, "models", member)) is None:
                raise ConfigError(f"runs: {member}: is not trained to its end; submit its training again")
            runs[member] = spec
    return list(runs.values())


def _members_of(storage: str, name: str) -> list[str]:
    try:
        return list(json.loads(files.read_bytes(files.join(storage, "ensembles", name, named.SPEC)))["members"])
    except FileNotFoundError:
        return [name]


def _spec(storage: str, name: str) -> RunSpec:
    try:
        return RunSpec.from_dict(json.loads(files.read_bytes(files.join(storage, "models", name, "spec.json"))))
    except FileNotFoundError:
        there = files.list_names(files.join(storage, "ensembles")) + files.list_names(files.join(storage, "models"))
        known = ", ".join(there) or "none"
        shown = urls.redact(storage)
        raise ConfigError(f"runs: {name!r}: no such run or ensemble in {shown}; there are: {known}") from None


def _placed(session: Session, spec: RunSpec) -> RunSpec:
    """A stored run on this session's data and hardware."""
    if spec.dataset_digest != session.manifest.digest():
        raise ConfigError(f"runs: {spec.name}: was trained on another dataset; give that one with --data")
    return spec.model_copy(update={"destination": session.destination, "placement": session.placement})
