"""Configs of `shards pack`, `index` and `verify`; importable without numpy, torch or ray."""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from orchestrator.config import redaction
from orchestrator.config.arg_parser import Preset
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.flags import Flag
from orchestrator.data.config import OrderConfig
from orchestrator.storage import urls

ManifestValues = dict[str, str | int | float | bool]

DIGITS_SEED = 1409  # of the split of the embedded digits
_KIND = "folder | ilsvrc | digits | plugin"
_HOLDOUT = "share of each class's images, by a hash of their keys, for validation if the source has none; 0 for none"


class _ImageSource(Config):
    def resolve(self) -> Self:
        """Return the same with absolute places. Raises ConfigError without a URL or for a relative path."""
        given = self.to_dict()
        if not given["url"] and not given.get("train"):
            raise ConfigError("source.url: needed: give the URL of the images")
        names = [name for name in ("url", "labels", "train", "validation", "devkit") if given.get(name)]
        return self.model_copy(update={name: urls.require_absolute(given[name], f"source.{name}") for name in names})


class FolderSource(_ImageSource):
    """A folder per class."""

    kind: Literal["folder"] = Field("folder", description=_KIND)
    url: str = Field(
        "", description="folder with train/CLASS/* and validation/ or val/; or CLASS/* alone and --source.holdout"
    )
    labels: str = Field("", description="list of 'FILE CLASS', CSV or TSV of a flat validation folder's images")
    holdout: float | None = Field(None, ge=0, lt=1, description=_HOLDOUT)


class IlsvrcSource(_ImageSource):
    """ILSVRC2012 as it comes, or in its usual folders."""

    kind: Literal["ilsvrc"] = Field("ilsvrc", description=_KIND)
    url: str = Field(
        "",
        description="folder with ILSVRC2012_img_train.tar or train/, ILSVRC2012_img_val.tar or val/, and "
        "ILSVRC2012_devkit_t12.tar.gz or ILSVRC2012_devkit_t12/; or with Kaggle's ILSVRC/ and LOC_*",
    )
    train: str = Field("", description="training tar of tars, or folder of a folder per class, when not below url")
    validation: str = Field("", description="flat validation tar or folder, or folder per class, when not below url")
    devkit: str = Field("", description="devkit, tar.gz or folder, or Kaggle's LOC_val_solution.csv, likewise")
    holdout: float | None = Field(None, ge=0, lt=1, description=_HOLDOUT)


class DigitsSource(Config):
    """The embedded handwritten digits, packed in one way only: as `--data digits` has them."""

    kind: Literal["digits"] = Field("digits", description=_KIND)


class PluginSource(Config):
    """Samples that a plug-in yields, packed in one process."""

    kind: Literal["plugin"] = Field("plugin", description=_KIND)
    plugin: str = Field("", description="'package.module:attribute' or entry point that returns a sample source")
    args: dict[str, JsonValue] = Field({}, description="its arguments, as JSON")


Source = Annotated[FolderSource | IlsvrcSource | DigitsSource | PluginSource, Field(discriminator="kind")]


class ShardLayout(Config):
    """Options that decide on the bytes of a dataset, beside the images."""

    seed: int = Field(0, ge=0, description="of the global shuffle; the same seed gives the same bytes")
    shard_mib: float = Field(128.0, gt=0, le=8192, description="about the size of each shard, in MiB")
    min_shards: int = Field(8, ge=1, le=1_000_000, description="fewest shards of a split, so that workers find work")
    resize: int = Field(0, ge=0, le=65_535, description="shorter side to reduce larger images to; 0 keeps every byte")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality of reduced images")
    decode: bool = Field(True, description="decode every image once, so that broken ones are found and left out")


