"""The specification of a run: recipe, hardware and places. Importable without torch or Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Annotated, Self, TypeVar

from pydantic import Field, model_validator

from orchestrator.config import redaction
from orchestrator.config.arg_parser import Preset
from orchestrator.config.base import Config, compute_fingerprint
from orchestrator.config.errors import ConfigError
from orchestrator.config.flags import Flag
from orchestrator.config.plugins import Plugin
from orchestrator.data.config import ReadingConfig
from orchestrator.recipe import presets, recipe_file
from orchestrator.recipe.config import Recipe, collect_code
from orchestrator.recipe.recipe_file import Provenance, RecipeFile
from orchestrator.storage import file_io, urls
from orchestrator.tracking import connect, tracking_uri
from orchestrator.tracking.tracker import TrackingError
from orchestrator.training.config import Cadence, Execution, TrainJob, check_batch_norm

# Where runs are stored by default; with ORCHESTRATOR_FAST_START (ray_env) all variables that the project defines.
RUNS_VARIABLE = "ORCHESTRATOR_RUNS"
# MLflow's own, which its other tools read, too.
TRACKING_URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
DEFAULT_EXPERIMENT = "googlenet"
DEFAULT_STORAGE = "~/orchestrator-runs"
EMBEDDED_DATASET = "digits"
SPEC_FILE = "spec.json"  # in a run's folder


class Placement(Config):
    """Resources of a run, and how long it waits for them. Nothing here changes a result."""

    workers: int = Field(1, ge=1, le=65536, description="DDP workers of each model")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="train with as few as this when nodes are lost, and with more when they return; only for a run "
        "alone on its cluster, off by default",
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPUs, and threads, of each worker")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of each worker; by default 1 where the cluster has any, else 0"
    )
    at_once: int | None = Field(None, ge=1, description="most models trained in parallel; by default as many as fit")
    max_restarts: int = Field(3, ge=0, description="restarts without a new checkpoint before it counts as failed")
    wait_seconds: float = Field(
        0.0, ge=0, description="how long to wait for nodes to join a cluster that is too small and not autoscaled"
    )
    autoscale_seconds: float = Field(900.0, ge=0, description="how long to wait for an autoscaler to add nodes")
    poll_seconds: float = Field(0.5, gt=0, le=10, description="seconds between checks of the workers' health")
    reading: ReadingConfig = ReadingConfig()
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _validate_worker_range(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers must be at most workers ({self.workers}), got {self.min_workers}; lower it")
        return self

    @property
    def fewest_workers(self) -> int:
        """The fewest workers that a run may have."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def is_elastic(self) -> bool:
        """True if the number of workers may change while a run is trained."""
        return self.fewest_workers < self.workers


