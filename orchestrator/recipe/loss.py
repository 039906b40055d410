"""The training loss: classifier plus weighted auxiliary heads (arXiv 1409.4842, section 5)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.models.network import Logits
from orchestrator.recipe.config import LossConfig


def compute_loss_sum(logits: Logits, labels: Tensor, weights: Tensor, config: LossConfig) -> Tensor:
    """Sum (never average) weight x cross-entropy over N samples, auxiliary heads included.

    The caller divides by the global batch size, a constant, so that ranks with fewer samples, and samples of
    weight 0, count for just what they are.

    logits: N x classes each. labels: N int64, or N x classes float shares of each class. weights: N.
    """
    total = _compute_cross_entropy(logits.main, labels, config)
    for head in logits.auxiliary:
        total = total + config.auxiliary_weight * _compute_cross_entropy(head, labels, config)
    return (total * weights).sum()


def _compute_cross_entropy(scores: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Return N float32, computed in float32 in any precision of the scores."""
    class_weights = _make_weight_tensor(config.class_weights, scores.device) if config.class_weights else None
    return functional.cross_entropy(
        scores.float(), labels, class_weights, reduction="none", label_smoothing=config.label_smoothing
    )


@lru_cache(maxsize=4)
def _make_weight_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
