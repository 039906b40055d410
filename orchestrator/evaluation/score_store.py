"""Stored scores: for each (model, image) the mean probabilities over 1, 10 and 144 crops, per scale, and the maximum.

A part is one shard of the split, committed by a DONE file, so scoring resumes per shard and is never repeated. Rows are
stored in float16, or float32 where a row is too flat for that, and summed in float32. All classes are kept, because
scores of the top classes alone could not be joined exactly.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.data.transforms import multi_crop
from orchestrator.recipe.config import Recipe
from orchestrator.storage import commit, file_io
from orchestrator.storage.commit import CommitError

# 2: float16 of values times 2^15, in the order that float32 had. 3: rows that are too flat for float16 in float32.
FORMAT_VERSION = 3
# The format that keys name. Parts of format 2 stay readable under the same key, except those with flat rows.
_KEY_VERSION = 2
_MAX_SUM_ERROR = 2e-3  # of the probabilities of a row of format 2, absolute
_FILE = "scores.npz"
_NUM_MEANS, _NUM_SCALES = len(multi_crop.CROP_SUBSETS), len(multi_crop.PAPER_SCALES)
# Stored for each image: means over 1, 10 and 144 crops, over each of the four scales, and the maximum.
NUM_ROWS = _NUM_MEANS + _NUM_SCALES + 1

# float16 ends at 65,504: this is the largest power of two that leaves room for 1.0 and the steps above it.
_FLOAT16_SCALE = np.float32(2**15)
MAX_RELATIVE_ERROR = np.float32(2**-10)  # of a value, or a row's sum
MIN_FULL_PRECISION = np.float32(2**-29)  # full precision ends here
NUM_LEADING_SCORES = 10  # values of a row that decide which class is first, alone or in a sum

Float16Array = NDArray[np.float16]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one shard: N images, C classes."""

    ids: NDArray[np.int64]  # N, numbers of the split in the manifest's order
    labels: NDArray[np.int64]  # N, -1 for an image without a label
    means: dict[int, Float32Array]  # by number of crops (1, 10, 144), each N x C
    per_scale: Float32Array  # N x 4 x C, mean over the 36 crops of each scale
    maximum: Float32Array  # N x C, maximum over the 144 crops: the paper's rejected variant
    bad_images: int  # images of the shard that cannot be decoded, and so are in none of the arrays


class ShardScoreWriter:
    """Collects the scores of one model on one shard, in the 16 bytes a class and image that are stored.

    Rows that are too flat for float16 take four bytes a class more.
    """

    def __init__(self, capacity: int, classes: int) -> None:
        """capacity: the most images."""
        self._ids = np.empty(capacity, dtype=np.int64)
        self._labels = np.empty(capacity, dtype=np.int64)
        self._rows = np.empty((capacity, NUM_ROWS, classes), dtype=np.float16)
        self._exact_places = [np.empty((0, 2), dtype=np.int64)]  # image and row of each flat row
        self._exact_rows = [np.empty((0, classes), dtype=np.float32)]
        self._images = 0

    def add(self, ids: NDArray[np.int64], labels: NDArray[np.int64], rows: Float32Array) -> None:
        """Take N more images: ids, labels, and N x 8 x C rows. Raises ValueError for rows that are no probabilities."""
        added = slice(self._images, self._images + len(ids))
        encoded = encode_float16(rows)
        flat = np.argwhere(~check_precision(rows, encoded))
        self._exact_places.append(flat + np.array([self._images, 0]))
        self._exact_rows.append(rows[flat[:, 0], flat[:, 1]])
        self._ids[added], self._labels[added], self._rows[added] = ids, labels, encoded
        self._images = added.stop

    def save(self, folder: str, shard: int, bad: int) -> None:
        """Commit the scores as those of a shard, `bad` images of which could not be decoded."""
        taken = slice(0, self._images)
        buffer = io.BytesIO()
        np.savez(
            buffer, ids=self._ids[taken], labels=self._labels[taken], rows=self._rows[taken],
            exact=np.concatenate(self._exact_places), exact_rows=np.concatenate(self._exact_rows),
        )  # fmt: skip
        metadata = {
            "format_version": FORMAT_VERSION,
            "key": _parse_key(folder),
            "shard": shard,
            "images": self._images,
            "bad": bad,
        }
        commit.write_folder(_get_shard_url(folder, shard), {_FILE: buffer.getvalue()}, metadata)


