"""Manifest of a dataset, manifest.json, shard by shard. It is written last, so a dataset with one is complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Literal
from urllib.parse import unquote

from pydantic import Field, ValidationError, field_validator

from orchestrator.config import redaction
from orchestrator.config.base import Config, compute_fingerprint
from orchestrator.config.errors import convert_validation_error
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io, urls

FORMAT_VERSION: Literal[2] = 2
FILE_NAME = "manifest.json"
# Key in `made` of a dataset with transparent images: the name of the colour that they are laid on.
BACKGROUND_KEY = "background"
# Sums over 100,000 shards of such numbers still fit into 64 bits.
MAX_SAMPLES = 2**40
MAX_BYTES = 2**46


class Shard(Config):
    """One WebDataset tar and its index, both relative to the manifest."""

    name: str = Field(description="path of the tar below the dataset's folder")
    samples: int = Field(ge=0, le=MAX_SAMPLES)
    bytes: int = Field(ge=0, le=MAX_BYTES)
    sha256: str = Field(description="of the tar")
    index_sha256: str = Field(description="of the index file, NAME.index.json")


class Manifest(Config):
    """A dataset: class names in label order, and the shards of each split."""

    format_version: Literal[2] = FORMAT_VERSION
    name: str
    classes: tuple[str, ...] = Field(min_length=2)
    titles: tuple[str, ...] = Field((), description="a readable name of each class; empty when there is none")
    tars: str = Field("", description="URL of the folder of the tars, when it is not the manifest's own")
    made: dict[str, str | int | float | bool] = Field({}, description="how it was packed or adopted; never a time")
    splits: dict[str, tuple[Shard, ...]]

    @field_validator("splits")
    @classmethod
    def _check_shard_names(cls, splits: dict[str, tuple[Shard, ...]]) -> dict[str, tuple[Shard, ...]]:
        for name in (shard.name for shards in splits.values() for shard in shards):
            if not name or name.startswith("/") or "://" in name or _is_unsafe(name):
                raise ValueError(f"shard must be a path below the dataset's folder, got {name!r}")
        return splits

    @field_validator("tars")
    @classmethod
    def _check_tars(cls, tars: str) -> str:
        if tars and (_is_unsafe(tars) or not (tars.startswith("/") or re.match("[A-Za-z][A-Za-z0-9+.-]+://", tars))):
            raise ValueError(f"must be an absolute path or a URL without '..', got {tars!r}")
        return tars

    def digest(self) -> str:
        """Return a short hash of classes and shards: the dataset's identity, wherever it lies and however it was made.

        What transparent images are laid on is part of it where there are any: it decides on their pixels.
        """
        sums = {}
        for split, shards in self.splits.items():
            total = hashlib.sha256()  # shard after shard: as JSON in one piece they would take much memory
            for shard in shards:
                values = [shard.name, shard.samples, shard.bytes, shard.sha256, shard.index_sha256]
                total.update(json.dumps(values).encode())
            sums[split] = total.hexdigest()
        background = [self.made[BACKGROUND_KEY]] if BACKGROUND_KEY in self.made else []
        return compute_fingerprint(self.format_version, self.classes, sums, *background, length=16)

    def tar_url(self, url: str, shard: Shard) -> str:
        """Return the URL of a shard's tar, of the dataset whose manifest lies at `url`."""
        return file_io.join(self.tars or url, shard.name)

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Return the shards of a split. Raises DataError when the dataset has no such split."""
        if split not in self.splits:
            raise DataError(f"{self.name}: no split {split!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[split]

    def count_samples(self, split: str) -> int:
        """Return the number of samples of a split."""
        return sum(shard.samples for shard in self.shards(split))


def load(url: str, *, allow_elsewhere: bool = False, field: str = "data") -> Manifest:
    """Load the manifest of the dataset at `url`, which the command line has in `field`.

    A manifest names the place of its tars, so its author could make every node read any of its files or ask any host
    that it reaches. Tars that do not lie below `url` therefore need `allow_elsewhere`. Raises DataError
    for such tars, and for a manifest that is missing, damaged or of another version.
    """
    where, folder = file_io.join(url, FILE_NAME), redaction.redact(url)
    label = f"{field}: {redaction.redact(where)}"
    try:
        data = file_io.read_bytes(where)
    except FileNotFoundError:
        raise DataError(
            f"{label}: no manifest there: {folder} is no packed dataset, or its packing did not finish"
        ) from None
    try:
        # Straight from the bytes: 100,000 shards would take half as much memory again as Python's own objects.
        manifest = Manifest.model_validate_json(data)
        problem = "" if "format_version" in manifest.model_fields_set else "format_version: needed"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        is_json = first["type"] != "json_invalid"
        problem = str(convert_validation_error(error, Manifest)) if is_json else first["msg"]
    if problem:
        raise DataError(f"{label}: damaged, or of another version: {problem}; pack the dataset again")
    if not allow_elsewhere and is_outside(manifest.tars, url):
        raise DataError(
            f"{label}: its tars must lie below {folder}, got {redaction.redact(manifest.tars)}; set --allow-elsewhere "
            "if the manifest may have them read from there"
        )
    return manifest


def is_outside(tars: str, url: str) -> bool:
    """Return whether a manifest's `tars` lie outside the folder `url`: in another store, or not below its path.

    Local paths are compared without their symbolic links. Spellings of one remote place that differ count as two.
    """
    if not tars:
        return False
    if urls.get_scheme(tars).startswith("http") and re.search("[?#]", tars):
        return True  # a name joined to it would not be a path
    at, base = tars, url
    if urls.is_local(tars) and urls.is_local(url):
        at, base = (os.path.realpath(urls.to_local_path(place)) for place in (tars, url))
    return not f"{at.rstrip('/')}/".startswith(f"{base.rstrip('/')}/")


def _is_unsafe(place: str) -> bool:
    """Return whether a path has a ".." segment, also one that a web server would decode to it, or odd characters."""
    return ".." in re.split(r"[/\\]", unquote(place)) or re.search(r"[\x00-\x1f\x7f]", place) is not None


def save(url: str, manifest: Manifest) -> None:
    """Write the manifest, which declares the dataset complete."""
    file_io.write_bytes(file_io.join(url, FILE_NAME), (manifest.to_json() + "\n").encode())
