"""Stored scores: for each (model, image) the mean probabilities over 1, 10 and 144 crops, per scale, and the maximum.

A part is one shard of the split, committed by a DONE file, so scoring resumes per shard and a model that was scored is
never scored again. float16 stored (evaluation.half says what that loses), but float32 where a row is too flat for that;
float32 summed, all classes (a top-k could not be joined exactly).
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.config.fingerprint import compute_fingerprint
from orchestrator.data.transforms import multi_crop
from orchestrator.recipe.config import Recipe
from orchestrator.storage import commit, file_io
from orchestrator.storage.commit import CommitError

# 2: times 2^15, in the order that float32 had. 3: rows that are too flat for float16 in float32.
FORMAT_VERSION = 3
# The format that keys name. Parts of format 2 stay readable under the same key, but for those with flat rows.
_KEY_VERSION = 2
# What the probabilities of a row of format 2 may sum to, more or less than 1.
_MAX_SUM_ERROR = 2e-3
_FILE = "scores.npz"
_NUM_MEANS, _NUM_SCALES = len(multi_crop.CROP_SUBSETS), len(multi_crop.PAPER_SCALES)
# Stored for each image: means over 1, 10 and 144 crops, over each of the four scales, and the maximum.
NUM_ROWS = _NUM_MEANS + _NUM_SCALES + 1

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one shard: N images, C classes."""

    ids: NDArray[np.int64]  # N, whole numbers of the split in the manifest's order
    labels: NDArray[np.int64]  # N, -1 for an image without a label
    means: dict[int, Float32Array]  # by number of crops (1, 10, 144), each N x C
    per_scale: Float32Array  # N x 4 x C, mean over the 36 crops of each scale
    maximum: Float32Array  # N x C, maximum over the 144 crops: the paper's rejected variant
    bad_images: int  # images of the shard that could not be decoded, and so are in none of the arrays


class ShardScoreWriter:
    """Scores of one model on one shard as they come, in the 16 bytes a class and image that they are stored in.

    Rows that are too flat for float16 take four bytes a class more.
    """

    def __init__(self, most: int, classes: int) -> None:
        self._ids = np.empty(most, dtype=np.int64)
        self._labels = np.empty(most, dtype=np.int64)
        self._rows = np.empty((most, NUM_ROWS, classes), dtype=np.float16)
        self._exact: list[tuple[NDArray[np.int64], Float32Array]] = []  # image and row of each, and its values
        self._images = 0

    def add(self, ids: NDArray[np.int64], labels: NDArray[np.int64], rows: Float32Array) -> None:
        """Take N more images: ids, labels, and N x 8 x C rows. Raises ValueError for what are no probabilities."""
        here = slice(self._images, self._images + len(ids))
        stored = encode_float16(rows)
        self._rows[here] = stored
        flat = np.argwhere(~check_precision(rows, stored))
        if len(flat):
            self._exact.append((flat + np.array([self._images, 0]), rows[flat[:, 0], flat[:, 1]]))
        self._ids[here], self._labels[here] = ids, labels
        self._images = here.stop

    def save(self, where: str, shard: int, bad: int) -> None:
        """Commit what was taken as the scores of a shard, `bad` images of which could not be decoded."""
        taken = slice(0, self._images)
        buffer = io.BytesIO()
        where_exact = np.concatenate([np.empty((0, 2), dtype=np.int64), *(places for places, _ in self._exact)])
        no_values = np.empty((0, self._rows.shape[2]), dtype=np.float32)
        values = np.concatenate([no_values, *(rows for _, rows in self._exact)])
        np.savez(
            buffer, ids=self._ids[taken], labels=self._labels[taken], rows=self._rows[taken], exact=where_exact,
            exact_rows=values,
        )  # fmt: skip
        about = {
            "format_version": FORMAT_VERSION,
            "key": _parse_key(where),
            "shard": shard,
            "images": self._images,
            "bad": bad,
        }
        commit.write_folder(_get_shard_url(where, shard), {_FILE: buffer.getvalue()}, about)