def compute_key(weights_digest: str, recipe: Recipe, dataset_digest: str, split: str) -> str:
    """Compute the identity of scores: weights, dataset, geometry, preprocessing, number format."""
    size = recipe.model.image_size
    geometry = {"size": size, "scales": list(multi_crop.compute_scale_sides(size))}
    return compute_fingerprint(
        weights_digest, dataset_digest, split, geometry, recipe.preprocessing, "float16", _KEY_VERSION
    )


def get_folder(run_folder: str, score_key: str) -> str:
    """Return the folder of a run's scores."""
    return file_io.join(run_folder, "scores", score_key)


def list_scored_shards(folder: str) -> set[int]:
    """List the shards whose scores are committed, not verified."""
    return {
        int(name.removeprefix("shard-"))
        for name in file_io.list_names(folder)
        if name.startswith("shard-") and commit.is_complete(file_io.join(folder, name))
    }


def load_shard(folder: str, shard: int) -> Scores:
    """Load the verified scores of one shard.

    Raises FileNotFoundError (not scored) or CommitError (damaged, or the scores of other weights or another shard).
    """
    bad, arrays = _read_shard(folder, shard)
    rows = decode_float16(arrays["rows"])
    if "exact" in arrays:
        rows[tuple(arrays["exact"].T)] = arrays["exact_rows"]
    return Scores(
        ids=arrays["ids"],
        labels=arrays["labels"],
        means={count: rows[:, number] for number, count in enumerate(multi_crop.CROP_SUBSETS)},
        per_scale=rows[:, _NUM_MEANS : _NUM_MEANS + _NUM_SCALES],
        maximum=rows[:, -1],
        bad_images=bad,
    )


def find_problem(folder: str, shard: int, first: int, samples: int, classes: int) -> str | None:
    """Return what is wrong with the stored scores of a shard; None when they are good.

    Good ones are whole, and of exactly the images `first` .. `first + samples - 1` without those counted as bad, and of
    so many classes. Raises FileNotFoundError when there are none.
    """
    try:
        bad, arrays = _read_shard(folder, shard)
    except CommitError as error:
        return str(error)
    ids, rows = arrays["ids"], arrays["rows"]
    shown = redaction.redact(_get_shard_url(folder, shard))
    if not covers_images(ids, bad, first, samples):
        return f"{shown}: {len(ids)} images, which are not those {first} .. {first + samples - 1} of the split"
    if rows.shape[2] != classes:
        return f"{shown}: of {rows.shape[2]} classes, not {classes}"
    return None


def covers_images(ids: NDArray[np.int64], bad: int, first: int, samples: int) -> bool:
    """Return whether `ids`, with `bad` more, are the images `first` .. `first + samples - 1`."""
    inside = bool(((ids >= first) & (ids < first + samples)).all())
    return inside and len(np.unique(ids)) == len(ids) and len(ids) + bad == samples


def _get_shard_url(folder: str, shard: int) -> str:
    return file_io.join(folder, f"shard-{shard:06d}")


def _parse_key(folder: str) -> str:
    """Return the last part of a folder's URL, which is the key of its scores."""
    return folder.rstrip("/").rpartition("/")[2]


