"""What people see while a sweep runs: a live table in a terminal, lines in a log."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.table import Table

from orchestrator.fleet.figures import shown
from orchestrator.fleet.shown import Shown
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.schedule import AnySchedule, Segments
from orchestrator.tuning.trials import Metric, Trial

MOST_ROWS = 30  # in a terminal; of more trials the best and those under way are shown


class Board(Shown):
    """Shows the trials in the background while its `with` block runs."""

    def __init__(self, trials: Callable[[], Sequence[Trial]], metric: Metric, console: Console) -> None:
        super().__init__(console, "sweep-board")
        self._trials, self._metric = trials, metric
        self._told: dict[int, str] = {}

    def __enter__(self) -> Self:
        self._told = {trial.number: trial.state for trial in self._trials() if trial.done}  # known, and no news
        return super().__enter__()

    def show(self) -> None:
        """The table, or a line for each trial that ended since the last look."""
        trials = self._trials()
        if self._live is not None:
            self._live.update(table(trials, self._metric), refresh=True)
            return
        for trial in trials:
            if trial.state not in ("waiting", "running") and self._told.get(trial.number) != trial.state:
                self._told[trial.number] = trial.state
                self._console.print(_line(trial, self._metric, len(self._told)), highlight=False, markup=False)


def table(trials: Sequence[Trial], metric: Metric) -> Table:
    """The trials, at most MOST_ROWS of them, in 100 columns."""
    rows = chosen(trials, metric)
    left = f", {len(rows)} shown: those under way and the best" if len(rows) < len(trials) else ""
    made = Table(title=f"{_counts(trials)}{left}", title_justify="left", box=None, pad_edge=False)
    for name in ("trial", "schedule", "epoch", f"{metric.replace('_', ' ')} %", "state"):
        made.add_column(name, justify="right" if name.endswith(("epoch", "%")) else "left", no_wrap=True)
    for trial in rows:
        epoch = f"{trial.trained_epochs}/{trial.recipe.epochs}"
        made.add_row(trial.name, schedule(trial.recipe), epoch, shown(trial.score(metric), ".2f"), trial.state)
    return made


def chosen(trials: Sequence[Trial], metric: Metric) -> list[Trial]:
    """Those that are shown, by number."""
    under_way = [trial for trial in trials if trial.state == "running"][:MOST_ROWS]
    rest = [trial for trial in trials if trial.state != "running"]
    scored = sorted(rest, key=lambda trial: (trial.state != "finished", _error(trial, metric), -trial.number))
    return sorted([*under_way, *scored[: MOST_ROWS - len(under_way)]], key=lambda trial: trial.number)


def _error(trial: Trial, metric: Metric) -> float:
    score = trial.score(metric)
    return math.inf if score is None else score


def schedule(recipe: Recipe) -> str:
    """A recipe's schedule in a few words."""
    found = recipe.schedule
    if not isinstance(found, Segments):
        return _plain(found)
    last = found.segments[-1]
    return f"{len(found.segments)} segments, from {last.from_epoch:g} {_plain(last.schedule)}"


def _plain(found: AnySchedule) -> str:
    words: list[str] = [found.kind]
    for name, value in found:
        if name != "kind" and not isinstance(value, str) and value:
            words.append(f"{_SHORT.get(name, name)} {value:.3g}")
    return " ".join(words)


_SHORT = {"base_rate": "rate", "warmup_epochs": "warm", "decay_factor": "x", "decay_epochs": "per", "final_rate": "end"}


def _counts(trials: Sequence[Trial]) -> str:
    states: dict[str, int] = {}
    for trial in trials:
        states[trial.state] = states.get(trial.state, 0) + 1
    return f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in states.items())


def _line(trial: Trial, metric: Metric, ended: int) -> str:
    score = shown(trial.score(metric), ".2f")
    why = f": {trial.reason}" if trial.reason and trial.state not in ("finished", "pruned") else ""
    return (
        f"{trial.name}: {trial.state} after {trial.trained_epochs} of {trial.recipe.epochs} epochs, "
        f"{metric.replace('_', ' ')} {score}% ({schedule(trial.recipe)}){why}; {ended} ended"
    )
