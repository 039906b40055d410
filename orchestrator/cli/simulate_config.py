"""The command line of simulate.py; importable without torch or ray."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from orchestrator.config.arg_parser import Preset
from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination, choose_default_data
from orchestrator.recipe import presets, recipe_file
from orchestrator.recipe.config import Recipe
from orchestrator.storage import urls

IMAGENET_TRAIN_SAMPLES = 1_281_167  # training images of ILSVRC 2012


class SimulateConfig(Config):
    """What the command line of simulate.py sets."""

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
        description="training images where no data is given; by default those of ImageNet-1k",
    )
    out: str = Field("", description="folder URL for schedule.png and contact_sheet.png; none by default")
    tracking: str = Field("", description="MLflow tracking URI to log to; where only --experiment is given, train.py's")
    experiment: str = Field("", description="MLflow experiment to log to; where only --tracking is given, 'googlenet'")

    @property
    def uses_mlflow(self) -> bool:
        """Whether MLflow is to be told."""
        return bool(self.tracking or self.experiment)

    def resolve_destination(self) -> Destination:
        """Data and tracking with their defaults. Raises ConfigError, as for a training."""
        named: dict[str, Any] = {"experiment": self.experiment} if self.experiment else {}
        named["allow_elsewhere"] = self.allow_elsewhere
        # A tracking URI that is not used must not be asked for.
        tracking = self.tracking if self.uses_mlflow else "none"
        return Destination(data=self.data or EMBEDDED_DATASET, tracking=tracking, **named).resolve()

    def resolve_output_folder(self) -> str:
        """Where the pictures go, absolute; empty: nowhere. Raises ValueError for a relative path."""
        return urls.require_absolute(self.out, "out") if self.out else ""


def build_simulate_presets() -> dict[str, Preset[SimulateConfig]]:
    """Each recipe, on the embedded data where it is made for that."""
    return {
        name: Preset(
            SimulateConfig(recipe=recipe(), data=EMBEDDED_DATASET if name in presets.DIGITS_PRESETS else ""),
            presets.get_summary(name),
        )
        for name, recipe in presets.PRESETS.items()
    }


def load_simulate_preset(url: str) -> Preset[SimulateConfig]:
    """The recipe in a file, on the embedded data where it is made for that. Raises ConfigError."""
    found = recipe_file.load_recipe(url)
    return Preset(SimulateConfig(recipe=found.recipe, data=choose_default_data(found)))
