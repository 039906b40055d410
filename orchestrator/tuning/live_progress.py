"""The progress of a sweep: a live table in a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.table import Table

from orchestrator.monitor.formatting import LiveTable
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.trial import Metric, Trial

MAX_ROWS = 30  # in a terminal; of more trials the best and the running ones are shown


class SweepProgress(LiveTable):
    """A display of the trials, refreshed in the background during its `with` block."""

    def __init__(self, trials: Callable[[], Sequence[Trial]], metric: Metric, console: Console) -> None:
        super().__init__(console, "sweep-board")
        self._trials, self._metric = trials, metric
        self._printed_states: dict[int, str] = {}

    def __enter__(self) -> Self:
        # Those of earlier drivers are no news.
        self._printed_states = {trial.number: trial.state for trial in self._trials() if trial.is_terminal}
        return super().__enter__()

    def refresh(self) -> None:
        """Show the table, or print a line for each trial that ended since the last refresh."""
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


def build_table(trials: Sequence[Trial], metric: Metric) -> Table:
    """Return a table of at most MAX_ROWS trials, 100 columns wide."""
    rows = select_shown_trials(trials, metric)
    left = f", {len(rows)} shown: the running ones and the best" if len(rows) < len(trials) else ""
    table = Table(title=f"{_format_counts(trials)}{left}", title_justify="left", box=None, pad_edge=False)
    for name in ("trial", "schedule", "epoch", metric.axis_label, "state"):
        table.add_column(name, justify="right" if name in ("epoch", metric.axis_label) else "left", no_wrap=True)
    for trial in rows:
        epoch = f"{trial.trained_epochs}/{trial.recipe.epochs}"
        table.add_row(
            trial.name, format_schedule(trial.recipe), epoch, metric.format_score(trial.get_score(metric)), trial.state
        )
    return table


def select_shown_trials(trials: Sequence[Trial], metric: Metric) -> list[Trial]:
    """Return the running trials and the best of the others, MAX_ROWS at most, by number."""
    running = [trial for trial in trials if trial.state == "running"][:MAX_ROWS]
    rest = [trial for trial in trials if trial.state != "running"]
    scored = sorted(rest, key=lambda trial: (trial.state != "finished", trial.get_loss(metric), -trial.number))
    return sorted([*running, *scored[: MAX_ROWS - len(running)]], key=lambda trial: trial.number)


def format_schedule(recipe: Recipe) -> str:
    """Return a recipe's schedule in a few words."""
    words: list[str] = [recipe.schedule.kind]
    for name, value in recipe.schedule:
        if name != "kind" and isinstance(value, int | float) and value:
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


def _format_line(trial: Trial, metric: Metric, ended: int) -> str:
    score = metric.format_score(trial.get_score(metric), unit=True)
    why = f": {trial.reason}" if trial.reason and trial.state not in ("finished", "pruned") else ""
    return (
        f"{trial.name}: {trial.state} after {trial.trained_epochs} of {trial.recipe.epochs} epochs, "
        f"{metric.label} {score} ({format_schedule(trial.recipe)}){why}; {ended} ended"
    )
