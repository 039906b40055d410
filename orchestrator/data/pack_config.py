"""The command line of packing; importable without numpy, torch or ray."""

from __future__ import annotations

from typing import Annotated, Self

import tyro
from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.cli import Preset
from orchestrator.config.errors import ConfigError
from orchestrator.data.sources.config import DigitsSource, FolderSource, IlsvrcSource, Source
from orchestrator.storage import urls

Made = dict[str, str | int | float | bool]


class Layout(Config):
    """What decides on the bytes of a dataset, beside the images."""

    seed: int = Field(0, ge=0, description="of the global shuffle; the same seed gives the same bytes")
    shard_mib: float = Field(128.0, gt=0, le=8192, description="about the size of each shard, in MiB")
    min_shards: int = Field(8, ge=1, le=1_000_000, description="fewest shards of a split, so that workers find work")
    resize: int = Field(
        0, ge=0, le=65_535, description="shorter side that larger images are reduced to; 0 keeps every byte as it is"
    )
    quality: int = Field(95, ge=1, le=100, description="JPEG quality of reduced images")
    decode: bool = Field(True, description="decode every image once, so that broken ones are found and left out")


class Pack(Config):
    """What `shards.py pack` sets."""

    source: Source = FolderSource()
    url: str = Field("", description="folder URL of the dataset to be made")
    name: str = Field("", description="name of the dataset; by default that of the source")
    layout: Annotated[Layout, tyro.conf.arg(name="")] = Layout()
    max_bad: float = Field(
        0.001,
        ge=0,
        le=1,
        description="share of the images that may be broken and left out (10 always may); more end the packing",
    )
    at_once: int | None = Field(
        None,
        ge=1,
        description="most shards in the making; each holds one in memory. By default one per CPU of the cluster, "
        "without a cluster 4",
    )
    dry_run: bool = Field(False, description="print what would be packed and stop; nothing is written")

    @model_validator(mode="after")
    def _digits_are_packed_one_way(self) -> Self:
        if isinstance(self.source, DigitsSource) and (self.layout != Layout() or self.name):
            raise ValueError("source.kind digits: the embedded digits are packed one way only: give no other options")
        return self

    def resolved(self) -> Self:
        """The same with absolute places and a name. Raises ConfigError."""
        if not self.url:
            raise ConfigError("url: needed: give the URL of the folder to pack to")
        try:
            url = urls.absolute(self.url, "url")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        source = self.source.resolved()
        return self.model_copy(update={"url": url, "source": source, "name": self.name or _name(source)})

    def made(self) -> Made:
        """What the manifest keeps of how the dataset was made: no places and no times."""
        layout = self.layout.to_dict()
        if not self.layout.resize:
            del layout["quality"]
        return {"source": self.source.kind, "holdout": getattr(self.source, "holdout", None) or 0.0, **layout}

    def identity(self) -> dict[str, str]:
        """What makes another packing of it, for people, by flag: places and options."""
        places = {f"source.{name}": urls.redact(str(value)) for name, value in self.source.to_dict().items()}
        options = {name: str(value) for name, value in self.layout.to_dict().items()}
        return {"name": self.name, **places, **options}


def presets() -> dict[str, Preset[Pack]]:
    """The command line's presets: each kind of source."""
    return {
        "folder": Preset(Pack(source=FolderSource()), "A folder per class, local or in any store."),
        "ilsvrc": Preset(Pack(source=IlsvrcSource()), "ILSVRC2012 as it comes: tars and devkit, never unpacked."),
        "digits": Preset(Pack(source=DigitsSource()), "The embedded handwritten digits."),
    }


def _name(source: Source) -> str:
    if isinstance(source, FolderSource):
        return urls.name(source.url)
    return "ilsvrc2012" if isinstance(source, IlsvrcSource) else source.kind
