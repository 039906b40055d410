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

from orchestrator.config.fingerprint import fingerprint
from orchestrator.data import crops
from orchestrator.evaluation import half
from orchestrator.recipe.config import Recipe
from orchestrator.storage import archives, commit, files, urls
from orchestrator.storage.commit import CommitError

# 2: times 2^15, in the order that float32 had. 3: rows that are too flat for float16 in float32.
FORMAT_VERSION = 3
# The format that keys name. Parts of format 2 stay readable under the same key, but for those with flat rows.
_KEY_VERSION = 2
# What the probabilities of a row of format 2 may sum to, more or less than 1.
_FLAT = 2e-3
_FILE = "scores.npz"
_MEANS, _SCALES = len(crops.SUBSETS), len(crops.PAPER_SCALES)
# Stored for each image: means over 1, 10 and 144 crops, over each of the four scales, and the maximum.
ROWS = _MEANS + _SCALES + 1

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one shard: N images, C classes."""

    ids: NDArray[np.int64]  # N, whole numbers of the split in the manifest's order
    labels: NDArray[np.int64]  # N, -1 for an image without a label
    means: dict[int, Floats]  # by number of crops (1, 10, 144), each N x C
    per_scale: Floats  # N x 4 x C, mean over the 36 crops of each scale
    maximum: Floats  # N x C, maximum over the 144 crops: the paper's rejected variant
    bad: int  # images of the shard that could not be decoded, and so are in none of the arrays


class Part:
    """Scores of one model on one shard as they come, in the 16 bytes a class and image that they are stored in.

    Rows that are too flat for float16 take four bytes a class more.
    """

    def __init__(self, most: int, classes: int) -> None:
        self._ids = np.empty(most, dtype=np.int64)
        self._labels = np.empty(most, dtype=np.int64)
        self._rows = np.empty((most, ROWS, classes), dtype=np.float16)
        self._exact: list[tuple[NDArray[np.int64], Floats]] = []  # image and row of each, and its values
        self._images = 0

    def add(self, ids: NDArray[np.int64], labels: NDArray[np.int64], rows: Floats) -> None:
        """Take N more images: ids, labels, and N x 8 x C rows. Raises ValueError for what are no probabilities."""
        here = slice(self._images, self._images + len(ids))
        stored = half.encoded(rows)
        self._rows[here] = stored
        flat = np.argwhere(~half.fits(rows, stored))
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
            "key": _name(where),
            "shard": shard,
            "images": self._images,
            "bad": bad,
        }
        commit.write(_part(where, shard), {_FILE: buffer.getvalue()}, about)


def key(weights_digest: str, recipe: Recipe, dataset_digest: str, split: str) -> str:
    """What identifies scores: weights, dataset, geometry, preprocessing, number format."""
    geometry = {"size": recipe.model.image_size, "scales": list(crops.scale_sides(recipe.model.image_size))}
    return fingerprint(weights_digest, dataset_digest, split, geometry, recipe.preprocessing, "float16", _KEY_VERSION)


def folder(run_folder: str, score_key: str) -> str:
    """Where the scores of a run lie."""
    return files.join(run_folder, "scores", score_key)


def done(where: str) -> set[int]:
    """Shards whose scores are committed; whether they are good, `load` and `problem` tell."""
    return {
        int(name.removeprefix("shard-"))
        for name in files.list_names(where)
        if name.startswith("shard-") and commit.is_complete(files.join(where, name))
    }


def save(where: str, shard: int, scores: Scores) -> None:
    """Commit the scores of one shard. Raises ValueError for scores that are no probabilities."""
    part = Part(len(scores.ids), scores.maximum.shape[-1])
    means = [scores.means[count][:, None] for count in crops.SUBSETS]
    part.add(scores.ids, scores.labels, np.concatenate((*means, scores.per_scale, scores.maximum[:, None]), axis=1))
    part.save(where, shard, scores.bad)


def load(where: str, shard: int) -> Scores:
    """The verified scores of one shard.

    Raises FileNotFoundError (not scored) or storage.commit.CommitError (damaged, or the scores of other weights or of
    another shard).
    """
    about, arrays = _read(where, shard)
    ids, labels, values = arrays["ids"], arrays["labels"], half.decoded(arrays["rows"])
    if "exact" in arrays:
        images, rows = arrays["exact"].T
        values[images, rows] = arrays["exact_rows"]
    return Scores(
        ids=ids,
        labels=labels,
        means={count: values[:, row] for row, count in enumerate(crops.SUBSETS)},
        per_scale=values[:, _MEANS : _MEANS + _SCALES],
        maximum=values[:, -1],
        bad=int(str(about["bad"])),
    )


def problem(where: str, shard: int, first: int, samples: int, classes: int) -> str | None:
    """What is wrong with the stored scores of a shard; None when they are good.

    They must be whole, and of exactly the images `first` .. `first + samples - 1` but those counted as bad, and of so
    many classes. Raises FileNotFoundError when there are none.
    """
    try:
        about, arrays = _read(where, shard)
    except CommitError as error:
        return str(error)
    ids, rows = arrays["ids"], arrays["rows"]
    shown = urls.redact(_part(where, shard))
    inside = (ids >= first) & (ids < first + samples)
    if not inside.all() or len(np.unique(ids)) != len(ids) or len(ids) + int(str(about["bad"])) != samples:
        return f"{shown}: {len(ids)} images, which are not those {first} .. {first + samples - 1} of the split"
    if rows.shape[2] != classes:
        return f"{shown}: of {rows.shape[2]} classes, not {classes}"
    return None


def _part(where: str, shard: int) -> str:
    return files.join(where, f"shard-{shard:06d}")


def _name(where: str) -> str:
    """The last part of a folder's URL, which is the key of its scores."""
    return where.rstrip("/").rpartition("/")[2]


