"""The job of a training process and its outcome; both travel as plain dicts. Importable without torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Protocol, Self

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import Plugin
from orchestrator.config.redaction import redact
from orchestrator.data.config import ReadingConfig
from orchestrator.models.config import has_batch_norm
from orchestrator.recipe.config import MetricPlugin, Recipe

MAX_PROFILED_STEPS = 1000  # steps; a trace holds thousands of events of each
# A batch norm over maps of 1 x 1 has no statistics of one image; torch raises ValueError for it.
MIN_BATCH_NORM_IMAGES = 2  # images of a pass


class CallbackPlugin(Plugin):
    """A callback by name: a subclass of training.callbacks.callback.Callback, made with args."""

    what: ClassVar[str] = "callback"


class Execution(Config):
    """Micro-batches, compiling, a profile on demand, metrics and callbacks of the user's own."""

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
    metrics: tuple[MetricPlugin, ...] = Field(
        (),
        description='further metrics of validation, as JSON: [{"kind": "top_k_error", "args": {"k": 3}}]',
        exclude_if=lambda plugins: not plugins,
    )
    callbacks: tuple[CallbackPlugin, ...] = Field(
        (),
        description='callbacks of the training loop, as JSON: [{"kind": "my_module:MyCallback"}]',
        exclude_if=lambda plugins: not plugins,
    )

    @model_validator(mode="after")
    def _check_profile_range(self) -> Self:
        if self.profile is not None:
            first, last = self.profile
            if not 0 <= first <= last < first + MAX_PROFILED_STEPS:
                raise ValueError(
                    f"profile must be the first and the last of at most {MAX_PROFILED_STEPS} steps, counted from 0, "
                    f"got {first} {last}; set it to 10 14, for example"
                )
        return self


def check_batch_norm(recipe: Recipe, execution: Execution, workers: int) -> None:
    """Raise ConfigError where workers would train a network with batch norm on single images."""
    micro_batch, least = execution.micro_batch, MIN_BATCH_NORM_IMAGES
    if micro_batch is not None and micro_batch < least:
        field, got, fix = (
            "execution.micro_batch",
            str(micro_batch),
            f"--placement.execution.micro-batch {least} or more",
        )
    elif recipe.batch_size < least * workers:
        field, got = "batch_size", f"{recipe.batch_size} for {workers} workers"
        fix = f"--batch-size {least * workers} or more, or fewer --placement.workers"
    else:
        return
    if has_batch_norm(recipe.model):  # last, since a plug-in has to be built to find out
        raise ConfigError(
            f"{field} must be at least {least} for each worker of a network with batch norm, which has no statistics "
            f"of a single image, got {got}; set {fix}"
        )


class PhaseTimeouts(Config):
    """Seconds that a phase of training may take before its worker ends itself, so that the launcher retries."""

    start_seconds: float = Field(900.0, gt=0, description="from a worker's start to its first step")
    step_seconds: float = Field(300.0, gt=0, description="without a step; and at least step_times the usual step")
    step_times: float = Field(50.0, ge=2, description="median steps without a step")
    evaluation_seconds: float = Field(3600.0, gt=0, description="of one validation")
    save_seconds: float = Field(600.0, gt=0, description="of writing one checkpoint")
    stop_seconds: float = Field(60.0, gt=0, description="from a stop request to the end of training")


class Cadence(Config):
    """Intervals at which a run saves, validates and syncs; no result depends on them."""

    checkpoint_seconds: float = Field(
        30.0, gt=0, description="seconds between checkpoints, each at a sync: about the most that a restart replays"
    )
    checkpoint_samples: int | None = Field(
        None,
        ge=1,
        description="samples between checkpoints, each at a sync, besides those by the clock; off by default",
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept while training")
    validate_epochs: int = Field(1, ge=1, description="epochs between validations; the last epoch is always validated")
    pulse_steps: int = Field(
        10, ge=1, description="steps between syncs of the ranks: stop flag, loss, bad data, checkpoints"
    )
    log_steps: int = Field(50, ge=1, description="steps between points of the loss and rate curves, each at a sync")
    limits: PhaseTimeouts = PhaseTimeouts()


class TrainJob(Config):
    """One run for the processes that train it."""

    recipe: Recipe
    cadence: Cadence = Cadence()
    data: str = Field(description="URL of the packed dataset")
    allow_elsewhere: bool = Field(False, description="read tars outside the dataset's folder, if its manifest says so")
    dataset_digest: str = Field(description="digest of its manifest; another dataset at the same URL ends the run")
    folder: str = Field(description="URL of the run's folder")
    stop_flag: str = Field(
        description="URL of a file whose existence asks the run to save and stop; without a checkpoint when it holds "
        'the JSON {"save": false}'
    )
    successor: str = Field("", description="URL of a file that exists once another driver has taken the run over")
    threads: int = Field(1, ge=1, description="CPU threads of each worker, for the network and for decoding")
    reading: ReadingConfig = ReadingConfig()
    execution: Execution = Execution()
    weights: str = Field("", description="URL of the weights to start from, whose digest is recipe.initial_weights")
    code: dict[str, str] = Field({}, description="digests of the code of all plug-ins, as the driver has it, by kind")


OutcomeStatus = Literal["finished", "stopped", "diverged", "bad-data", "bad-checkpoint", "refused"]


class Outcome(Config):
    """The end of a run, for causes that a retry would only repeat; crashes raise instead."""

    status: OutcomeStatus
    message: Annotated[str, AfterValidator(redact)] = ""
    samples: int = Field(0, ge=0)
    attempt: int = Field(1, ge=1)
    metrics: dict[str, float] = Field({}, description="of the last epoch")


class LauncherContext(Protocol):
    """The launcher's side of a worker."""

    def report(self, metrics: dict[str, float]) -> None:
        """Report an epoch's metrics; every rank calls it equally often."""
        return

    def has_preemption_notice(self) -> bool:
        """Return whether this rank knows that a node of the run will soon be taken away; never waits."""

    def should_continue(self) -> bool:
        """Return whether the run needs another epoch after the one just reported; the same on every rank."""
        return True