class PackConfig(Config):
    """Which source to pack, how and where."""

    source: Source = FolderSource()
    url: str = Field("", description="folder URL of the dataset to be made")
    name: str = Field("", description="name of the dataset; by default that of the source")
    layout: Annotated[ShardLayout, Flag(name="")] = ShardLayout()
    max_bad: float = Field(0.001, ge=0, le=1, description="share of images that may be broken, and left out; 10 may")
    at_once: int | None = Field(
        None, ge=1, description="shards packed at a time, in memory; by default one per CPU of the cluster, else 4"
    )
    dry_run: bool = Field(False, description="print what would be packed and stop; nothing is written")

    @model_validator(mode="after")
    def _check_digits_options(self) -> Self:
        if isinstance(self.source, DigitsSource) and (self.layout != ShardLayout() or self.name):
            raise ValueError("source.kind digits: the embedded digits are packed one way only: set no other options")
        return self

    def resolve(self) -> Self:
        """Return the same with absolute places and a name. Raises ConfigError."""
        if not self.url:
            raise ConfigError("url: needed: give the URL of the folder to pack to")
        source, name = self.source, str(self.source.kind)
        if isinstance(source, PluginSource):
            if not source.plugin:
                raise ConfigError("source.plugin: needed: set it to package.module:attribute of your source")
            name = source.plugin.rpartition(":")[2].rpartition(".")[2]
        elif not isinstance(source, DigitsSource):
            source = source.resolve()
            name = urls.get_basename(source.url) if isinstance(source, FolderSource) else "ilsvrc2012"
        url = urls.require_absolute(self.url, "url")
        return self.model_copy(update={"url": url, "source": source, "name": self.name or name})

    def to_manifest_values(self) -> ManifestValues:
        """Return what the manifest keeps of how the dataset was made: no places and no times."""
        layout = self.layout.to_dict()
        if not self.layout.resize:
            del layout["quality"]
        if isinstance(self.source, DigitsSource):
            return {"source": "digits", "seed": DIGITS_SEED}
        if isinstance(self.source, PluginSource):
            args = json.dumps(self.source.args, sort_keys=True)
            return {"source": self.source.plugin, "args": args, **layout}
        return {"source": self.source.kind, "holdout": self.source.holdout or 0.0, **layout}

    def describe_identity(self) -> dict[str, str]:
        """Return what makes it another packing, for people, by flag: places and options."""
        places = {f"source.{name}": redaction.redact(str(value)) for name, value in self.source.to_dict().items()}
        options = {name: str(value) for name, value in self.layout.to_dict().items()}
        return {"name": self.name, **places, **options}


def pack_presets() -> dict[str, Preset[PackConfig]]:
    """Return the command line's presets: each kind of source."""
    return {
        "folder": Preset(PackConfig(source=FolderSource()), "A folder per class, local or in any store."),
        "ilsvrc": Preset(PackConfig(source=IlsvrcSource()), "ILSVRC2012 as it comes: tars and devkit, never unpacked."),
        "digits": Preset(PackConfig(source=DigitsSource()), "The embedded handwritten digits."),
        "plugin": Preset(PackConfig(source=PluginSource()), "Samples of your own class or function."),
    }


class CheckConfig(Config):
    """Options of `index` and `verify`."""

    threads: int = Field(8, ge=1, le=256, description="shards that are read in parallel")
    order: OrderConfig = OrderConfig()
    batch_size: int = Field(256, ge=1, description="global batch that the report on label mixing is about")


class IndexConfig(CheckConfig):
    """Which tars make up a dataset, and how they are labelled."""

    url: str = Field("", description="folder of the tars, any fsspec URL")
    train: str = Field("", description="training tars below url: 'train-{000000..000146}.tar' or 'train/*.tar'")
    validation: str = Field("", description="validation tars below url, likewise")
    image_key: str = Field(
        "", description="the image's member, or several ('jpg;input.jpg'), the first counts; empty: jpg, jpeg or png"
    )
    label_key: str = Field(
        "",
        description="field of each sample's json that holds the label ('label', 'meta.json:label'), or the member that "
        "is the label ('output.cls', '.label', 'cls;y.cls'); empty: the cls member",
    )
    classes: str = Field("", description="URL of the class names: one per line, a JSON list, or an object by label")
    to: str = Field("", description="where manifest and indexes are written when the tars' folder is read-only")
    name: str = Field("", description="the dataset's name; by default the last part of url")


class VerifyConfig(CheckConfig):
    """Which dataset to check, and how thoroughly."""

    url: str = Field("", description="the dataset: the folder of its manifest.json, any fsspec URL")
    allow_elsewhere: bool = Field(False, description="read tars from outside the dataset's folder, too")
    deep: bool = Field(False, description="decode every image, too")
