"""What one process of a run is given and what it gives back; both travel as plain dicts. Importable without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol, Self

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.plugins import Plugin
from orchestrator.config.redaction import redact
from orchestrator.data.config import ReadingConfig
from orchestrator.models.config import has_batch_norm
from orchestrator.recipe.config import Recipe

# A batch norm over maps of 1 x 1 has no statistics of one image; torch raises ValueError for it.
MIN_BATCH_NORM_IMAGES = 2  # images of a pass
MAX_PROFILED_STEPS = 1000  # steps; a trace holds thousands of events of each


class Execution(Config):
    """Micro-batches, compiling, and a profile on demand."""

    micro_batch: int | None = Field(
        None,
        ge=1,
        description="most images of one forward and backward pass on a worker; by default its whole part of the "
        "batch, or on a GPU the most that fits",
    )
    compile: bool = Field(False, description="run the network through torch.compile, which needs a C++ compiler")
    profile: tuple[int, int] | None = Field(
        None, description="first and last step of each attempt that rank 0 traces, counted from 0; off by default"
    )

    @model_validator(mode="after")
    def _check_profile_range(self) -> Self:
        if self.profile is not None:
            first, last = self.profile
            if not 0 <= first <= last < first + MAX_PROFILED_STEPS:
                raise ValueError(
                    f"profile {first} {last} is refused: give the first and the last step, counted from 0, "
                    f"of at most {MAX_PROFILED_STEPS}, such as 10 14"
                )
        return self


def count_passes(images: int, micro_batch: int | None, normalises: bool) -> int:
    """Return the number of passes, of nearly equal size, for a worker's part of a batch; 1 for an empty part.

    A pass holds `micro_batch` images at most. With batch norm (`normalises`) none holds a single one, unless the part
    does: then a micro-batch of 2 leaves one pass of 3 in a part of odd size.
    """
    passes = max(1, math.ceil(images / (micro_batch or max(1, images))))
    return min(passes, max(1, images // MIN_BATCH_NORM_IMAGES)) if normalises else passes


def compute_largest_pass(images: int, micro_batch: int | None, normalises: bool) -> int:
    """Return the most images of any pass over parts of at most `images`."""
    most = min(images, micro_batch or images)
    odd = normalises and most == MIN_BATCH_NORM_IMAGES < images
    return most + 1 if odd else most


def check_batch_norm(recipe: Recipe, execution: Execution, workers: int) -> None:
    """Raise ValueError where workers would train a network with batch norm on single images."""
    if not has_batch_norm(recipe.model):
        return
    if execution.micro_batch is not None and execution.micro_batch < MIN_BATCH_NORM_IMAGES:
        raise ValueError(
            f"execution.micro_batch must be at least {MIN_BATCH_NORM_IMAGES} for a network with batch "
            "norm, which has no "
            f"statistics of a single image, got {execution.micro_batch}; set --placement.execution.micro-batch "
            f"{MIN_BATCH_NORM_IMAGES} or more"
        )
    if recipe.batch_size < MIN_BATCH_NORM_IMAGES * workers:
        raise ValueError(
            f"batch_size must be at least {MIN_BATCH_NORM_IMAGES} for each worker of a network with batch "
            "norm, which has "
            f"no statistics of a single image, got {recipe.batch_size} for {workers} workers; set --batch-size "
            f"{MIN_BATCH_NORM_IMAGES * workers} or more, or fewer --placement.workers"
        )


class PhaseTimeouts(Config):
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
    validate_epochs: int = Field(1, ge=1, description="epochs between validations; the last epoch is always validated")
    pulse_steps: int = Field(10, ge=1, description="steps between looks at stop flag, loss, bad data and clock")
    log_steps: int = Field(50, ge=1, description="steps between points of the loss and rate curves, each at a pulse")
    limits: PhaseTimeouts = PhaseTimeouts()


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
    callbacks: tuple[Plugin, ...] = Field((), description="callbacks of one's own, called in this order on every rank")


OutcomeStatus = Literal["finished", "stopped", "diverged", "bad-data", "bad-checkpoint", "refused"]


class Outcome(Config):
    """How a run ended, for causes that would only repeat if it were tried again; crashes raise instead."""

    status: OutcomeStatus
    message: Annotated[str, AfterValidator(redact)] = ""
    samples: int = Field(0, ge=0)
    attempt: int = Field(1, ge=1)
    metrics: dict[str, float] = Field({}, description="of the last epoch")


class LauncherContext(Protocol):
    """What a worker needs of whatever launched it."""

    def report(self, metrics: dict[str, float]) -> None:
        """Tell the launcher that an epoch ended; every rank calls it equally often."""

    def has_preemption_notice(self) -> bool:
        """Whether this rank was told that a node of the run will soon be taken away; waits for nobody."""

    def should_continue(self) -> bool:
        """Whether the launcher, after an epoch's report, wants more of this run; every rank answers alike."""
