"""A metric of one's own: sums over samples, from which the value is computed once all parts are added up.

Watch it while training, and choose by it in a sweep:

    python jobs/train.py googlenet-digits --placement.execution.metrics '[{"kind": "examples.macro_f1:MacroF1"}]'
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class MacroF1:
    """Mean over the classes of 2 * hits / (predicted + present), in percent."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def update(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return counts of each class over N samples: N x num_classes logits, N labels."""
        best = logits.argmax(dim=1)
        counts = {"hits": best[best == labels], "predicted": best, "present": labels}
        return {name: torch.bincount(classes, minlength=self.num_classes) for name, classes in counts.items()}

    def compute(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the value by its name, under which curves and tables show it."""
        f1 = 2 * sums["hits"] / (sums["predicted"] + sums["present"]).clamp(min=1)
        return {"macro_f1": float(100 * f1.mean())}
