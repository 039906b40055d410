"""Results of training and scoring, as the public API returns them. Importable without torch or ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RunStatus = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Errors:
    """Errors in percent of the scored images, each with its 95% bootstrap interval (lower, upper)."""

    top1: float
    top5: float
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]


@dataclass(frozen=True)
class TrainResult:
    """A training run and how it ended."""

    name: str
    folder: str  # URL of the run's folder
    status: RunStatus
    message: str = ""  # why it failed or stopped
    metrics: Mapping[str, float] = field(default_factory=dict)  # last values by name, such as "validation/top1_error"
    mlflow_url: str = ""  # of the run's page; for a sqlite database the command that serves it, too
    exit_status: int = 0  # of the command: 0 finished, 1 failed, 128 + N stopped by signal N


@dataclass(frozen=True)
class EnsembleScores:
    """An ensemble, its errors by number of crops (1, 10, 144), and where its report is."""

    name: str
    folder: str  # URL of the ensemble's folder
    status: RunStatus  # "failed" when a member is missing or nothing could be scored
    members: tuple[str, ...]  # names of the runs
    finished_members: int
    requested_members: int
    errors: Mapping[int, Errors] = field(default_factory=dict)  # of the ensemble, by crops
    single_model_errors: Mapping[int, Errors] = field(default_factory=dict)  # mean over its models, by crops
    images: int = 0  # scored images that have a label
    bad_images: int = 0  # images that could not be decoded
    report: str = ""  # URL of the report
    mlflow_url: str = ""
    exit_status: int = 0  # of the command: 0 done, 1 failed or incomplete, 128 + N stopped by signal N
