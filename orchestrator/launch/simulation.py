"""The command line of simulate.py; importable without torch or ray."""

from __future__ import annotations

from typing import Annotated, Any

import tyro
from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.config.cli import Preset
from orchestrator.launch.config import EMBEDDED, Destination, data_of
from orchestrator.recipe import frozen, presets
from orchestrator.recipe.config import Recipe
from orchestrator.storage import urls

IMAGENET_TRAIN = 1_281_167  # training images of ILSVRC 2012


class Simulation(Config):
    """What the command line of simulate.py sets."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    data: str = Field(
        "", description="URL of a packed dataset, or 'digits' for the embedded one; the contact sheet needs it"
    )
    allow_elsewhere: bool = Field(
        False, description="read tars from wherever the dataset's manifest says, also outside its own folder"
    )
    samples: int = Field(
        IMAGENET_TRAIN, ge=1, description="training images where no data is given; by default those of ImageNet-1k"
    )
    out: str = Field("", description="folder URL for schedule.png and contact_sheet.png; none by default")
    tracking: str = Field("", description="MLflow tracking URI to log to; where only --experiment is given, train.py's")
    experiment: str = Field("", description="MLflow experiment to log to; where only --tracking is given, 'googlenet'")

    @property
    def is_logged(self) -> bool:
        """Whether MLflow is to be told."""
        return bool(self.tracking or self.experiment)

    def destination(self) -> Destination:
        """Data and tracking with their defaults. Raises ConfigError, as for a training."""
        named: dict[str, Any] = {"experiment": self.experiment} if self.experiment else {}
        named["allow_elsewhere"] = self.allow_elsewhere
        # A tracking URI that is not used must not be asked for.
        tracking = self.tracking if self.is_logged else "none"
        return Destination(data=self.data or EMBEDDED, tracking=tracking, **named).resolved()

    def folder(self) -> str:
        """Where the pictures go, absolute; empty: nowhere. Raises ValueError for a relative path."""
        return urls.absolute(self.out, "out") if self.out else ""


def simulation_presets() -> dict[str, Preset[Simulation]]:
    """Each recipe, on the embedded data where it is made for that."""
    return {
        name: Preset(
            Simulation(recipe=recipe(), data=EMBEDDED if name in presets.ON_DIGITS else ""), presets.summary(name)
        )
        for name, recipe in presets.PRESETS.items()
    }


def simulation_from_file(url: str) -> Preset[Simulation]:
    """The recipe in a file, on the embedded data where it is made for that. Raises ConfigError."""
    found = frozen.load(url)
    return Preset(Simulation(recipe=found.recipe, data=data_of(found)))
