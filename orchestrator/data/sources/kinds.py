"""Any kind of source: where its images lie, and its listing."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.data.errors import DataError
from orchestrator.data.sources import folder, ilsvrc
from orchestrator.data.sources.config import FolderSource, IlsvrcSource, Source
from orchestrator.data.sources.listing import Listing


def roots(source: Source) -> dict[str, str]:
    """URL of the tar or folder of each split, found in few requests; held-out images lie in that of train.

    Raises DataError when there is nothing to be packed.
    """
    if isinstance(source, FolderSource):
        return folder.roots(source)
    assert isinstance(source, IlsvrcSource), "digits are packed in one piece"
    return ilsvrc.roots(source)


def listed(source: Source, places: Mapping[str, str]) -> Listing:
    """The listing of the images at the places that `roots` found.

    Raises DataError for images or labels that do not fit, StorageError when they cannot be read.
    """
    try:
        if isinstance(source, FolderSource):
            return folder.listed(source, places)
        assert isinstance(source, IlsvrcSource), "digits are packed in one piece"
        return ilsvrc.listed(source, places)
    except FileNotFoundError as error:
        raise DataError(f"source: gone while it was listed: {error}") from None
