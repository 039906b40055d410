"""What is known of the trials of a sweep. Importable without torch or ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.recipe.config import Recipe

# Dotted path of the recipe -> value, as JSON has it; only paths that exist under the kinds that it chooses.
Assignment = Mapping[str, Any]

# finished: all epochs; pruned: the scheduler ended it early; diverged: a loss, or a score, that is no number;
# failed: crashed for good; stopped: by a person or a budget, and could go on.
State = Literal["waiting", "running", "finished", "pruned", "diverged", "failed", "stopped"]

# The error of the averaged weights where there are any yet, else of the raw ones; in percent.
MetricName = Literal["top1_error", "top5_error"]


@dataclass(frozen=True)
class EpochResult:
    """What a trial reported at an epoch's end."""

    epoch: int  # from 1
    values: Mapping[str, float]  # of the epoch, as the run's journal has them
    seconds: float  # of the trial's training so far, without its starts
    samples: int = 0  # seen so far

    def get_score(self, metric: MetricName) -> float | None:
        """The error in percent that trials are compared by; None when this epoch was not validated."""
        found = self.values.get(f"validation/averaged_{metric}", self.values.get(f"validation/raw_{metric}"))
        return None if found is None else float(found)


@dataclass(frozen=True)
class Trial:
    """One recipe that is tried."""

    number: int  # from 1
    assignment: Assignment
    recipe: Recipe
    state: State = "waiting"
    reason: str = ""  # of an end other than finished
    epochs: tuple[EpochResult, ...] = field(default=())  # those reported so far, ascending

    @property
    def name(self) -> str:
        """What people call it."""
        return f"t{self.number:03d}"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing of it is ever run again."""
        return self.state in ("finished", "pruned", "diverged", "failed")

    def get_curve(self, metric: MetricName) -> tuple[tuple[int, float], ...]:
        """(epoch, error in percent) of the validated epochs."""
        found = [(one.epoch, one.get_score(metric)) for one in self.epochs]
        return tuple((epoch, score) for epoch, score in found if score is not None)

    def get_score(self, metric: MetricName) -> float | None:
        """The error in percent at its last validated epoch; None without one, or where that is no number."""
        curve = self.get_curve(metric)
        return curve[-1][1] if curve and math.isfinite(curve[-1][1]) else None

    @property
    def trained_epochs(self) -> int:
        """Epochs that it has come to."""
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def seconds(self) -> float:
        """Seconds of its training, without its starts."""
        return self.epochs[-1].seconds if self.epochs else 0.0
