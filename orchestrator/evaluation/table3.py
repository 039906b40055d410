"""The paper's Table 3: {1, K models} x {1, 10, 144 crops}, with intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.transforms import multi_crop
from orchestrator.evaluation import bootstrap

# arXiv 1409.4842, section 7, Table 3: top-5 error in percent by (models, crops). Differences to its base, 10.07, are
# computed from these: the paper prints -3.45 for (7, 144), while 6.67 less 10.07 is -3.40; its other four agree.
PAPER_TOP5 = {(1, 1): 10.07, (1, 10): 9.15, (1, 144): 7.89, (7, 1): 8.09, (7, 10): 7.62, (7, 144): 6.67}

ILSVRC_CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")

CellKey = tuple[int, int]  # models, crops
ErrorArray = NDArray[np.float64]  # images x 2: top-1 and top-5 error of each image, 0 or 1, or a mean over models


@dataclass(frozen=True)
class Cell:
    """A row of the table. Errors and bounds in percent; `models` 1 is the mean over the single models."""

    models: int
    crops: int
    top1_error: float
    top1_interval: tuple[float, float]
    top5_error: float
    top5_interval: tuple[float, float]
    paper_top5: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)  # the user's, by name

    @property
    def cost(self) -> int:
        """Forward passes per image."""
        return self.models * self.crops


@dataclass(frozen=True)
class Table3:
    """All cells, 1 x 1 first, and the counts of images."""

    cells: tuple[Cell, ...]
    images: int  # with scores and a label
    bad_images: int  # that cannot be decoded
    unlabelled: int = 0  # scored, but without a label, so in no cell
    of_ilsvrc: bool = True  # has the classes of the paper; otherwise its figures compare with nothing here

    def get_cell(self, models: int, crops: int) -> Cell:
        """Return the cell of so many models and crops. Raises KeyError when the table has none."""
        return {(cell.models, cell.crops): cell for cell in self.cells}[models, crops]


def list_cells(models: int) -> list[CellKey]:
    """List the cells of the table of so many models, in its order."""
    return [(size, count) for size in sorted({1, models}) for count in multi_crop.CROP_SUBSETS]


def is_ilsvrc(classes: Sequence[str]) -> bool:
    """Return whether these are as many classes as ILSVRC has, named by WordNet ids as there."""
    return len(classes) == ILSVRC_CLASSES and all(map(_WORDNET_ID.fullmatch, classes))


def build_cells(
    errors: Mapping[CellKey, ErrorArray], means: NDArray[np.float64], metrics: Mapping[CellKey, Mapping[str, float]]
) -> tuple[Cell, ...]:
    """Build the cells from the errors of images by cell; `means` are the bootstrap's of the cells' columns."""
    cells = []
    for column, ((models, count), cell_errors) in enumerate(errors.items()):
        top1, top5 = (100 * cell_errors.mean(axis=0)).tolist()
        bounds = [bootstrap.compute_interval(100 * means[:, 2 * column + rank]) for rank in range(2)]
        paper, values = PAPER_TOP5.get((models, count)), metrics.get((models, count), {})
        cells.append(Cell(models, count, top1, bounds[0], top5, bounds[1], paper, values))
    return tuple(cells)
