"""The paper's Table 3 from stored scores: {1, K models} x {1, 10, 144 crops}, with intervals. A join, no model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import crops, keyed
from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.evaluation import score_store

# arXiv 1409.4842, Table 3: top-5 error in percent by (models, crops).
PAPER_TOP5 = {(1, 1): 10.07, (1, 10): 9.15, (1, 144): 7.89, (7, 1): 8.09, (7, 10): 7.62, (7, 144): 6.67}

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """One row of the table. Errors and bounds in percent; `models` 1 is the mean over the single models."""

    models: int
    crops: int
    top1_error: float
    top1_interval: tuple[float, float]
    top5_error: float
    top5_interval: tuple[float, float]
    paper_top5: float | None

    @property
    def cost(self) -> int:
        """Forward passes per image."""
        return self.models * self.crops


@dataclass(frozen=True)
class Table3:
    """All cells, 1 x 1 first, with what they were computed from."""

    cells: tuple[Cell, ...]
    images: int
    bad_images: int

    def cell(self, models: int, number_of_crops: int) -> Cell:
        """The cell of so many models and crops. Raises KeyError when the table has none."""
        for cell in self.cells:
            if (cell.models, cell.crops) == (models, number_of_crops):
                return cell
        raise KeyError((models, number_of_crops))


Wrong = NDArray[np.float64]  # ... x images x 2: top-1 and top-5 error of each image, 0 or 1 (or a mean of such)


def table(folders: Sequence[str], manifest: Manifest, split: str) -> Table3:
    """The table of the models whose scores lie in `folders`, shard by shard, so memory stays small.

    Raises FileNotFoundError when a shard is not scored, DataError when the images scored are not the split's.
    """
    counts = [(1, count) for count in crops.SUBSETS]
    if len(folders) > 1:
        counts += [(len(folders), count) for count in crops.SUBSETS]
    wrong: dict[tuple[int, int], list[Wrong]] = {cell: [] for cell in counts}
    bad = seen = first = 0
    for number, shard in enumerate(manifest.shards(split)):
        parts = [score_store.load(folder, number) for folder in folders]
        ids, labels = parts[0].ids, parts[0].labels
        _check_ids(parts, first, shard.samples, shard.name)
        for models, count in counts:
            means = [part.means[count] for part in parts]
            if models == 1:
                found = np.mean([errors(mean, labels) for mean in means], axis=0)
            else:
                found = errors(np.sum(means, axis=0, dtype=np.float32), labels)
            wrong[models, count].append(found)
        bad, seen, first = bad + parts[0].bad, seen + len(ids), first + shard.samples
    joined = np.stack([np.concatenate(found) for found in wrong.values()])
    return Table3(_cells(counts, joined), seen, bad)


def errors(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> Wrong:
    """N x 2: whether the true class misses the first place, and the first five, of N x C scores.

    A tie counts against the true class, so a model that says the same of all classes is wrong, not lucky.
    """
    true = probabilities[np.arange(len(labels)), labels][:, None]
    # Not ">=": a score that is no number must count as wrong, not as right.
    others = (~(probabilities < true)).sum(axis=1) - 1
    return np.stack((others >= 1, others >= 5), axis=1).astype(np.float64)


def _check_ids(parts: Sequence[score_store.Scores], first: int, samples: int, name: str) -> None:
    """Every model must have scored just the images of the shard, those that no decoder takes excepted."""
    expected = set(range(first, first + samples))
    for part in parts:
        ids = set(part.ids.tolist())
        if len(ids) != len(part.ids) or not ids <= expected or len(ids) + part.bad != samples:
            raise DataError(f"{name}: the scored images are not the {samples} of the shard; score it again")
        if not np.array_equal(part.ids, parts[0].ids) or not np.array_equal(part.labels, parts[0].labels):
            raise DataError(f"{name}: models were scored on different images or labels; score it again")


def _cells(counts: Sequence[tuple[int, int]], wrong: Wrong) -> tuple[Cell, ...]:
    """Means and intervals of cells x images x 2 errors."""
    low, high = _interval(wrong)
    mean = 100 * wrong.mean(axis=1)
    cells = []
    for row, (models, count) in enumerate(counts):
        (top1, top5), lows, highs = mean[row].tolist(), low[row].tolist(), high[row].tolist()
        intervals = tuple(zip(lows, highs, strict=True))
        cells.append(Cell(models, count, top1, intervals[0], top5, intervals[1], PAPER_TOP5.get((models, count))))
    return tuple(cells)


def _interval(wrong: Wrong) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95% bootstrap bounds, in percent, of means over images; every cell sees the same resamples."""
    images = wrong.shape[1]
    numbers = np.arange(images, dtype=np.int64)
    means = []
    for resample in range(RESAMPLES):
        draws = keyed.uniforms(keyed.key(0, "bootstrap", resample), numbers, 1)[:, 0]
        means.append(wrong[:, (draws * images).astype(np.int64)].mean(axis=1))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(100 * np.array(means), [tail, 100 - tail], axis=0)
    return low, high
