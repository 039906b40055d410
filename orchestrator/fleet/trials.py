"""How the trials of a sweep stand, from its storage alone. Needs no ray, no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from orchestrator.fleet.standing import Standing, State, standing
from orchestrator.launch import holder, named
from orchestrator.storage import files, urls

_RECORD = re.compile(r"^(\d{4,})\.json$")
# Runs of the winner and of the preset with other seeds, which tell a gain from noise; they have leases of their own.
_REPEAT = re.compile(r"-(winner|preset)-r\d+$")
# How the sweep's ledger says that a trial ended, where that is not what its run says of itself.
_ENDS: dict[str, State] = {"pruned": "pruned", "diverged": "diverged", "failed": "failed"}


@dataclass(frozen=True)
class Trials:
    """A sweep at one moment."""

    owner: str  # who runs it; empty when nobody does
    calls: tuple[Callable[[], Standing], ...]  # one for each trial and repeat, to be asked side by side


def trials(sweep: str) -> Trials:
    """Who runs the sweep in the folder of that URL, its trials and its repeats. Storage errors pass through."""
    held = holder.look(sweep)
    lives = holder.lives(sweep, held)
    places = files.join(sweep, named.TRIALS)
    names = files.list_names(places)
    numbers = sorted(int(match[1]) for name in names if (match := _RECORD.match(name)))
    runs = {urls.name(folder).rpartition("-")[0]: folder for folder in named.below(sweep, named.MODELS)}

    def trial(number: int) -> Standing:
        recipe = _recipe(files.join(places, f"{number:04d}.json"))
        folder = runs.get(recipe, files.join(sweep, named.MODELS, recipe or f"{number:04d}"))
        one = replace(standing(folder, model=recipe, awaited=lives, driver=held), sweep=urls.name(sweep))
        if one.state == "stopping" and held is not None and not held.asked_to_stop:
            one = replace(one, state="waiting")  # its process went on with another one of a population
        end = f"{number:04d}.ended.json"
        return one if end not in names else _ended(one, files.read_record(files.join(places, end)))

    repeats = [runs[name] for name in sorted(runs) if _REPEAT.search(name)]
    calls = [partial(trial, each) for each in numbers] + [partial(_repeat, each, sweep) for each in repeats]
    return Trials(str(held.owner) if held is not None and lives else "", tuple(calls))


def _repeat(folder: str, sweep: str) -> Standing:
    return replace(standing(folder), sweep=urls.name(sweep))


def _ended(one: Standing, end: dict[str, Any]) -> Standing:
    state = _ENDS.get(str(end.get("state")))
    if state is None:
        return one
    return replace(one, state=state, message="" if state == "pruned" else str(end.get("reason", "")))


def _recipe(url: str) -> str:
    found = files.read_record(url).get("recipe")
    return str(found.get("name", "")) if isinstance(found, dict) else ""
