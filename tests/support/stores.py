"""Small score stores: drawn or given scores of some models, with the manifest of the dataset they are said to be of."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import Manifest, Shard
from orchestrator.evaluation.score_store import Scores, ShardScoreWriter
from orchestrator.storage import commit, file_io

SPLIT = "validation"
CROPS = (1, 10, 144)


def manifest(samples: Sequence[int], classes: int) -> Manifest:
    """A dataset of shards of so many samples."""
    shards = tuple(
        Shard(name=f"{SPLIT}/{number}.tar", samples=count, bytes=0, sha256="", index_sha256="")
        for number, count in enumerate(samples)
    )
    return Manifest(name="made", classes=tuple(f"class {label}" for label in range(classes)), splits={SPLIT: shards})


def join_rows(
    means: Mapping[int, NDArray[np.float32]], per_scale: NDArray[np.float32], maximum: NDArray[np.float32]
) -> NDArray[np.float32]:
    """N x 8 x C, as they are stored, from N x C means by crops, N x 4 x C of each scale, and the N x C maximum."""
    return np.concatenate((*(means[count][:, None] for count in CROPS), per_scale, maximum[:, None]), axis=1)


def get_mean(scores: Scores, count: int) -> NDArray[np.float32]:
    """N x C: the mean over so many crops."""
    return scores.rows[:, CROPS.index(count)]


def list_scored_shards(folder: str) -> set[int]:
    """The shards whose scores are committed, not verified."""
    return {
        int(name.removeprefix("shard-"))
        for name in file_io.list_names(folder)
        if name.startswith("shard-") and commit.is_complete(file_io.join(folder, name))
    }


def drawn(model: int, labels: NDArray[np.int64], classes: int, seed: int = 0, first: int = 0, bad: int = 0) -> Scores:
    """Scores of a made model: the true class stands out of noise that is half the image's own, the same for all models.

    Images are `first`, `first` + 1, ...
    """
    shared, own = np.random.default_rng([seed, first]), np.random.default_rng([seed, first, 1 + model])
    logits = shared.standard_normal((len(labels), classes))
    known = np.flatnonzero(labels >= 0)
    logits[known, labels[known]] += 1.5

    def some(*rows: int) -> NDArray[np.float32]:
        odds = np.exp(logits.reshape(len(labels), *[1] * len(rows), classes) + own.standard_normal((*rows, classes)))
        shares: NDArray[np.float32] = (odds / odds.sum(axis=-1, keepdims=True)).astype(np.float32)
        return shares

    ids = np.arange(first, first + len(labels))
    means = {count: some(1)[:, 0] for count in CROPS}
    return Scores(ids, labels, join_rows(means, some(4), some(1)[:, 0]), bad)


def save_shard(folder: str, shard: int, scores: Scores) -> None:
    """Commit the scores of one shard."""
    writer = ShardScoreWriter(len(scores.ids), scores.rows.shape[-1])
    writer.add(scores.ids, scores.labels, scores.rows)
    writer.save(folder, shard, scores.bad_images)


def write(folder: Path, parts: Sequence[Scores]) -> str:
    """Commit the scores of each shard; the folder's URL."""
    for number, part in enumerate(parts):
        save_shard(str(folder), number, part)
    return str(folder)


def write_drawn(folder: Path, model: int, labels: Sequence[NDArray[np.int64]], classes: int, seed: int = 0) -> str:
    """Commit drawn scores of shards whose images have these labels (-1: none); the folder's URL."""
    firsts = np.cumsum([0, *map(len, labels)])
    return write(
        folder, [drawn(model, shard, classes, seed, int(first)) for shard, first in zip(labels, firsts, strict=False)]
    )
