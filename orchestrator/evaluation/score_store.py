"""Stored scores: for each (model, image) the mean probabilities over 1, 10 and 144 crops, per scale, and the maximum.

A part is one shard of the split, committed by a DONE file, so scoring resumes per shard and is never repeated. Rows are
stored in float16, or float32 where a row is too flat for that, and summed in float32. All classes are kept, because
scores of the top classes alone could not be joined exactly.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import multi_crop
from orchestrator.recipe.config import Recipe
from orchestrator.storage import commit, file_io, urls
from orchestrator.storage.commit import CommitError

# float16 of values times 2^15, in the order that float32 had; rows that are too flat for float16 in float32.
FORMAT_VERSION = 3
_KEY_VERSION = 2  # the format that keys name
_FILE = "scores.npz"
_DTYPES = {"ids": np.int64, "labels": np.int64, "rows": np.float16, "exact": np.int64, "exact_rows": np.float32}
# Stored for each image: means over 1, 10 and 144 crops, means over the 36 crops of each of the four scales, and the
# maximum over all, which the paper rejects.
NUM_ROWS = len(multi_crop.CROP_SUBSETS) + len(multi_crop.PAPER_SCALES) + 1

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
    rows: Float32Array  # N x 8 x C, see NUM_ROWS
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
        metadata = {**_describe_shard(folder, shard), "images": self._images, "bad": bad}
        commit.write_folder(_get_shard_url(folder, shard), {_FILE: buffer.getvalue()}, metadata)


def compute_key(weights_digest: str, recipe: Recipe, dataset_digest: str, split: str) -> str:
    """Compute the identity of scores: weights, dataset, geometry, preprocessing, number format."""
    size = recipe.model.image_size
    geometry = {"size": size, "scales": list(multi_crop.compute_scale_sides(size))}
    return compute_fingerprint(
        weights_digest, dataset_digest, split, geometry, recipe.preprocessing, "float16", _KEY_VERSION
    )


def load_shard(folder: str, shard: int) -> Scores:
    """Load the verified scores of one shard.

    Raises FileNotFoundError (not scored) or CommitError (damaged, or the scores of other weights or another shard).
    """
    bad, arrays = _read_shard(folder, shard)
    rows = decode_float16(arrays["rows"])
    rows[tuple(arrays["exact"].T)] = arrays["exact_rows"]
    return Scores(arrays["ids"], arrays["labels"], rows, bad)


def find_problem(folder: str, shard: int, first: int, samples: int, classes: int) -> str | None:
    """Return what is wrong with the stored scores of a shard; None when they are good.

    Good ones are whole, and of exactly the images `first` .. `first + samples - 1` without those counted as bad, and of
    so many classes. Raises FileNotFoundError when there are none.
    """
    try:
        bad, arrays = _read_shard(folder, shard)
    except CommitError as error:
        return str(error)
    ids, labels, shown = arrays["ids"], arrays["labels"], redaction.redact(_get_shard_url(folder, shard))
    inside = ((ids >= first) & (ids < first + samples)).all()
    if not inside or len(np.unique(ids)) < len(ids) or len(ids) + bad != samples:
        return f"{shown}: {len(ids)} images, which are not those {first} .. {first + samples - 1} of the split"
    if arrays["rows"].shape[2] != classes:
        return f"{shown}: of {arrays['rows'].shape[2]} classes, not {classes}"
    wrong = labels[(labels < -1) | (labels >= classes)]
    return f"{shown}: labels must be -1 or 0 .. {classes - 1}, got {wrong[0]}" if len(wrong) else None


@dataclass(frozen=True)
class ShardScores:
    """Scores of each model on the N images of a shard that have a label."""

    ids: NDArray[np.int64]  # N, numbers of the split
    labels: NDArray[np.int64]  # N, 0 .. C - 1
    rows: tuple[Float32Array, ...]  # by model: N x 8 x C, as in `Scores`
    bad_images: int  # that cannot be decoded
    unlabelled: int


def iter_shards(folders: Sequence[str], manifest: Manifest, split: str) -> Iterator[ShardScores]:
    """Yield the scores in `folders`, one of each model, for each shard of the split; `find_problem` found none.

    The next shard is read meanwhile, so two shards of all models are in memory. Raises FileNotFoundError when a shard
    is not scored, CommitError when it is damaged, and DataError when models were scored on different images or labels,
    or no image has a label (at the end).
    """
    shards = manifest.shards(split)
    labelled = 0
    with ThreadPoolExecutor(2) as pool:

        def read(number: int) -> list[Future[Scores]]:
            return [pool.submit(load_shard, folder, number) for folder in folders if number < len(shards)]

        reading = read(0)
        for number, shard in enumerate(shards):
            first, *others = parts = [part.result() for part in reading]
            reading = read(number + 1)
            for part, folder in zip(others, folders[1:], strict=True):
                if not (np.array_equal(part.ids, first.ids) and np.array_equal(part.labels, first.labels)):
                    one, other = redaction.redact(folder), redaction.redact(folders[0])
                    what = f"{shard.name}: was scored on other images or labels than {other}"
                    raise DataError(f"{one}: {what}; delete one of them")
            known = first.labels >= 0
            rows = tuple(part.rows if known.all() else part.rows[known] for part in parts)
            yield ShardScores(first.ids[known], first.labels[known], rows, first.bad_images, int((~known).sum()))
            labelled += int(known.sum())
    if not labelled:
        which = f"{manifest.name}: none of the {manifest.count_samples(split)} images of split {split!r}"
        raise DataError(f"{which} has scores and a label: there are no errors to count")


def _get_shard_url(folder: str, shard: int) -> str:
    return file_io.join(folder, f"shard-{shard:06d}")


def _describe_shard(folder: str, shard: int) -> dict[str, object]:
    return {"format_version": FORMAT_VERSION, "key": urls.get_basename(folder), "shard": shard}


def _read_shard(folder: str, shard: int) -> tuple[int, dict[str, NDArray[Any]]]:
    url = _get_shard_url(folder, shard)
    shown = redaction.redact(url)
    metadata = commit.read_metadata(url)
    for field, value in _describe_shard(folder, shard).items():
        if metadata.get(field) != value:
            raise CommitError(f"{shown}: its {field} is {metadata.get(field)!r}, not {value!r}: it belongs elsewhere")
    payload = commit.read_folder(url)
    try:
        commit.check_zip_uncompressed(payload[_FILE])
        with np.load(io.BytesIO(payload[_FILE]), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _DTYPES}
        consistent = _check_arrays(arrays, metadata)
        bad = int(str(metadata["bad"]))
    except (KeyError, ValueError, TypeError, IndexError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise CommitError(f"{shown}: {_FILE} holds no scores ({error!r})") from None
    if not consistent:
        raise CommitError(f"{shown}: {_FILE} holds arrays that do not fit each other")
    return bad, arrays


def _check_arrays(arrays: dict[str, NDArray[Any]], metadata: dict[str, object]) -> bool:
    ids, labels, rows, places, values = (arrays[name] for name in _DTYPES)
    return (
        all(arrays[name].dtype == dtype for name, dtype in _DTYPES.items())
        and ids.shape == labels.shape == rows.shape[:1] == (metadata["images"],)
        and rows.shape[1] == NUM_ROWS
        and places.shape == (len(values), 2)
        and values.shape[1:] == rows.shape[2:]
        and bool(((places >= 0) & (places < rows.shape[:2])).all())
    )


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
