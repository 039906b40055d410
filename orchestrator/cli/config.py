"""Command lines of the commands that have no room of their own, and results. Importable without torch or ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.arg_parser import Preset
from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.ray_backend.run_spec import RUNS_VARIABLE, JobConfig, build_job_presets, build_recipe_preset
from orchestrator.recipe import recipe_file
from orchestrator.recipe.config import Recipe, pin_code

IMAGENET_TRAIN_SAMPLES = 1_281_167  # training images of ILSVRC 2012
_Runs = Annotated[tuple[str, ...], Flag(positional=True)]
_STORAGE_HELP = f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs"


class StatusConfig(Config):
    """Flags of `orchestrator status`."""

    runs: _Runs = Field(
        (), description="names of runs, ensembles or sweeps, or URLs of their folders; by default everything in storage"
    )
    storage: str = Field("", description=_STORAGE_HELP)
    json_lines: Annotated[bool, Flag(name="json")] = Field(False, description="print JSON instead of tables")
    watch: float | None = Field(None, gt=0, description="seconds between updates; by default the status is shown once")


class StopConfig(Config):
    """Flags of `orchestrator stop`."""

    runs: _Runs = Field((), description="names of runs or ensembles, or URLs of their folders")
    storage: str = Field("", description=_STORAGE_HELP)
    save: bool = Field(True, description="write a checkpoint first")
    wait: float = Field(180.0, ge=0, description="seconds to wait for them to end; 0 only sends the request")


class AuditConfig(Config):
    """Flags of `orchestrator audit`."""

    runs: _Runs = Field((), description="names of runs, or URLs of their folders")
    storage: str = Field("", description=_STORAGE_HELP)
    data: str = Field("", description="URL of the packed dataset; by default where the run had it")


class SimulateConfig(Config):
    """Flags of `orchestrator simulate`."""

    recipe: Annotated[Recipe, Flag(name="")]
    data: str = Field("", description="URL of a packed dataset, or 'digits'; the contact sheet needs it")
    allow_elsewhere: bool = Field(False, description="read tars also outside the dataset's own folder")
    samples: int = Field(
        IMAGENET_TRAIN_SAMPLES, ge=1, description="training images without data; by default those of ImageNet-1k"
    )
    out: str = Field("", description="folder URL for schedule.png and contact_sheet.png; by default none is written")


def build_simulate_presets() -> dict[str, Preset[SimulateConfig]]:
    """Return each recipe preset; those made for the embedded digits use that dataset."""
    return {name: _convert_preset(preset) for name, preset in build_job_presets(JobConfig).items()}


def load_simulate_preset(url: str) -> Preset[SimulateConfig]:
    """Return the recipe in a file; one made for the embedded digits uses that dataset. Raises ConfigError."""
    return _convert_preset(build_recipe_preset(JobConfig, recipe_file.load_recipe(url)))


def _convert_preset(preset: Preset[JobConfig]) -> Preset[SimulateConfig]:
    return Preset(SimulateConfig(recipe=preset.value.recipe, data=preset.value.destination.data), preset.summary)


def resolve_recipe(config: JobConfig) -> Recipe:
    """Return the recipe of a training, with digests of its plug-ins' code and of the weights that it starts from.

    Raises ConfigError for plug-ins that cannot be found and weights that cannot be used; StorageError.
    """
    recipe = pin_code(config.recipe)
    if not config.weights and not recipe.initial_weights:
        return recipe
    from orchestrator.training import warm_start  # torch takes two seconds to import; few runs start from weights

    return warm_start.resolve_initial_weights(recipe, config.weights)


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
