"""What people see while a sweep runs: a live table in a terminal, lines in a log."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.table import Table

from orchestrator.monitor.formatting import format_number
from orchestrator.monitor.live_table import LiveTable
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.trial import MetricName, Trial

MAX_ROWS = 30  # in a terminal; of more trials the best and those under way are shown


class SweepProgress(LiveTable):
    """Shows the trials in the background while its `with` block runs."""

    def __init__(self, trials: Callable[[], Sequence[Trial]], metric: MetricName, console: Console) -> None:
        super().__init__(console, "sweep-board")
        self._trials, self._metric = trials, metric
        self._printed_states: dict[int, str] = {}

    def __enter__(self) -> Self:
        self._printed_states = {
            trial.number: trial.state for trial in self._trials() if trial.is_terminal
        }  # known, and no news
        return super().__enter__()

    def refresh(self) -> None:
        """The table, or a line for each trial that ended since the last look."""
        trials = self._trials()
        if self._live is not None:
            self._live.update(build_table(trials, self._metric), refresh=True)
            return
        for trial in trials:
            if trial.state not in ("waiting", "running") and self._printed_states.get(trial.number) != trial.state:
                self._printed_states[trial.number] = trial.state
                self._console.print(
                    _format_line(trial, self._metric, len(self._printed_states)), highlight=False, markup=False
                )


def build_table(trials: Sequence[Trial], metric: MetricName) -> Table:
    """The trials, at most MOST_ROWS of them, in 100 columns."""
    rows = select_shown_trials(trials, metric)
    left = f", {len(rows)} shown: those under way and the best" if len(rows) < len(trials) else ""
    made = Table(title=f"{_format_counts(trials)}{left}", title_justify="left", box=None, pad_edge=False)
    for name in ("trial", "schedule", "epoch", f"{metric.replace('_', ' ')} %", "state"):
        made.add_column(name, justify="right" if name.endswith(("epoch", "%")) else "left", no_wrap=True)
    for trial in rows:
        epoch = f"{trial.trained_epochs}/{trial.recipe.epochs}"
        made.add_row(
            trial.name, format_schedule(trial.recipe), epoch, format_number(trial.get_score(metric), ".2f"), trial.state
        )
    return made


def select_shown_trials(trials: Sequence[Trial], metric: MetricName) -> list[Trial]:
    """Those that are shown, by number."""
    under_way = [trial for trial in trials if trial.state == "running"][:MAX_ROWS]
    rest = [trial for trial in trials if trial.state != "running"]
    scored = sorted(rest, key=lambda trial: (trial.state != "finished", _get_error(trial, metric), -trial.number))
    return sorted([*under_way, *scored[: MAX_ROWS - len(under_way)]], key=lambda trial: trial.number)


def _get_error(trial: Trial, metric: MetricName) -> float:
    score = trial.get_score(metric)
    return math.inf if score is None else score


def format_schedule(recipe: Recipe) -> str:
    """Return a recipe's schedule in a few words."""
    words: list[str] = [recipe.schedule.kind]
    for name, value in recipe.schedule:
        if name != "kind" and not isinstance(value, str) and value:
            words.append(f"{_SHORT_NAMES.get(name, name)} {value:.3g}")
    return " ".join(words)


_SHORT_NAMES = {
    "base_rate": "rate",
    "warmup_epochs": "warm",
    "decay_factor": "x",
    "decay_epochs": "per",
    "final_rate": "end",
}


def _format_counts(trials: Sequence[Trial]) -> str:
    states: dict[str, int] = {}
    for trial in trials:
        states[trial.state] = states.get(trial.state, 0) + 1
    return f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in states.items())


def _format_line(trial: Trial, metric: MetricName, ended: int) -> str:
    score = format_number(trial.get_score(metric), ".2f")
    why = f": {trial.reason}" if trial.reason and trial.state not in ("finished", "pruned") else ""
    return (
        f"{trial.name}: {trial.state} after {trial.trained_epochs} of {trial.recipe.epochs} epochs, "
        f"{metric.replace('_', ' ')} {score}% ({format_schedule(trial.recipe)}){why}; {ended} ended"
    )
