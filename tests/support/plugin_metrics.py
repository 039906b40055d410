"""Metrics of one's own, as a user writes them."""

from collections.abc import Mapping

from torch import Tensor


class Accuracy:
    """The share of samples whose best class is right."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def update(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor | float]:
        """Return samples and right ones."""
        return {"samples": len(labels), "right": (logits.argmax(dim=1) == labels).sum()}

    def compute(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return their ratio."""
        return {"accuracy": float(sums["right"] / sums["samples"])}