def _read(where: str, shard: int) -> tuple[dict[str, object], dict[str, NDArray[Any]]]:
    """Return what a part says of itself, and its arrays. Raises as `load` does."""
    part = _part(where, shard)
    shown = urls.redact(part)
    about = commit.about(part)
    version = about.get("format_version")
    readable = version if version in (2, FORMAT_VERSION) else FORMAT_VERSION
    wanted = {"format_version": readable, "key": _name(where), "shard": shard}
    for field, value in wanted.items():
        if about.get(field) != value:
            raise CommitError(f"{shown}: its {field} is {about.get(field)!r}, not {value!r}: it belongs elsewhere")
    payload = commit.read(part)
    names = ("ids", "labels", "rows") if version == 2 else ("ids", "labels", "rows", "exact", "exact_rows")
    try:
        archives.check_stored(payload[_FILE])
        with np.load(io.BytesIO(payload[_FILE]), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in names}
        fits = _fit(arrays, about)
        int(str(about["bad"]))
    except (KeyError, ValueError, TypeError, IndexError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise CommitError(f"{shown}: {_FILE} holds no scores ({error!r})") from None
    if not fits:
        raise CommitError(f"{shown}: {_FILE} holds arrays that do not fit each other")
    if version == 2 and _flat(arrays["rows"]):
        raise CommitError(f"{shown}: holds nearly flat scores, which format 2 rounds wrongly; score them again")
    return about, arrays


def _fit(arrays: dict[str, NDArray[Any]], about: dict[str, object]) -> bool:
    ids, labels, rows = arrays["ids"], arrays["labels"], arrays["rows"]
    if not (ids.shape == labels.shape == rows.shape[:1] == (about["images"],) and rows.shape[1] == ROWS):
        return False
    if "exact" not in arrays:
        return True
    exact, values = arrays["exact"], arrays["exact_rows"]
    shapes = exact.shape == (len(values), 2) and values.shape[1:] == rows.shape[2:]
    return shapes and bool(((exact >= 0) & (exact < rows.shape[:2])).all())


def _flat(rows: NDArray[np.float16]) -> bool:
    """Return whether a row of means, which sum to 1, was pushed up where format 2 kept too many values apart."""
    sums = half.decoded(rows[:, :-1]).sum(axis=-1)
    return bool((np.abs(sums - 1) > _FLAT).any())
