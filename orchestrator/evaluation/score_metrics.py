"""The user's metrics of stored scores, for each cell of the table; a mean probability's logarithm is its logit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from orchestrator.evaluation.image_errors import CROPS, VIEWS
from orchestrator.evaluation.score_store import ShardScores
from orchestrator.evaluation.table3 import CellKey, list_cells
from orchestrator.recipe.config import MetricPlugin
from orchestrator.recipe.metrics import MetricCounter, create_metrics

MIN_PROBABILITY = np.float32(2**-24)  # the least that is stored; a logarithm needs one


class TableMetrics:
    """Metrics of an ensemble's cells: for one model the mean over the members, else those of their ensemble."""

    def __init__(self, plugins: Sequence[MetricPlugin], num_classes: int, num_members: int) -> None:
        """Raises ConfigError for a metric that cannot be built."""

        def make_counter() -> MetricCounter:
            return MetricCounter(create_metrics(plugins, num_classes), num_classes, torch.device("cpu"))

        self._cells = list_cells(num_members)
        self._counters = {
            (models, crops): [make_counter() for _ in range(num_members if models == 1 else 1)]
            for models, crops in self._cells
        }

    def iter_counted(self, shards: Iterable[ShardScores]) -> Iterator[ShardScores]:
        """Yield the shards, counted. Raises ConfigError when a metric fails."""
        for shard in shards:
            labels = torch.from_numpy(shard.labels)
            for (models, crops), counters in self._counters.items():
                row = VIEWS.index((CROPS, crops))
                scores = [rows[:, row] for rows in shard.rows]
                if models > 1:
                    scores = [np.asarray(np.mean(scores, axis=0, dtype=np.float32))]
                for counter, means in zip(counters, scores, strict=True):
                    counter.add(torch.from_numpy(np.log(np.maximum(means, MIN_PROBABILITY))), labels)
            yield shard

    def compute(self) -> dict[CellKey, dict[str, float]]:
        """Return the values of each cell by name. Raises ConfigError when a metric fails."""
        values = {cell: [each.compute(each.read()) for each in self._counters[cell]] for cell in self._cells}
        return {
            cell: {name: float(np.mean([each[name] for each in of_models])) for name in of_models[0]}
            for cell, of_models in values.items()
        }
