"""Plain computations of errors and of Table 3, which tests compare the package's with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import multi_crop
from orchestrator.evaluation import bootstrap, score_store
from orchestrator.evaluation.table3 import CellKey, ErrorArray, Table3, build_cells, is_ilsvrc, list_cells


def compute_table(folders: Sequence[str], manifest: Manifest, split: str) -> Table3:
    """Return the table of the models whose scores lie in `folders`, by summing all scores of each cell."""
    errors: dict[CellKey, list[ErrorArray]] = {key: [] for key in list_cells(len(folders))}
    bad = unlabelled = 0
    for shard in score_store.iter_shards(folders, manifest, split):
        for (models, count), parts in errors.items():
            means = [rows[:, list(multi_crop.CROP_SUBSETS).index(count)] for rows in shard.rows]
            if models == 1:
                parts.append(np.mean([compute_errors(mean, shard.labels) for mean in means], axis=0))
            else:
                parts.append(compute_errors(np.sum(means, axis=0, dtype=np.float32), shard.labels))
        bad, unlabelled = bad + shard.bad_images, unlabelled + shard.unlabelled
    whole = {key: np.concatenate(parts) for key, parts in errors.items()}
    resampled = bootstrap.resample_means(np.hstack(list(whole.values())))
    images = len(next(iter(whole.values())))
    return Table3(build_cells(whole, resampled, {}), images, bad, unlabelled, is_ilsvrc(manifest.classes))


def compute_errors(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> ErrorArray:
    """Return N x 2: whether the true class misses the first place, and the first five, of N x C scores.

    A tie counts against the true class, so a model that scores all classes alike is wrong, not lucky.
    """
    true = scores[np.arange(len(labels)), labels][:, None]
    # Not ">=": a NaN score must count as wrong, not as right.
    others = (~(scores < true)).sum(axis=1) - 1
    return np.stack((others >= 1, others >= 5), axis=1).astype(np.float64)