class Destination(Config):
    """URLs of the data, of the runs' storage and of the tracker."""

    data: str = Field("", description="URL of a packed dataset, or 'digits' for the embedded one")
    storage: str = Field("", description=f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs")
    tracking: str = Field(
        "",
        description=f"MLflow tracking URI; by default ${TRACKING_URI_VARIABLE}, else a sqlite database in the "
        "storage folder",
    )
    experiment: str = Field(
        "",
        max_length=250,
        description=f"MLflow experiment; by default ${EXPERIMENT_VARIABLE}, else {DEFAULT_EXPERIMENT}",
    )
    tracker: Plugin = Field(
        connect.MLFLOW_PLUGIN, description="experiment tracker: mlflow, or a class as package.module:Class"
    )
    allow_elsewhere: bool = Field(
        False, description="read tars from wherever the dataset's manifest says, also outside its own folder"
    )

    def resolve(self) -> Self:
        """Return the same with every default filled in and every URL absolute.

        Raises ConfigError without data, for a relative path, without a home folder for the default storage, or when
        the default of tracking needs a local storage.
        """
        if not self.data:
            raise ConfigError("data: needed: give the URL of a packed dataset, or 'digits' for the embedded one")
        storage, field = self.storage, "storage"
        if not storage:
            storage, field = os.environ.get(RUNS_VARIABLE) or DEFAULT_STORAGE, RUNS_VARIABLE
        if storage == DEFAULT_STORAGE and os.path.expanduser("~") == "~":
            raise ConfigError(
                f"storage: the user (uid {os.getuid()}) has no home folder to keep runs in; set {RUNS_VARIABLE} (or "
                "--storage, of a job that has it) to an absolute path or a URL"
            )
        storage = urls.require_absolute(storage, field)
        is_embedded = self.data == EMBEDDED_DATASET
        data = file_io.join(storage, "data", self.data) if is_embedded else urls.require_absolute(self.data, "data")
        tracking = self.tracking
        if not tracking and self.tracker.kind == connect.MLFLOW:
            tracking = _get_default_tracking(storage)
        experiment = self.experiment or os.environ.get(EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT
        places = {"storage": storage, "data": data, "tracking": tracking, "experiment": experiment}
        return type(self).from_dict({**self.to_dict(), **places})  # from_dict: it checks what variables said

    @property
    def is_embedded(self) -> bool:
        """True if this resolved destination has the embedded data."""
        return self.data == file_io.join(self.storage, "data", EMBEDDED_DATASET)

    def to_flags(self, default_data: str = "") -> list[str]:
        """Return the flags that give a command this resolved destination in any shell, which may lack variables.

        default_data: what the command uses without --data, EMBEDDED_DATASET or nothing.
        """
        data = EMBEDDED_DATASET if self.is_embedded else redaction.redact(self.data)
        flags = [] if data == default_data else ["--data", data]
        flags += ["--storage", redaction.redact(self.storage), "--experiment", self.experiment]
        if self.tracker != connect.MLFLOW_PLUGIN:
            flags += ["--tracker.kind", self.tracker.kind, "--tracker.args", json.dumps(self.tracker.args)]
        return flags + (["--tracking", redaction.redact(self.tracking)] if self.tracking else [])

    def redact(self) -> Self:
        """Return the same without users, passwords and queries, fit to be stored."""
        places = {name: redaction.redact(getattr(self, name)) for name in ("data", "storage", "tracking")}
        return self.model_copy(update=places)


def _get_default_tracking(storage: str) -> str:
    """Return the tracking URI of MLflow's variable, else of a database in a local storage. Raises ConfigError."""
    if uri := os.environ.get(TRACKING_URI_VARIABLE, ""):
        try:
            tracking_uri.parse_tracking_uri(uri)
        except TrackingError as error:
            raise ConfigError(f"{TRACKING_URI_VARIABLE}: {error}; or give --tracking, which wins") from None
        return uri
    if not urls.is_local(storage):
        raise ConfigError(
            f"tracking: needed when storage is {redaction.redact(storage)}: give the URI of an MLflow server, such as "
            "--tracking http://HOST:5000"
        )
    return tracking_uri.make_tracking_uri(file_io.join(urls.to_local_path(storage), "mlflow.db"))


class RunSpec(Config):
    """One training run: recipe and dataset, placement and destination, and how often it saves and reports."""

    recipe: Recipe
    placement: Placement
    destination: Destination
    cadence: Cadence = Cadence()
    dataset_digest: str
    weights: str = Field("", description="URL of the weights to start from, whose digest the recipe names")
    generation: int = Field(0, ge=0, description="raised by --new, so that a run starts afresh under another name")
    provenance: Provenance | None = Field(None, description="of a recipe that a sweep found; no part of the identity")

    @model_validator(mode="after")
    def _validate_workers(self) -> Self:
        _check_divisible(self.recipe, self.placement)
        return self

    @property
    def identity(self) -> str:
        """Fingerprint of recipe and dataset, never of URLs or hardware."""
        return compute_fingerprint(self.recipe, self.dataset_digest, self.generation)

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return f"{self.recipe.name}-{self.identity}"

    @property
    def folder(self) -> str:
        """URL of the run's folder."""
        return file_io.join(self.destination.storage, "models", self.name)

    @property
    def dataset_warning(self) -> str:
        """A warning that the recipe was tuned on another dataset; empty when it was not, or it is not known."""
        origin = self.provenance
        if origin is None or origin.dataset_digest in ("", self.dataset_digest):
            return ""
        return (
            f"the recipe was tuned on {origin.dataset or 'a dataset'} of digest {origin.dataset_digest}, this one's is "
            f"{self.dataset_digest}: it may not be the best one here"
        )

    def save(self) -> None:
        """Write the spec into the run's folder, without users, passwords and queries, for other jobs to read."""
        update = {"destination": self.destination.redact(), "weights": redaction.redact(self.weights)}
        file_io.write_bytes(file_io.join(self.folder, SPEC_FILE), self.model_copy(update=update).to_json().encode())

    def redact_tracking(self) -> Self:
        """Return the same without the tracker's password, which workers do not need and Ray would keep in its files."""
        tracking = redaction.redact(self.destination.tracking)
        return self.model_copy(update={"destination": self.destination.model_copy(update={"tracking": tracking})})

    def build_train_job(self, stop_flag: str, successor: str) -> TrainJob:
        """Return what each worker is given; the two URLs are those of the lease under which the run is trained."""
        return TrainJob(
            recipe=self.recipe,
            cadence=self.cadence,
            data=self.destination.data,
            allow_elsewhere=self.destination.allow_elsewhere,
            dataset_digest=self.dataset_digest,
            folder=self.folder,
            stop_flag=stop_flag,
            successor=successor,
            threads=self.placement.cpus_per_worker,
            reading=self.placement.reading,
            execution=self.placement.execution,
            weights=self.weights,
            code=collect_code(self.recipe, self.placement.execution),
        )


def load_run_spec(folder: str) -> RunSpec:
    """Return the spec in a run's folder. Raises FileNotFoundError; ConfigError, naming the file, if it is unusable."""
    url = file_io.join(folder, SPEC_FILE)
    try:
        return RunSpec.from_record(file_io.read_bytes(url))
    except ConfigError as error:
        raise ConfigError(f"{redaction.redact(url)}: cannot be used: {error}") from None


class JobConfig(Config):
    """Options that the command lines of training jobs share."""

    recipe: Annotated[Recipe, Flag(name="")]
    provenance: Annotated[Provenance | None, Flag(settable=False)] = Field(
        None, description="where the recipe comes from, when it was given as a file"
    )
    destination: Annotated[Destination, Flag(name="")] = Destination()
    placement: Placement = Placement()
    cadence: Cadence = Cadence()
    weights: str = Field(
        "", description="URL of weights to start from: a run's final folder or a .safetensors file; by default random"
    )
    new: int = Field(
        0, ge=0, description="train afresh as generation N beside what was trained before; the same N resumes it"
    )
    same_code_anyway: bool = Field(
        False, description="resume what began before, though the code of its plug-ins has changed since"
    )
    dry_run: bool = Field(False, description="print the plan and stop; nothing is started or written")

    @model_validator(mode="after")
    def _validate_workers(self) -> Self:
        _check_divisible(self.recipe, self.placement)
        check_batch_norm(self.recipe, self.placement.execution, self.placement.workers)
        return self

    def build_run_spec(self, recipe: Recipe, destination: Destination, dataset_digest: str) -> RunSpec:
        """Return the run of `recipe` under this command line."""
        return RunSpec(
            recipe=recipe,
            placement=self.placement,
            destination=destination,
            cadence=self.cadence,
            dataset_digest=dataset_digest,
            weights=self.weights and urls.require_absolute(self.weights, "weights"),
            generation=self.new,
            provenance=self.provenance,
        )


JobConfigT = TypeVar("JobConfigT", bound=JobConfig)


def build_job_presets(kind: type[JobConfigT]) -> dict[str, Preset[JobConfigT]]:
    """Return a job's presets: each recipe, on the embedded data where it is made for that."""
    job_presets = {}
    for name, recipe in presets.PRESETS.items():
        destination = Destination(data=EMBEDDED_DATASET if name in presets.DIGITS_PRESETS else "")
        summary = (recipe.__doc__ or "").splitlines()[0]
        job_presets[name] = Preset(kind(recipe=recipe(), destination=destination), summary)
    return job_presets


def make_preset_loader(kind: type[JobConfigT]) -> Callable[[str], Preset[JobConfigT]]:
    """Return a function from the URL of a recipe file to the preset of a job; it raises ConfigError for a bad file."""
    return lambda url: build_recipe_preset(kind, recipe_file.load_recipe(url))


def build_recipe_preset(kind: type[JobConfigT], recipe: RecipeFile) -> Preset[JobConfigT]:
    """Return a recipe from a file as the preset of a job. Raises ConfigError when the job cannot train it."""
    values = {"recipe": recipe.recipe, "provenance": recipe.provenance}
    return Preset(kind.from_dict({**values, "destination": {"data": choose_default_data(recipe)}}))


def choose_default_data(file: RecipeFile) -> str:
    """Return the data that a recipe from a file is trained on without --data: the embedded data or, empty, none.

    The dataset that it was tuned on decides; if unknown, whether its name begins like a preset's for embedded data.
    """
    known = file.provenance.dataset if file.provenance is not None else ""
    name = f"{file.recipe.name}-"
    embedded = known == EMBEDDED_DATASET if known else any(name.startswith(f"{n}-") for n in presets.DIGITS_PRESETS)
    return EMBEDDED_DATASET if embedded else ""


def _check_divisible(recipe: Recipe, placement: Placement) -> None:
    """Raise ValueError when some worker would have no data."""
    for name, most in (("order.lanes", recipe.order.lanes), ("batch_size", recipe.batch_size)):
        if placement.workers > most:
            raise ValueError(f"placement.workers must be at most {name} ({most}), got {placement.workers}; lower it")
