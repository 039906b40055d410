"""Finished runs by name, as members of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.errors import ConfigError
from orchestrator.launch import named
from orchestrator.launch.config import RunSpec, stored_spec
from orchestrator.launch.session import Session
from orchestrator.storage import files, urls
from orchestrator.training.outcome import finished


@dataclass(frozen=True)
class Stored:
    """Runs that are trained to their end, and the names of those that are not."""

    runs: tuple[RunSpec, ...]
    unfinished: tuple[str, ...] = ()


def runs(storage: str, names: Sequence[str], field: str, members: Sequence[int] = (), partial: bool = False) -> Stored:
    """The finished runs of these names, ensembles replaced by their members, in order.

    field: of the command line, for messages. members: only those of these numbers, from 1. partial: leave out what is
    not trained to its end, as long as anything is. Raises ConfigError for a name that is not there, a run that is not
    trained to its end, a number that no run has, and for anything that is given twice.
    """
    found: list[str] = []
    for name in names:
        for member in _members_of(storage, name):
            if member in found:
                raise ConfigError(f"{field}: {member}: is given twice; give each model once")
            found.append(member)
    asked = chosen(found, members)
    done = [name for name in asked if finished(files.join(storage, "models", name)) is not None]
    unfinished = [name for name in asked if name not in done]
    for name in unfinished:
        if not partial or not done:
            _spec(storage, name, field)  # one that is not there is told so
            raise ConfigError(f"{field}: {name}: is not trained to its end; submit its training again")
    return Stored(tuple(_spec(storage, name, field) for name in done), tuple(unfinished))


def chosen(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """The runs of these numbers, from 1; all of them without any. Raises ConfigError."""
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise ConfigError(f"members: {twice[0]} is given twice; give each model once")
    if wrong := [number for number in numbers if not 1 <= number <= len(names)]:
        raise ConfigError(f"members: {wrong[0]} is refused: there are models 1 to {len(names)}")
    return [names[number - 1] for number in numbers] if numbers else list(names)


def placed(session: Session, spec: RunSpec, field: str) -> RunSpec:
    """A stored run on this session's data and hardware. Raises ConfigError for one of another dataset."""
    if spec.dataset_digest != session.manifest.digest():
        raise ConfigError(f"{field}: {spec.name}: was trained on another dataset; give that one with --data")
    return spec.model_copy(update={"destination": session.destination, "placement": session.placement})


def _members_of(storage: str, name: str) -> list[str]:
    try:
        return named.members_of(files.join(storage, named.ENSEMBLES, name))
    except FileNotFoundError:
        return [name]


def _spec(storage: str, name: str, field: str) -> RunSpec:
    try:
        return stored_spec(files.join(storage, named.MODELS, name))
    except FileNotFoundError:
        there = files.list_names(files.join(storage, "ensembles")) + files.list_names(files.join(storage, "models"))
        known = ", ".join(there) or "none"
        shown = urls.redact(storage)
        raise ConfigError(f"{field}: {name!r}: no such run or ensemble in {shown}; there are: {known}") from None
