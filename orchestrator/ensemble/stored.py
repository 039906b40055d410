"""Finished runs by name, as members of an ensemble."""

from __future__ import annotations

import json
from collections.abc import Sequence

from orchestrator.config.errors import ConfigError
from orchestrator.launch import named
from orchestrator.launch.config import RunSpec
from orchestrator.launch.session import Session
from orchestrator.storage import files, urls
from orchestrator.training.outcome import finished


def runs(storage: str, names: Sequence[str], field: str) -> list[RunSpec]:
    """The finished runs of these names, ensembles replaced by their members, in order.

    field: of the command line, for messages. Raises ConfigError for a name that is not there, a run that is not trained
    to its end, or one that is named twice.
    """
    found: dict[str, RunSpec] = {}
    for name in names:
        for member in _members_of(storage, name):
            if member in found:
                raise ConfigError(f"{field}: {member}: is given twice; give each model once")
            spec = _spec(storage, member, field)
            if finished(files.join(storage, "models", member)) is None:
                raise ConfigError(f"{field}: {member}: is not trained to its end; submit its training again")
            found[member] = spec
    return list(found.values())


def chosen(specs: Sequence[RunSpec], numbers: Sequence[int]) -> list[RunSpec]:
    """The runs of these numbers, from 1; all of them without any. Raises ConfigError."""
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise ConfigError(f"members: {twice[0]} is given twice; give each model once")
    if wrong := [number for number in numbers if not 1 <= number <= len(specs)]:
        raise ConfigError(f"members: {wrong[0]} is refused: there are models 1 to {len(specs)}")
    return [specs[number - 1] for number in numbers] if numbers else list(specs)


def placed(session: Session, spec: RunSpec, field: str) -> RunSpec:
    """A stored run on this session's data and hardware. Raises ConfigError for one of another dataset."""
    if spec.dataset_digest != session.manifest.digest():
        raise ConfigError(f"{field}: {spec.name}: was trained on another dataset; give that one with --data")
    return spec.model_copy(update={"destination": session.destination, "placement": session.placement})


def _members_of(storage: str, name: str) -> list[str]:
    try:
        return list(json.loads(files.read_bytes(files.join(storage, "ensembles", name, named.SPEC)))["members"])
    except FileNotFoundError:
        return [name]


def _spec(storage: str, name: str, field: str) -> RunSpec:
    try:
        return RunSpec.from_dict(json.loads(files.read_bytes(files.join(storage, "models", name, "spec.json"))))
    except FileNotFoundError:
        there = files.list_names(files.join(storage, "ensembles")) + files.list_names(files.join(storage, "models"))
        known = ", ".join(there) or "none"
        shown = urls.redact(storage)
        raise ConfigError(f"{field}: {name!r}: no such run or ensemble in {shown}; there are: {known}") from None