def compute_key(weights_digest: str, recipe: Recipe, dataset_digest: str, split: str) -> str:
    """What identifies scores: weights, dataset, geometry, preprocessing, number format."""
    geometry = {
        "size": recipe.model.image_size,
        "scales": list(multi_crop.compute_scale_sides(recipe.model.image_size)),
    }
    return compute_fingerprint(
        weights_digest, dataset_digest, split, geometry, recipe.preprocessing, "float16", _KEY_VERSION
    )


def get_folder(run_folder: str, score_key: str) -> str:
    """Where the scores of a run lie."""
    return file_io.join(run_folder, "scores", score_key)


def list_scored_shards(where: str) -> set[int]:
    """Shards whose scores are committed; whether they are good, `load` and `problem` tell."""
    return {
        int(name.removeprefix("shard-"))
        for name in file_io.list_names(where)
        if name.startswith("shard-") and commit.is_complete(file_io.join(where, name))
    }


def save_shard(where: str, shard: int, scores: Scores) -> None:
    """Commit the scores of one shard. Raises ValueError for scores that are no probabilities."""
    part = ShardScoreWriter(len(scores.ids), scores.maximum.shape[-1])
    means = [scores.means[count][:, None] for count in multi_crop.CROP_SUBSETS]
    part.add(scores.ids, scores.labels, np.concatenate((*means, scores.per_scale, scores.maximum[:, None]), axis=1))
    part.save(where, shard, scores.bad_images)


def load_shard(where: str, shard: int) -> Scores:
    """The verified scores of one shard.

    Raises FileNotFoundError (not scored) or storage.commit.CommitError (damaged, or the scores of other weights or of
    another shard).
    """
    about, arrays = _read_shard(where, shard)
    ids, labels, values = arrays["ids"], arrays["labels"], decode_float16(arrays["rows"])
    if "exact" in arrays:
        images, rows = arrays["exact"].T
        values[images, rows] = arrays["exact_rows"]
    return Scores(
        ids=ids,
        labels=labels,
        means={count: values[:, row] for row, count in enumerate(multi_crop.CROP_SUBSETS)},
        per_scale=values[:, _NUM_MEANS : _NUM_MEANS + _NUM_SCALES],
        maximum=values[:, -1],
        bad_images=int(str(about["bad"])),
    )


def find_problem(where: str, shard: int, first: int, samples: int, classes: int) -> str | None:
    """What is wrong with the stored scores of a shard; None when they are good.

    They must be whole, and of exactly the images `first` .. `first + samples - 1` but those counted as bad, and of so
    many classes. Raises FileNotFoundError when there are none.
    """
    try:
        about, arrays = _read_shard(where, shard)
    except CommitError as error:
        return str(error)
    ids, rows = arrays["ids"], arrays["rows"]
    shown = redaction.redact(_get_shard_url(where, shard))
    inside = (ids >= first) & (ids < first + samples)
    if not inside.all() or len(np.unique(ids)) != len(ids) or len(ids) + int(str(about["bad"])) != samples:
        return f"{shown}: {len(ids)} images, which are not those {first} .. {first + samples - 1} of the split"
    if rows.shape[2] != classes:
        return f"{shown}: of {rows.shape[2]} classes, not {classes}"
    return None


def _get_shard_url(where: str, shard: int) -> str:
    return file_io.join(where, f"shard-{shard:06d}")


def _parse_key(where: str) -> str:
    """The last part of a folder's URL, which is the key of its scores."""
    return where.rstrip("/").rpartition("/")[2]


