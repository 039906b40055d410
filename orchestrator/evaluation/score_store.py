"""Stored scores: for each (model, image) the mean probabilities over 1, 10 and 144 crops, per scale, and the maximum.

A part is one shard of the split, committed by a DONE file, so scoring resumes per shard and a model that was scored is
never scored again. float16 stored, float32 summed, all classes (a top-k could not be joined exactly).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.fingerprint import fingerprint
from orchestrator.data import crops
from orchestrator.recipe.config import Recipe
from orchestrator.storage import commit, files

FORMAT_VERSION = 1
_FILE = "scores.npz"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one shard: N images, C classes."""

    ids: NDArray[np.int64]  # N, whole numbers of the split in the manifest's order
    labels: NDArray[np.int64]  # N
    means: dict[int, Floats]  # by number of crops (1, 10, 144), each N x C
    per_scale: Floats  # N x 4 x C, mean over the 36 crops of each scale
    maximum: Floats  # N x C, maximum over the 144 crops: the paper's rejected variant
    bad: int  # images of the shard that could not be decoded, and so are in none of the arrays


def key(weights_digest: str, recipe: Recipe, dataset_digest: str, split: str) -> str:
    """What identifies scores: weights, dataset, geometry, preprocessing, number format."""
    geometry = {"size": recipe.model.image_size, "scales": list(crops.scale_sides(recipe.model.image_size))}
    return fingerprint(weights_digest, dataset_digest, split, geometry, recipe.preprocessing, "float16", FORMAT_VERSION)


def folder(run_folder: str, score_key: str) -> str:
    """Where the scores of a run lie."""
    return files.join(run_folder, "scores", score_key)


def _part(where: str, shard: int) -> str:
    return files.join(where, f"shard-{shard:06d}")


def done(where: str) -> set[int]:
    """Shards whose scores are committed."""
    return {
        int(name.removeprefix("shard-"))
        for name in files.list_names(where)
        if name.startswith("shard-") and commit.is_complete(files.join(where, name))
    }


def save(where: str, shard: int, scores: Scores) -> None:
    """Commit the scores of one shard."""
    buffer = io.BytesIO()
    half = {f"mean_{count}": mean.astype(np.float16) for count, mean in scores.means.items()}
    np.savez(
        buffer,
        ids=scores.ids,
        labels=scores.labels,
        per_scale=scores.per_scale.astype(np.float16),
        maximum=scores.maximum.astype(np.float16),
        **half,  # type: ignore[arg-type]
    )
    about = {"format_version": FORMAT_VERSION, "images": len(scores.ids), "bad": scores.bad}
    commit.write(_part(where, shard), {_FILE: buffer.getvalue()}, about)


def load(where: str, shard: int) -> Scores:
    """The verified scores of one shard. Raises FileNotFoundError (not scored) or storage.commit.CommitError."""
    part = _part(where, shard)
    about = commit.about(part)
    with np.load(io.BytesIO(commit.read(part)[_FILE]), allow_pickle=False) as arrays:
        return Scores(
            ids=arrays["ids"],
            labels=arrays["labels"],
            means={count: arrays[f"mean_{count}"].astype(np.float32) for count in crops.SUBSETS},
            per_scale=arrays["per_scale"].astype(np.float32),
            maximum=arrays["maximum"].astype(np.float32),
            bad=int(str(about["bad"])),
        )
