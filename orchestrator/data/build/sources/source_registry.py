"""Any kind of source: where its images lie, and its listing."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.data.build.sources import folder, ilsvrc
from orchestrator.data.build.sources.config import FolderSource, IlsvrcSource, Source
from orchestrator.data.build.sources.listing import SourceListing
from orchestrator.data.data_errors import DataError


def find_roots(source: Source) -> dict[str, str]:
    """URL of the tar or folder of each split, found in few requests; held-out images lie in that of train.

    Raises DataError when there is nothing to be packed.
    """
    if isinstance(source, FolderSource):
        return folder.find_roots(source)
    assert isinstance(source, IlsvrcSource), "digits are packed in one piece"
    return ilsvrc.find_roots(source)


def list_images(source: Source, places: Mapping[str, str]) -> SourceListing:
    """The listing of the images at the places that `roots` found.

    Raises DataError for images or labels that do not fit, StorageError when they cannot be read.
    """
    try:
        if isinstance(source, FolderSource):
            return folder.list_images(source, places)
        assert isinstance(source, IlsvrcSource), "digits are packed in one piece"
        return ilsvrc.list_images(source, places)
    except FileNotFoundError as error:
        raise DataError(f"source: gone while it was listed: {error}") from None
