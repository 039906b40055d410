"""Reads the scores of several models on the same images, shard by shard, and checks that they match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.evaluation import score_store
from orchestrator.evaluation.score_store import Scores


@dataclass(frozen=True)
class ShardScores:
    """Scores of each model on the N images of a shard that have a label."""

    ids: NDArray[np.int64]  # N, numbers of the split
    labels: NDArray[np.int64]  # N, 0 .. C - 1
    scores: tuple[Scores, ...]  # by model
    bad_images: int  # that cannot be decoded
    unlabelled: int


def iter_shards(folders: Sequence[str], manifest: Manifest, split: str, pool: Executor) -> Iterator[ShardScores]:
    """Yield the scores in `folders`, one of each model, for each shard of the split.

    `pool` reads the next shard meanwhile, so two shards of all models are in memory. Raises FileNotFoundError when a
    shard is not scored, CommitError when it is damaged, and DataError when no models are given, one is given twice, the
    scores are of other images, labels or classes than the dataset's, or no image has a label (at the end).
    """
    if not folders:
        raise DataError("no models: there are no scores to join; give at least one model")
    duplicates = [folder for folder, count in Counter(folder.rstrip("/") for folder in folders).items() if count > 1]
    if duplicates:
        raise DataError(f"{redaction.redact(duplicates[0])}: these scores are given twice; give each model once")
    shards = manifest.shards(split)
    if not shards:
        raise DataError(f"{manifest.name}: split {split!r} has no shards: there is nothing to join; set another split")
    first = labelled = 0
    reading = _submit_reads(pool, folders, 0)
    for number, shard in enumerate(shards):
        parts = [part.result() for part in reading]
        reading = _submit_reads(pool, folders, number + 1) if number + 1 < len(shards) else []
        _check_scores(parts, folders, first, shard, len(manifest.classes))
        scores = _drop_unlabelled(parts)
        yield scores
        first, labelled = first + shard.samples, labelled + len(scores.labels)
    if not labelled:
        raise DataError(
            f"{manifest.name}: none of the {first} images of split {split!r} has scores and a label: "
            "there are no errors to count"
        )


def _submit_reads(pool: Executor, folders: Sequence[str], number: int) -> list[Future[Scores]]:
    return [pool.submit(score_store.load_shard, folder, number) for folder in folders]


def _drop_unlabelled(parts: Sequence[Scores]) -> ShardScores:
    """Drop the images without a label (-1)."""
    labelled = parts[0].labels >= 0
    unlabelled = len(labelled) - int(labelled.sum())
    if unlabelled:
        parts = [_select_images(part, labelled) for part in parts]
    return ShardScores(parts[0].ids, parts[0].labels, tuple(parts), parts[0].bad_images, unlabelled)


def _select_images(part: Scores, images: NDArray[np.bool_]) -> Scores:
    return replace(
        part,
        ids=part.ids[images],
        labels=part.labels[images],
        means={count: mean[images] for count, mean in part.means.items()},
        per_scale=part.per_scale[images],
        maximum=part.maximum[images],
    )


def _check_scores(parts: Sequence[Scores], folders: Sequence[str], first: int, shard: Shard, classes: int) -> None:
    """Check that every model scored exactly the images of the shard, undecodable ones excepted."""
    for part, folder in zip(parts, folders, strict=True):
        shown = f"{redaction.redact(folder)}: {shard.name}"
        if not score_store.covers_images(part.ids, part.bad_images, first, shard.samples):
            raise DataError(f"{shown}: the scored images are not the {shard.samples} of the shard; score it again")
        if part.maximum.shape[1] != classes:
            raise DataError(
                f"{shown}: scores of {part.maximum.shape[1]} classes, but the dataset has {classes}: a model of "
                "another dataset; leave it out"
            )
        wrong = part.labels[(part.labels < -1) | (part.labels >= classes)]
        if len(wrong):
            raise DataError(f"{shown}: labels must be -1 or 0 .. {classes - 1}, got {wrong[0]}; score it again")
        if not np.array_equal(part.ids, parts[0].ids) or not np.array_equal(part.labels, parts[0].labels):
            raise DataError(
                f"{shown}: models were scored on different images or labels than {redaction.redact(folders[0])}; "
                "score it again"
            )
