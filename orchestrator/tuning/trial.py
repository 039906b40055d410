"""The trials of a sweep, and the metric that compares them. Importable without torch or ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.recipe.config import Recipe

# Dotted path of the recipe -> value, as JSON has it; only paths that exist under the kinds that it chooses.
Assignment = Mapping[str, Any]

# finished: all epochs; pruned: the scheduler ended it early; diverged: a non-finite loss, weight or score;
# failed: crashed too often; stopped: by a person or a budget, and can resume.
State = Literal["waiting", "running", "finished", "pruned", "diverged", "failed", "stopped"]

_ERROR_LABELS = {"top1_error": "top-1 error", "top5_error": "top-5 error"}


class Metric(Config):
    """The validation metric that trials are compared by."""

    name: str = Field(min_length=1)
    maximize: bool = Field(False, description="higher is better")

    @property
    def is_error(self) -> bool:
        """True for an error in percent."""
        return self.name in _ERROR_LABELS

    @property
    def label(self) -> str:
        """The name in reports."""
        return _ERROR_LABELS.get(self.name, self.name.replace("_", " "))

    @property
    def axis_label(self) -> str:
        """The label with the unit."""
        return f"{self.label}, %" if self.is_error else self.label

    @property
    def worst_loss(self) -> float:
        """A loss that no trained trial exceeds; of trials that diverged."""
        return 100.0 if self.is_error else 1e12

    def find_score(self, values: Mapping[str, float]) -> float | None:
        """Return the score in the values of an epoch: of the averaged weights, if any, else of the raw ones."""
        name = self.name
        for key in (f"validation/averaged_{name}", f"validation/raw_{name}", f"validation/{name}", name):
            if key in values:
                return float(values[key])
        return None

    def to_loss(self, score: float) -> float:
        """Return the score as a number of which less is better."""
        return -score if self.maximize else score

    def format_score(self, score: float | None, unit: bool = False) -> str:
        """Return a score or a difference of scores as text; "-" for None."""
        if score is None:
            return "-"
        return f"{score:.2f}{'%' * unit}" if self.is_error else f"{score:.4g}"


@dataclass(frozen=True)
class EpochResult:
    """The report of a trial at the end of an epoch."""

    epoch: int  # from 1
    values: Mapping[str, float]  # of the epoch, as in the run's journal
    seconds: float  # of the trial's training so far, without its starts
    samples: int = 0  # seen so far

    def get_score(self, metric: Metric) -> float | None:
        """Return the score; None when this epoch was not validated."""
        return metric.find_score(self.values)


@dataclass(frozen=True)
class Trial:
    """One recipe that a sweep trains."""

    number: int  # from 1
    assignment: Assignment
    recipe: Recipe
    state: State = "waiting"
    reason: str = ""  # of an end other than finished
    epochs: tuple[EpochResult, ...] = ()  # reported so far, ascending

    @property
    def name(self) -> str:
        """The name in reports."""
        return f"t{self.number:03d}"

    @property
    def is_terminal(self) -> bool:
        """True if it is never resumed."""
        return self.state in ("finished", "pruned", "diverged", "failed")

    def get_curve(self, metric: Metric) -> tuple[tuple[int, float], ...]:
        """Return pairs of epoch and score for the validated epochs."""
        scores = ((result.epoch, result.get_score(metric)) for result in self.epochs)
        return tuple((epoch, score) for epoch, score in scores if score is not None)

    def get_score(self, metric: Metric) -> float | None:
        """Return the score of the last validated epoch; None without one, or when it is not finite."""
        curve = self.get_curve(metric)
        return curve[-1][1] if curve and math.isfinite(curve[-1][1]) else None

    def get_loss(self, metric: Metric) -> float:
        """Return the score as a number of which less is better; infinite without a score."""
        score = self.get_score(metric)
        return math.inf if score is None else metric.to_loss(score)

    @property
    def trained_epochs(self) -> int:
        """The number of epochs trained so far."""
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def seconds(self) -> float:
        """The seconds of its training, without its starts."""
        return self.epochs[-1].seconds if self.epochs else 0.0
