"""Metrics as sums and counts, so that parts of a split add up exactly over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orchestrator.models.network import Logits


@dataclass(frozen=True)
class ErrorCounts:
    """How many samples were scored and how many of them were wrong."""

    samples: int = 0
    wrong_top1: int = 0
    wrong_top5: int = 0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.samples + other.samples, self.wrong_top1 + other.wrong_top1, self.wrong_top5 + other.wrong_top5
        )

    @property
    def top1_error(self) -> float:
        """Share of samples whose best class is wrong."""
        return self.wrong_top1 / self.samples

    @property
    def top5_error(self) -> float:
        """Share of samples whose class is not among the best five."""
        return self.wrong_top5 / self.samples


def count_errors(logits: Logits, labels: Tensor, weights: Tensor) -> ErrorCounts:
    """Counts over N samples; samples of weight 0 are left out."""
    top = min(5, logits.main.shape[1])
    hits = logits.main.topk(top, dim=1).indices == labels[:, None]
    counted = weights > 0
    return ErrorCounts(
        samples=int(counted.sum()),
        wrong_top1=int((~hits[:, 0] & counted).sum()),
        wrong_top5=int((~hits.any(dim=1) & counted).sum()),
    )