def _read_shard(folder: str, shard: int) -> tuple[int, dict[str, NDArray[Any]]]:
    """Return a part's number of bad images, and its arrays. Raises as `load_shard` does."""
    url = _get_shard_url(folder, shard)
    shown = redaction.redact(url)
    metadata = commit.read_metadata(url)
    version = metadata.get("format_version")
    expected = {"format_version": 2 if version == 2 else FORMAT_VERSION, "key": _parse_key(folder), "shard": shard}
    for field, value in expected.items():
        if metadata.get(field) != value:
            raise CommitError(f"{shown}: its {field} is {metadata.get(field)!r}, not {value!r}: it belongs elsewhere")
    payload = commit.read_folder(url)
    names = ("ids", "labels", "rows") if version == 2 else ("ids", "labels", "rows", "exact", "exact_rows")
    try:
        commit.check_zip_uncompressed(payload[_FILE])
        with np.load(io.BytesIO(payload[_FILE]), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in names}
        consistent = _check_shapes(arrays, metadata)
        bad = int(str(metadata["bad"]))
    except (KeyError, ValueError, TypeError, IndexError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise CommitError(f"{shown}: {_FILE} holds no scores ({error!r})") from None
    if not consistent:
        raise CommitError(f"{shown}: {_FILE} holds arrays that do not fit each other")
    if version == 2 and _has_flat_rows(arrays["rows"]):
        raise CommitError(f"{shown}: holds nearly flat scores, which format 2 rounds wrongly; score them again")
    return bad, arrays


def _check_shapes(arrays: dict[str, NDArray[Any]], metadata: dict[str, object]) -> bool:
    ids, labels, rows = arrays["ids"], arrays["labels"], arrays["rows"]
    if not (ids.shape == labels.shape == rows.shape[:1] == (metadata["images"],) and rows.shape[1] == NUM_ROWS):
        return False
    if "exact" not in arrays:
        return True
    places, values = arrays["exact"], arrays["exact_rows"]
    shapes = places.shape == (len(values), 2) and values.shape[1:] == rows.shape[2:]
    return shapes and bool(((places >= 0) & (places < rows.shape[:2])).all())


def _has_flat_rows(rows: Float16Array) -> bool:
    """Return whether a row of means, which sum to 1, is too large: format 2 kept too many of its values apart."""
    sums = decode_float16(rows[:, :-1]).sum(axis=-1)
    return bool((np.abs(sums - 1) > _MAX_SUM_ERROR).any())


def encode_float16(values: Float32Array) -> Float16Array:
    """Encode ... x C values in 0 .. 1 so that distinct values stay distinct and in order.

    Raises ValueError for other values.
    """
    if not (values.size == 0 or (values.min() >= 0 and values.max() <= 1.001)):  # NaN fails, too
        raise ValueError("scores must be probabilities in 0 .. 1, got other or non-finite values")
    stored: Float16Array = (values * _FLOAT16_SCALE).astype(np.float16)
    order = np.argsort(values, axis=-1)
    ranked = np.take_along_axis(values, order, axis=-1)
    # The bits of non-negative floats, read as integers, have the same order, and neighbours differ by 1.
    bits = np.take_along_axis(stored, order, axis=-1).view(np.uint16).astype(np.int32)
    steps = np.zeros(bits.shape, dtype=np.int32)
    np.cumsum(ranked[..., 1:] > ranked[..., :-1], axis=-1, out=steps[..., 1:])
    bits = np.maximum.accumulate(bits - steps, axis=-1) + steps
    np.put_along_axis(stored, order, bits.astype(np.uint16).view(np.float16), axis=-1)
    return stored


def decode_float16(stored: Float16Array) -> Float32Array:
    """Decode to float32."""
    values = stored.astype(np.float32)
    values /= _FLOAT16_SCALE
    return values


def check_precision(values: Float32Array, encoded: Float16Array) -> NDArray[np.bool_]:
    """Return which rows are accurate enough as encoded: their sums, and each of their ten largest values.

    A plain cast is off by at most half of MAX_RELATIVE_ERROR.
    """
    decoded = decode_float16(encoded)
    sums = np.abs(decoded.sum(axis=-1) - values.sum(axis=-1)) <= MAX_RELATIVE_ERROR * values.sum(axis=-1)
    first = max(0, values.shape[-1] - NUM_LEADING_SCORES)
    leading = np.argpartition(values, first, axis=-1)[..., first:]
    exact, near_exact = (np.take_along_axis(array, leading, axis=-1) for array in (values, decoded))
    near = np.abs(near_exact - exact) <= MAX_RELATIVE_ERROR * exact + MIN_FULL_PRECISION
    return np.asarray(sums & near.all(axis=-1))
