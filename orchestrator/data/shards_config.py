"""The command lines of `shards.py index` and `shards.py verify`; importable without numpy, torch or ray."""

from __future__ import annotations

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.config.cli import Preset
from orchestrator.data.config import OrderConfig


class IndexJob(Config):
    """Which tars make up a dataset, and how they are labelled."""

    url: str = Field("", description="folder of the tars, any fsspec URL")
    train: str = Field("", description="training tars below url: 'train-{000000..000146}.tar' or 'train/*.tar'")
    validation: str = Field("", description="validation tars below url, likewise")
    image_key: str = Field(
        "",
        description="member that is the image, by what follows the first dot of its name: 'jpg', 'input.jpg', or "
        "several ('jpg;input.jpg'), of which the first counts; empty: the only one of jpg, jpeg and png",
    )
    label_key: str = Field(
        "",
        description="field of each sample's json that holds the label ('label', 'meta.json:label'), or the member that "
        "is the label ('output.cls', '.label', 'cls;y.cls'); empty: the cls member",
    )
    classes: str = Field(
        "", description="URL of the class names: one per line, a JSON list, or a JSON object from label to name"
    )
    to: str = Field("", description="where manifest and indexes are written when the tars' folder is read-only")
    name: str = Field("", description="the dataset's name; by default the last part of url")
    threads: int = Field(8, ge=1, le=256, description="tars that are read side by side")
    order: OrderConfig = OrderConfig()
    batch_size: int = Field(256, ge=1, description="global batch that the report on label mixing is about")


class VerifyJob(Config):
    """Which dataset to check, and how thoroughly."""

    url: str = Field("", description="the dataset: the folder of its manifest.json, any fsspec URL")
    allow_elsewhere: bool = Field(
        False, description="read tars from wherever the manifest says, also outside the dataset's folder"
    )
    deep: bool = Field(False, description="decode every image, too")
    threads: int = Field(8, ge=1, le=256, description="shards that are read side by side")
    order: OrderConfig = OrderConfig()
    batch_size: int = Field(256, ge=1, description="global batch that the report on label mixing is about")


def index_presets() -> dict[str, Preset[IndexJob]]:
    """The one starting point of `index`."""
    return {"tars": Preset(IndexJob(), "WebDataset tars made elsewhere")}


def verify_presets() -> dict[str, Preset[VerifyJob]]:
    """The one starting point of `verify`."""
    return {"dataset": Preset(VerifyJob(), "a dataset that was packed or indexed")}