def _read_shard(where: str, shard: int) -> tuple[dict[str, object], dict[str, NDArray[Any]]]:
    """Return what a part says of itself, and its arrays. Raises as `load` does."""
    part = _get_shard_url(where, shard)
    shown = redaction.redact(part)
    about = commit.read_metadata(part)
    version = about.get("format_version")
    readable = version if version in (2, FORMAT_VERSION) else FORMAT_VERSION
    wanted = {"format_version": readable, "key": _parse_key(where), "shard": shard}
    for field, value in wanted.items():
        if about.get(field) != value:
            raise CommitError(f"{shown}: its {field} is {about.get(field)!r}, not {value!r}: it belongs elsewhere")
    payload = commit.read_folder(part)
    names = ("ids", "labels", "rows") if version == 2 else ("ids", "labels", "rows", "exact", "exact_rows")
    try:
        commit.check_zip_uncompressed(payload[_FILE])
        with np.load(io.BytesIO(payload[_FILE]), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in names}
        fits = _check_shapes(arrays, about)
        int(str(about["bad"]))
    except (KeyError, ValueError, TypeError, IndexError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise CommitError(f"{shown}: {_FILE} holds no scores ({error!r})") from None
    if not fits:
        raise CommitError(f"{shown}: {_FILE} holds arrays that do not fit each other")
    if version == 2 and _has_flat_rows(arrays["rows"]):
        raise CommitError(f"{shown}: holds nearly flat scores, which format 2 rounds wrongly; score them again")
    return about, arrays


def _check_shapes(arrays: dict[str, NDArray[Any]], about: dict[str, object]) -> bool:
    ids, labels, rows = arrays["ids"], arrays["labels"], arrays["rows"]
    if not (ids.shape == labels.shape == rows.shape[:1] == (about["images"],) and rows.shape[1] == NUM_ROWS):
        return False
    if "exact" not in arrays:
        return True
    exact, values = arrays["exact"], arrays["exact_rows"]
    shapes = exact.shape == (len(values), 2) and values.shape[1:] == rows.shape[2:]
    return shapes and bool(((exact >= 0) & (exact < rows.shape[:2])).all())


def _has_flat_rows(rows: NDArray[np.float16]) -> bool:
    """Return whether a row of means, which sum to 1, was pushed up where format 2 kept too many values apart."""
    sums = decode_float16(rows[:, :-1]).sum(axis=-1)
    return bool((np.abs(sums - 1) > _MAX_SUM_ERROR).any())


Float16Array = NDArray[np.float16]
ScoreArray = NDArray[np.float32]

# float16 ends at 65,504: the largest power of two that leaves room for 1.0 and the steps above it.
_FLOAT16_SCALE = np.float32(2**15)
MAX_RELATIVE_ERROR = np.float32(2**-10)  # of a value, or a row's sum, relative
MIN_FULL_PRECISION = np.float32(2**-29)  # full precision ends here
NUM_LEADING_SCORES = 10  # values of a row that decide who is first, alone or in a sum


def encode_float16(values: ScoreArray) -> Float16Array:
    """... x C values in 0 .. 1 as they are stored. Raises ValueError for any that is none."""
    if not (values.size == 0 or (values.min() >= 0 and values.max() <= 1.001)):  # NaN fails, too
        raise ValueError("scores are probabilities in 0 .. 1; these hold other numbers, or what is no number")
    stored: Float16Array = (values * _FLOAT16_SCALE).astype(np.float16)
    order = np.argsort(values, axis=-1)
    ranked = np.take_along_axis(values, order, axis=-1)
    # Bits of floats that are not negative, read as whole numbers, are in the same order, and neighbours differ by 1.
    bits = np.take_along_axis(stored, order, axis=-1).view(np.uint16).astype(np.int32)
    steps = np.zeros(bits.shape, dtype=np.int32)
    np.cumsum(ranked[..., 1:] > ranked[..., :-1], axis=-1, out=steps[..., 1:])
    bits = np.maximum.accumulate(bits - steps, axis=-1) + steps
    np.put_along_axis(stored, order, bits.astype(np.uint16).view(np.float16), axis=-1)
    return stored


def decode_float16(stored: Float16Array) -> ScoreArray:
    """The float32 values of what is stored."""
    values = stored.astype(np.float32)
    values /= _FLOAT16_SCALE
    return values


def check_precision(values: ScoreArray, stored: Float16Array) -> NDArray[np.bool_]:
    """Return which of the rows are near enough as they are stored: their sums, and each of their ten largest values.

    A plain cast is off by half of LARGEST_ERROR at most.
    """
    back = decode_float16(stored)
    sums = np.abs(back.sum(axis=-1) - values.sum(axis=-1)) <= MAX_RELATIVE_ERROR * values.sum(axis=-1)
    first = max(0, values.shape[-1] - NUM_LEADING_SCORES)
    leading = np.argpartition(values, first, axis=-1)[..., first:]
    exact, found = np.take_along_axis(values, leading, axis=-1), np.take_along_axis(back, leading, axis=-1)
    near = np.abs(found - exact) <= MAX_RELATIVE_ERROR * exact + MIN_FULL_PRECISION
    return np.asarray(sums & near.all(axis=-1))
