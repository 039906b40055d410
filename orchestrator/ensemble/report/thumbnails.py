"""Thumbnails of images of a split, for the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import decode
from orchestrator.data.transforms.decode import Image
from orchestrator.storage.file_io import StorageError

_log = logging.getLogger(__name__)

MAX_THUMBNAILS = 24
MAX_SIDE = 224  # pixels; smaller images are enlarged to about half of it, so that their pixels are visible
JPEG_QUALITY = 85


def make_thumbnails(data_url: str, manifest: Manifest, split: str, numbers: Sequence[int]) -> dict[int, bytes]:
    """Return JPEGs of the samples with these numbers in the split, of the first MAX_THUMBNAILS, by number.

    Images that cannot be decoded are left out. The first one that cannot be read ends the work with a warning, because
    pictures must not cost a result. Raises DataError when the split has no such sample.
    """
    ends = np.cumsum([shard.samples for shard in manifest.shards(split)])
    total = int(ends[-1]) if len(ends) else 0
    chosen = list(dict.fromkeys(numbers))[:MAX_THUMBNAILS]
    if wrong := [number for number in chosen if not 0 <= number < total]:
        raise DataError(f"{manifest.name}: split {split!r} has no sample {wrong[0]}; it has {total:,}, from 0")
    thumbnails: dict[int, bytes] = {}
    reader = SampleReader(data_url, manifest, split)
    try:
        for number in chosen:
            shard = int(np.searchsorted(ends, number, side="right"))
            first = int(ends[shard]) - manifest.shards(split)[shard].samples
            try:
                thumbnails[number] = _encode_thumbnail(decode.decode_image(reader.read(shard, number - first).image))
            except BadSampleError:
                continue
    except (DataError, StorageError) as error:
        _log.warning("pictures: %d of %d cannot be shown: %s", len(chosen) - len(thumbnails), len(chosen), error)
    finally:
        reader.close()
    return thumbnails


def _encode_thumbnail(image: Image) -> bytes:
    """Return a JPEG whose longer side is at most MAX_SIDE."""
    height, width = image.shape[:2]
    longer = max(height, width)
    if longer > MAX_SIDE:
        share = MAX_SIDE / longer
        size = (max(1, round(width * share)), max(1, round(height * share)))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    elif (times := MAX_SIDE // (2 * longer)) > 1:
        image = np.repeat(np.repeat(image, times, axis=0), times, axis=1)
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY)
    return encoded
