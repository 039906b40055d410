"""What one process of a run is given and what it gives back; both travel as plain dicts. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, Field

from orchestrator.config.base import Config
from orchestrator.config.printable import redact
from orchestrator.data.config import ReadingConfig
from orchestrator.recipe.config import Recipe
from orchestrator.storage import files
from orchestrator.training.execution import Execution


class Limits(Config):
    """How long a phase of training may take before its worker ends itself, to be started again."""

    start_seconds: float = Field(900.0, gt=0, description="from a worker's start to its first step")
    step_seconds: float = Field(300.0, gt=0, description="without a step; and at least step_times the usual step")
    step_times: float = Field(50.0, ge=2, description="median steps without a step")
    evaluation_seconds: float = Field(3600.0, gt=0, description="of one validation")
    save_seconds: float = Field(600.0, gt=0, description="of writing one checkpoint")
    stop_seconds: float = Field(60.0, gt=0, description="from a wish to stop to the end of training")


class Cadence(Config):
    """How often things happen that do not change the result."""

    checkpoint_seconds: float = Field(
        30.0, gt=0, description="seconds between checkpoints, each at a pulse: about the most a death replays"
    )
    checkpoint_samples: int | None = Field(
        None, ge=1, description="samples between checkpoints, also at a pulse, whatever the clock says; off by default"
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept while training")
    marks: tuple[int, ...] = Field(
        (), description="samples at which a checkpoint is kept for good, for other runs to begin with; each at a pulse"
    )
    validate_epochs: int = Field(1, ge=1, description="epochs between validations; the last epoch is always validated")
    pulse_steps: int = Field(10, ge=1, description="steps between looks at stop flag, loss, bad data and clock")
    log_steps: int = Field(50, ge=1, description="steps between points of the loss and rate curves, each at a pulse")
    limits: Limits = Limits()


class TrainJob(Config):
    """One run for the processes that train it."""

    recipe: Recipe
    cadence: Cadence = Cadence()
    data: str = Field(description="URL of the packed dataset")
    allow_elsewhere: bool = Field(False, description="read tars outside the dataset's folder, if its manifest says so")
    dataset_digest: str = Field(description="digest of its manifest; another dataset at the same URL is refused")
    folder: str = Field(description="URL of the run's folder")
    stop_flag: str = Field(
        description="URL of a file whose existence asks the run to save and stop; without a checkpoint when it holds "
        'the JSON {"save": false}'
    )
    successor: str = Field("", description="URL of a file whose existence says that another driver took the run over")
    threads: int = Field(1, ge=1, description="CPU threads of each worker, for the network and for decoding")
    reading: ReadingConfig = ReadingConfig()
    execution: Execution = Execution()
    weights: str = Field("", description="URL of the weights to start from, whose digest is recipe.initial_weights")


Status = Literal["finished", "stopped", "diverged", "bad-data", "bad-checkpoint", "refused"]


class Outcome(Config):
    """How a run ended, for causes that would only repeat if it were tried again; crashes raise instead."""

    status: Status
    message: Annotated[str, AfterValidator(redact)] = ""
    samples: int = Field(0, ge=0)
    attempt: int = Field(1, ge=1)
    metrics: dict[str, float] = Field({}, description="of the last epoch")


class Context(Protocol):
    """What a worker needs of whatever launched it."""

    def report(self, metrics: dict[str, float]) -> None:
        """Tell the launcher that an epoch ended; every rank calls it equally often."""

    def preempted(self) -> bool:
        """Whether this rank was told that a node of the run will soon be taken away; waits for nobody."""

    def wanted(self) -> bool:
        """Whether the launcher, after an epoch's report, wants more of this run; every rank answers alike."""


def checkpoints_of(folder: str) -> str:
    """Where a run keeps its checkpoints."""
    return files.join(folder, "checkpoints")


def marks_of(folder: str) -> str:
    """Where a run keeps the checkpoints that other runs begin with."""
    return files.join(folder, "marks")


def final_of(folder: str) -> str:
    """Where a finished run keeps its final weights."""
    return files.join(folder, "final")


def best_of(folder: str) -> str:
    """Where a run keeps the weights that validated best, below a folder named as checkpoints are."""
    return files.join(folder, "best")


def journal_of(folder: str) -> str:
    """Where a run keeps its journal."""
    return files.join(folder, "journal")


def attempts_of(folder: str) -> str:
    """Where a run keeps the records of its attempts."""
    return files.join(folder, "attempts")


def outcome_of(folder: str) -> str:
    """Where rank 0 writes how the run ended."""
    return files.join(folder, "outcome.json")
