"""The training loss: classifier plus weighted auxiliary heads (arXiv 1409.4842, section 5)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from orchestrator.models.network import Logits
from orchestrator.recipe.config import LossConfig


def compute_loss_sum(logits: Logits, labels: Tensor, weights: Tensor, config: LossConfig) -> Tensor:
    """Sum (never the mean) over the N samples of weight x cross-entropy, auxiliary heads included.

    The caller divides by the global batch size, a constant, so that ranks with fewer samples, and samples of
    weight 0, count for just what they are.
    """
    total = _compute_cross_entropy(logits.main, labels, config)
    for head in logits.auxiliary:
        total = total + config.auxiliary_weight * _compute_cross_entropy(head, labels, config)
    return (total * weights).sum()


def _compute_cross_entropy(scores: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """N float32: cross-entropy, in float32 whatever the scores' precision."""
    return functional.cross_entropy(scores.float(), labels, reduction="none", label_smoothing=config.label_smoothing)
