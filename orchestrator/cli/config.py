"""Command lines of the commands that have no room of their own. Importable without torch or ray."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from orchestrator.config.arg_parser import Preset
from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.ray_backend.run_spec import (
    EMBEDDED_DATASET,
    RUNS_VARIABLE,
    Destination,
    JobConfig,
    choose_default_data,
)
from orchestrator.recipe import presets, recipe_file
from orchestrator.recipe.config import Recipe, pin_code
from orchestrator.storage import urls

IMAGENET_TRAIN_SAMPLES = 1_281_167  # training images of ILSVRC 2012
_STORAGE_HELP = f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs"


class StatusConfig(Config):
    """Flags of `orchestrator status`."""

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="names of runs, ensembles or sweeps, or URLs of their folders; by default everything in storage"
    )
    storage: str = Field("", description=_STORAGE_HELP)
    json_lines: Annotated[bool, Flag(name="json")] = Field(False, description="print JSON instead of tables")
    watch: float | None = Field(None, gt=0, description="seconds between updates; by default the status is shown once")


class StopConfig(Config):
    """Flags of `orchestrator stop`."""

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="names of runs or ensembles, or URLs of their folders"
    )
    storage: str = Field("", description=_STORAGE_HELP)
    save: bool = Field(True, description="write a checkpoint first")
    wait: float = Field(180.0, ge=0, description="seconds to wait for them to end; 0 only sends the request")


class AuditConfig(Config):
    """Flags of `orchestrator audit`."""

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="names of runs, or URLs of their folders"
    )
    storage: str = Field("", description=_STORAGE_HELP)
    data: str = Field("", description="URL of the packed dataset; by default where the run had it")


class SimulateConfig(Config):
    """Flags of `orchestrator simulate`."""

    recipe: Annotated[Recipe, Flag(name="")]
    data: str = Field(
        "", description="URL of a packed dataset, or 'digits' for the embedded one; the contact sheet needs it"
    )
    allow_elsewhere: bool = Field(
        False, description="read tars from wherever the dataset's manifest says, also outside its own folder"
    )
    samples: int = Field(
        IMAGENET_TRAIN_SAMPLES,
        ge=1,
        description="training images when no data is given; by default those of ImageNet-1k",
    )
    out: str = Field("", description="folder URL for schedule.png and contact_sheet.png; by default none is written")
    tracking: str = Field(
        "", description="MLflow tracking URI to log to; by default that of training, if --experiment is given"
    )
    experiment: str = Field(
        "", description="MLflow experiment to log to; by default 'googlenet', if --tracking is given"
    )

    @property
    def uses_mlflow(self) -> bool:
        """True if results are logged to MLflow."""
        return bool(self.tracking or self.experiment)

    def resolve_destination(self) -> Destination:
        """Return data and tracking with their defaults. Raises ConfigError as a training does."""
        given: dict[str, Any] = {"experiment": self.experiment} if self.experiment else {}
        given["allow_elsewhere"] = self.allow_elsewhere
        # A tracking URI that is not used must not be demanded.
        tracking = self.tracking if self.uses_mlflow else "none"
        return Destination(data=self.data or EMBEDDED_DATASET, tracking=tracking, **given).resolve()

    def resolve_output_folder(self) -> str:
        """Return the absolute URL of the pictures' folder, empty for none. Raises ValueError for a relative path."""
        return urls.require_absolute(self.out, "out") if self.out else ""


def build_simulate_presets() -> dict[str, Preset[SimulateConfig]]:
    """Return each recipe preset; those made for the embedded digits use that dataset."""
    return {
        name: Preset(
            SimulateConfig(recipe=recipe(), data=EMBEDDED_DATASET if name in presets.DIGITS_PRESETS else ""),
            presets.get_summary(name),
        )
        for name, recipe in presets.PRESETS.items()
    }


def load_simulate_preset(url: str) -> Preset[SimulateConfig]:
    """Return the recipe in a file; one made for the embedded digits uses that dataset. Raises ConfigError."""
    recipe = recipe_file.load_recipe(url)
    return Preset(SimulateConfig(recipe=recipe.recipe, data=choose_default_data(recipe)))


def resolve_recipe(config: JobConfig) -> Recipe:
    """Return the recipe of a training, with digests of its plug-ins' code and of the weights that it starts from.

    Raises ConfigError for plug-ins that cannot be found and weights that cannot be used; StorageError.
    """
    recipe = pin_code(config.recipe)
    if not config.weights and not recipe.initial_weights:
        return recipe
    from orchestrator.training import warm_start  # torch takes two seconds to import; few runs start from weights

    return warm_start.resolve_initial_weights(recipe, config.weights)
