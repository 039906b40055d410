"""Configs of the kinds of sources; importable without numpy."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.storage import urls

_KIND = "folder | ilsvrc | digits | plugin"
_HOLDOUT = (
    "share of each class's images that becomes the validation split, when the source has none; chosen by a hash of "
    "their keys; 0 for no validation split at all"
)


class FolderSource(Config):
    """A folder per class."""

    kind: Literal["folder"] = Field("folder", description=_KIND)
    url: str = Field(
        "",
        description="folder with train/CLASS/* and validation/ or val/ (CLASS/* again, or images and --source.labels); "
        "or CLASS/* alone and --source.holdout",
    )
    labels: str = Field(
        "",
        description="text file with a line 'FILE CLASS' for each image of a flat validation folder",
    )
    holdout: float | None = Field(None, ge=0, lt=1, description=_HOLDOUT)

    def resolve(self) -> Self:
        """Return the same with absolute places. Raises ConfigError without a URL or for a relative path."""
        return self.model_copy(update=_resolve_places(self, "url", "labels"))

    def get_name(self) -> str:
        """Return the name of the dataset when no other is set."""
        return urls.get_basename(self.url)


class IlsvrcSource(Config):
    """ILSVRC2012 as it comes, or in its usual folders."""

    kind: Literal["ilsvrc"] = Field("ilsvrc", description=_KIND)
    url: str = Field(
        "",
        description="folder with ILSVRC2012_img_train.tar or train/, ILSVRC2012_img_val.tar or val/, and "
        "ILSVRC2012_devkit_t12.tar.gz or ILSVRC2012_devkit_t12/; or with Kaggle's ILSVRC/ and LOC_*",
    )
    train: str = Field("", description="training tar of tars, or folder of a folder per class, when not below url")
    validation: str = Field("", description="flat validation tar or folder, or folder per class, when not below url")
    devkit: str = Field(
        "",
        description="devkit, tar.gz or folder, or Kaggle's LOC_val_solution.csv, when not below url: labels of flat "
        "validation images",
    )
    holdout: float | None = Field(None, ge=0, lt=1, description=_HOLDOUT)

    def resolve(self) -> Self:
        """Return the same with absolute places. Raises ConfigError without a URL or for a relative path."""
        needed = "train" if self.train and not self.url else "url"
        return self.model_copy(update=_resolve_places(self, needed, "train", "validation", "devkit"))

    def get_name(self) -> str:
        """Return the name of the dataset when no other is set."""
        return "ilsvrc2012"


class DigitsSource(Config):
    """The embedded handwritten digits, packed in one way only: as `--data digits` has them."""

    kind: Literal["digits"] = Field("digits", description=_KIND)

    def resolve(self) -> Self:
        """Return the same."""
        return self

    def get_name(self) -> str:
        """Return the name of the dataset."""
        return "digits"


class PluginSource(Config):
    """Samples that a plug-in yields, packed in one process."""

    kind: Literal["plugin"] = Field("plugin", description=_KIND)
    plugin: str = Field(
        "", description="'package.module:attribute' or entry point of a class or function that returns a sample source"
    )
    args: dict[str, JsonValue] = Field({}, description="its arguments, as JSON")

    def resolve(self) -> Self:
        """Return the same. Raises ConfigError without a plug-in."""
        if not self.plugin:
            raise ConfigError("source.plugin: needed: set it to package.module:attribute of your source")
        return self

    def get_name(self) -> str:
        """Return the name of the dataset when no other is set: the last part of the plug-in's."""
        return self.plugin.rpartition(":")[2].rpartition(".")[2]


Source = Annotated[FolderSource | IlsvrcSource | DigitsSource | PluginSource, Field(discriminator="kind")]


def _resolve_places(source: FolderSource | IlsvrcSource, needed: str, *others: str) -> dict[str, str]:
    if not getattr(source, needed):
        raise ConfigError(f"source.{needed}: needed: give the URL of the images")
    places = {name: getattr(source, name) for name in (needed, *others) if getattr(source, name)}
    try:
        return {name: urls.require_absolute(place, f"source.{name}") for name, place in places.items()}
    except ValueError as error:
        raise ConfigError(str(error)) from None
