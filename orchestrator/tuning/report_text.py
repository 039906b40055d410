"""What a sweep found, in sentences and short tables for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.recipe.config import Recipe
from orchestrator.tuning.ranking import METRIC_NAMES, Row, duration, rank, winner
from orchestrator.tuning.searched import shown
from orchestrator.tuning.trials import Metric, State, Trial

IMPORTANCE_CAVEAT = (
    "Each share is how much worse a random forest foretells the score when that path's values are shuffled among the "
    "trials. It tells which paths mattered within the ranges searched, not which way to go, nor that one causes the "
    "other; two paths that only matter together share the credit, and of few trials the small shares are noise."
)
_STATES: tuple[State, ...] = ("finished", "pruned", "stopped", "running", "waiting", "diverged", "failed")
_ABSENT = "absent"  # no JSON value
# Entries of `about` that the page has elsewhere; the others are listed as they are.
_TOLD = (
    "name",
    "sweep",
    "winner",
    "dataset",
    "sampler",
    "scheduler",
    "budget_trials",
    "budget_epochs",
    "budget_seconds",
)


def title(about: Mapping[str, object]) -> str:
    """What the sweep is called."""
    return str(about.get("name") or about.get("sweep") or "sweep")


def headline(trials: Sequence[Trial], metric: Metric, base: Recipe) -> list[str]:
    """Sentences that tell who won, by how much, and how far to believe it."""
    best, name = winner(trials, metric), METRIC_NAMES[metric]
    if best is None:
        return _without_winner(trials, metric)
    score = best.score(metric) or 0.0
    told = [f"{best.name} wins with a {name} of {score:.2f}% after {counted(best.trained_epochs, 'epoch')}."]
    if (same := of_base(trials, base)) is best:
        told.append(f"It is the base preset, {base.name}: the sweep found nothing better.")
    elif same is not None and same.state == "finished" and (its := same.score(metric)) is not None:
        told.append(
            f"The base preset, {base.name}, was {same.name}: {its:.2f}%, which is {its - score:.2f} points more."
        )
    scored = [trial for trial in trials if trial.state == "finished" and trial.score(metric) is not None]
    if len(scored) > 1:
        told.append(
            f"It is the best of {len(scored)} that finished; the next has {rank(scored, metric)[1].score:.2f}%."
        )
    return told


def caveat(trials: Sequence[Trial], metric: Metric) -> str:
    """Why the winner's own score is too good; empty without a winner."""
    if winner(trials, metric) is None:
        return ""
    return (
        f"The winner was chosen among {counted(len(trials), 'trial')} by its error on the validation split, and luck "
        "helped to choose it: its own score is optimistic. Expect more errors on other images and under other seeds; "
        "only images that chose nothing can tell how many."
    )


def facts(about: Mapping[str, object], trials: Sequence[Trial], metric: Metric) -> list[Row]:
    """What was searched and how, and the budget used of the budget allowed, as name and value."""
    counts = Counter(trial.state for trial in trials)
    states = ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state])
    found: list[Row] = [
        (name, _shown(about[name])) for name in ("dataset", "sampler", "scheduler") if about.get(name) is not None
    ]
    found.append(
        ("metric", f"{METRIC_NAMES[metric]} on the validation split, in percent; of the averaged weights, if any")
    )
    # Those that follow others in a population are no more of what was allowed.
    first = sum(not trial.shared for trial in trials)
    follow = f" and {len(trials) - first:,} that followed" if first < len(trials) else ""
    allowed_trials = _of(f"{first:,}", about.get("budget_trials"))
    found.append(("trials", allowed_trials + follow + (f": {states}" if states else "")))
    epochs = sum(trial.own_epochs for trial in trials)
    found.append(("epochs trained", _of(f"{epochs:,}", about.get("budget_epochs"))))
    seconds = about.get("budget_seconds")
    allowed = duration(seconds) if isinstance(seconds, int | float) else None
    found.append(("time trained, of all trials together", _of(duration(sum(one.seconds for one in trials)), allowed)))
    found += [(name.replace("_", " "), _shown(value)) for name, value in about.items() if name not in _TOLD]
    return found


def against_base(best: Trial, base: Recipe) -> list[Row]:
    """Each searched path with the base preset's value and the winner's, whole, and a mark where they differ.

    Then what differs without being searched, as what a searched kind brings along.
    """
    before, after = _leaves(base.to_dict()), _leaves(best.recipe.to_dict())
    rows: list[Row] = []
    for path, value in best.assignment.items():
        its = before.get(path, _ABSENT)
        rows.append((path, its, _json(value), "" if _same(its, _json(value)) else "changed"))
    for path in dict.fromkeys((*before, *after)):
        its, now = before.get(path, _ABSENT), after.get(path, _ABSENT)
        if path != "name" and path not in best.assignment and its != now:
            rows.append((path, its, now, "changed, not searched"))
    return rows


def of_base(trials: Sequence[Trial], base: Recipe) -> Trial | None:
    """The trial whose recipe is the base preset, but for its name; the first if there are several."""
    wanted = _leaves(base.to_dict()) | {"name": ""}
    return next((trial for trial in trials if _leaves(trial.recipe.to_dict()) | {"name": ""} == wanted), None)


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _without_winner(trials: Sequence[Trial], metric: Metric) -> list[str]:
    told = ["No trial has finished with a score, so there is no winner."]
    scored = [one for one in rank(trials, metric) if one.score is not None]
    if scored:
        first = scored[0]
        told.append(
            f"{first.trial.name} came furthest: {METRIC_NAMES[metric]} {first.score:.2f}% at "
            f"{counted(first.epochs, 'epoch')} of {first.trial.recipe.epochs}. "
            "An early score does not foretell the end."
        )
    return told


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every dotted path of a recipe with its value as JSON."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _json(value)
    return found


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _same(one: str, other: str) -> bool:
    """Whether two values are the same, be it 1 and 1.0."""
    return one == other or (one != _ABSENT and bool(json.loads(one) == json.loads(other)))


def _of(used: str, allowed: object) -> str:
    if allowed is None:
        return used
    return f"{used} of {f'{allowed:,}' if isinstance(allowed, int) else allowed} allowed"


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(one)}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(value)
