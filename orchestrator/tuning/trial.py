"""The trials of a sweep, the metric that compares them, and their short texts. Importable without torch or ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.recipe.config import Recipe

# Dotted path of the recipe -> value, as JSON has it; only paths that exist under the kinds that it chooses.
Assignment = Mapping[str, Any]

# finished: all epochs; pruned: the scheduler ended it early; diverged: a non-finite loss, weight or score;
# failed: crashed too often; stopped: by a person or a budget, and can resume.
State = Literal["finished", "pruned", "stopped", "running", "waiting", "diverged", "failed"]

_ERROR_LABELS = {"top1_error": "top-1 error", "top5_error": "top-5 error"}
_MAX_VALUE_CHARS = 28


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

    def format_column(self, scores: Sequence[float | None]) -> list[str]:
        """Return scores as `format_score` does, all with as many decimals as the one that has most."""
        texts = [self.format_score(score) for score in scores]
        decimals = max((len(text.partition(".")[2]) for text in texts if "e" not in text), default=0)
        return [
            text if score is None or "e" in text else f"{score:.{decimals}f}"
            for score, text in zip(scores, texts, strict=True)
        ]


@dataclass(frozen=True)
class EpochResult:
    """The report of a trial at the end of an epoch."""

    epoch: int  # from 1
    values: Mapping[str, float]  # of the epoch, as in the run's journal
    seconds: float  # of the trial's training so far, without its starts
    samples: int = 0  # seen so far


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
        scores = ((result.epoch, metric.find_score(result.values)) for result in self.epochs)
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


class TrialTask(Config):
    """One trial for the actor that trains it; travels as JSON."""

    number: int = Field(ge=1)
    spec: RunSpec
    metric: Metric
    stop_flag: str
    successor: str
    gpus: float = Field(ge=0, description="of each worker")
    ended: bool = Field(False, description="its end is final: its epochs are repeated, and nothing is trained")


class TrialReport(Config):
    """An epoch, or the end, of a trial; travels as JSON."""

    number: int
    epoch: int = Field(ge=0, description="the clock: the run's, so it never decreases when a trial resumes")
    values: dict[str, float] = Field({}, description="of the epoch")
    seconds: float = Field(0.0, description="of training so far")
    score: float | None = Field(None, description="less is better, for schedulers; None when not validated")
    state: State = "running"
    reason: str = ""


def make_short_names(trials: Iterable[Trial]) -> dict[str, str]:
    """Return, for each path that any trial assigns, its last dotted parts, as many as no other path shares."""
    paths = tuple(dict.fromkeys(path for trial in trials for path in trial.assignment))
    names = {}
    for path in paths:
        parts = path.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [f".{other}" for other in paths if other != path]
        names[path] = next((end for end in endings if not any(other.endswith(f".{end}") for other in others)), path)
    return names


def format_value(value: Any) -> str:
    """Return a value as one short line: numbers to four digits, long text cut."""
    text = f"{value:.4g}" if isinstance(value, float) else format_choice(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."


def format_choice(value: Any) -> str:
    """Return a value as one line, whole, which tells the values of a choice apart."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    return " ".join(text.split())


def format_assignment(assignment: Assignment, names: Mapping[str, str]) -> str:
    """Return an assignment in short, as in "base_rate=0.01 power=0.5"."""
    return " ".join(f"{names[path]}={format_value(value)}" for path, value in assignment.items())
