"""The scores of several models on the same images, shard by shard, checked against the split and each other."""

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
    """One shard: what each model scores on its N images with a label."""

    ids: NDArray[np.int64]  # N, whole numbers of the split
    labels: NDArray[np.int64]  # N, 0 .. C - 1
    scores: tuple[Scores, ...]  # by model
    bad_images: int  # images that no decoder takes
    unlabelled: int


def iter_shards(folders: Sequence[str], manifest: Manifest, split: str, pool: Executor) -> Iterator[ShardScores]:
    """Each shard of the split as the models whose scores lie in `folders` see it.

    The next shard is read in `pool` meanwhile, so two shards of all models are in memory.
    Raises FileNotFoundError when a shard is not scored, storage.commit.CommitError when it is damaged, and DataError
    when no models are given, one is given twice, or the scores are not of the split's images, or of other labels or
    classes than the dataset's, or when no image has a label (at the end).
    """
    if not folders:
        raise DataError("no models: there are no scores to join")
    twice = [folder for folder, count in Counter(folder.rstrip("/") for folder in folders).items() if count > 1]
    if twice:
        raise DataError(f"{redaction.redact(twice[0])}: these scores are given twice; give each model once")
    listed = manifest.shards(split)
    if not listed:
        raise DataError(f"{manifest.name}: split {split!r} has no shards: there is nothing to join")
    first = labelled = 0
    reading = _submit_reads(pool, folders, 0)
    for number, shard in enumerate(listed):
        parts = [part.result() for part in reading]
        reading = _submit_reads(pool, folders, number + 1) if number + 1 < len(listed) else []
        _check_scores(parts, folders, first, shard, len(manifest.classes))
        joined = _drop_unlabeled(parts)
        yield joined
        first, labelled = first + shard.samples, labelled + len(joined.labels)
    if not labelled:
        raise DataError(
            f"{manifest.name}: none of the {first} images of split {split!r} has scores and a label: "
            "there are no errors to count"
        )


def _submit_reads(pool: Executor, folders: Sequence[str], number: int) -> list[Future[Scores]]:
    return [pool.submit(score_store.load_shard, folder, number) for folder in folders]


def _drop_unlabeled(parts: Sequence[Scores]) -> ShardScores:
    """Without the images that have no label (-1)."""
    ids, labels, bad = parts[0].ids, parts[0].labels, parts[0].bad_images
    known = labels >= 0
    unlabelled = len(labels) - int(known.sum())
    if unlabelled:
        parts = [_select_images(part, known) for part in parts]
    return ShardScores(ids[known], labels[known], tuple(parts), bad, unlabelled)


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
    """Every model must have scored just the images of the shard, those that no decoder takes excepted."""
    for part, folder in zip(parts, folders, strict=True):
        where = f"{redaction.redact(folder)}: {shard.name}"
        ordered = np.unique(part.ids)
        inside = len(ordered) == 0 or (ordered[0] >= first and ordered[-1] < first + shard.samples)
        if len(ordered) != len(part.ids) or not inside or len(part.ids) + part.bad_images != shard.samples:
            raise DataError(f"{where}: the scored images are not the {shard.samples} of the shard; score it again")
        if part.maximum.shape[1] != classes:
            raise DataError(
                f"{where}: scores of {part.maximum.shape[1]} classes, but the dataset has {classes}: a model of "
                "another dataset; leave it out"
            )
        if len(part.labels) and not (part.labels.min() >= -1 and part.labels.max() < classes):
            wrong = part.labels[(part.labels < -1) | (part.labels >= classes)][0]
            raise DataError(f"{where}: label {wrong} is none of 0 .. {classes - 1} nor -1; score it again")
        if not np.array_equal(part.ids, parts[0].ids) or not np.array_equal(part.labels, parts[0].labels):
            raise DataError(
                f"{where}: models were scored on different images or labels than {redaction.redact(folders[0])}; "
                "score it again"
            )
