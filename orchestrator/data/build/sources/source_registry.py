"""Sources by name: those that list images which are then read in any order, and those that yield samples in turn.

A source of one's own is a class or function, named `package.module:attribute`, that returns a SampleSource.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from orchestrator.config.plugins import create_plugin, register
from orchestrator.data.build.sources import digits, folder, ilsvrc
from orchestrator.data.build.sources.config import FolderSource, IlsvrcSource, PluginSource, Source
from orchestrator.data.build.sources.listing import SourceListing
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.data_errors import DataError


@runtime_checkable
class SampleSource(Protocol):
    """Samples that are generated or read one after the other; all are packed in one process."""

    classes: Sequence[str]  # names in label order
    splits: Sequence[str]  # "train" and, unless there is none, "validation"

    def iter_samples(self, split: str) -> Iterable[RawSample]:
        """Yield the samples of a split, the same ones in the same order at each call."""


class ListedSource:
    """Images of a folder or of ILSVRC, by their listing."""

    def __init__(self, config: FolderSource | IlsvrcSource) -> None:
        self._config = config

    def find_roots(self) -> dict[str, str]:
        """Return the URL of the tar or folder of each split; held-out images lie in that of train.

        Raises DataError when there is nothing to be packed.
        """
        if isinstance(self._config, FolderSource):
            return folder.find_roots(self._config)
        return ilsvrc.find_roots(self._config)

    def list_images(self, roots: Mapping[str, str]) -> SourceListing:
        """Return the listing of the images at these places.

        Raises DataError for images or labels that do not fit, StorageError when they cannot be read.
        """
        try:
            if isinstance(self._config, FolderSource):
                return folder.list_images(self._config, roots)
            return ilsvrc.list_images(self._config, roots)
        except FileNotFoundError as error:
            raise DataError(f"source: removed while it was listed: {error}") from None


register("source", "folder")(lambda **fields: ListedSource(FolderSource(**fields)))
register("source", "ilsvrc")(lambda **fields: ListedSource(IlsvrcSource(**fields)))
register("source", "digits")(digits.Digits)


def create_source(config: Source) -> ListedSource | SampleSource:
    """Return the source of a config. Raises ConfigError when a plug-in cannot be loaded, DataError when it is none."""
    kind: str = config.kind
    args = config.to_dict()
    del args["kind"]
    if isinstance(config, PluginSource):
        kind, args = config.plugin, config.args
    source = create_plugin("source", kind, args)
    if isinstance(source, ListedSource | SampleSource):
        return source
    raise DataError(
        f"source.plugin: {kind!r} must return an object with classes, splits and iter_samples(split), got "
        f"{type(source).__name__}"
    )
