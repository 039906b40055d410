"""Speed-up by more workers: a model of a step from measured compute, bytes and links.

`python -m benchmarks.scaling_model` prints the predictions for GoogLeNet that docs/scaling.md explains, and
`make bench-scaling` holds the model against runs.

A step of W workers on one global batch takes what a worker computes on its part, and what of the exchange of gradients
is not hidden behind that. A ring moves 2 (W - 1) / W of the gradients' bytes over each link (Patarasuk and Yuan 2009).
Nothing is said of stragglers, of a network that is shared, or of storage.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

# GoogLeNet with both auxiliary heads and 1000 classes: `orchestrator cost` says 13,378,280 parameters.
PARAMETERS = 13_378_280
GRADIENT_BYTES = 4 * PARAMETERS  # float32, whatever the precision of the products
# Multiply-adds of a training step on one image: three times the forward pass's 1.58 billion with its heads (forward,
# gradient by inputs, gradient by weights), two operations each.
OPERATIONS = 3 * 2 * 1.6e9
GPUS_PER_NODE = 8
# DDP's last bucket is exchanged when there is nothing left to compute: of GoogLeNet's three at 25 MiB it is a third.
LEAST_EXPOSED = 1 / 3
JPEG_BYTES = 110_000  # of an ILSVRC image, on average


@dataclass(frozen=True)
class Link:
    """Link between workers: bytes a second in each direction, and seconds for a message of no length."""

    bytes_per_second: float
    latency: float = 0.0
    # What processors spend on each byte that a ring moves; on GPUs next to nothing, on CPUs more than the link.
    seconds_per_byte: float = 0.0


def ring_seconds(workers: int, size: float, link: Link) -> float:
    """Seconds of one exchange of `size` bytes in a ring."""
    if workers == 1:
        return 0.0
    moved = 2 * (workers - 1) / workers * size
    return moved * (1 / link.bytes_per_second + link.seconds_per_byte) + 2 * (workers - 1) * link.latency


def step_seconds(compute: float, exchange: float, exposed: float) -> float:
    """Seconds of a step; exposed: the share of the exchange that no computing can hide."""
    backward = 2 / 3 * compute  # what an exchange can hide behind
    return compute + max(exposed * exchange, exchange - backward)


@dataclass(frozen=True)
class Hardware:
    """Assumptions of a prediction."""

    name: str
    operations_per_second: float  # of a GPU, as trained with: its peak times what of it such networks reach
    inside: Link  # a node
    between: Link  # nodes: all of a node's GPUs share it

    def exchange_seconds(self, gpus: int, size: float) -> float:
        """A ring in each node, one between the nodes, and a ring in each node again."""
        nodes = -(-gpus // GPUS_PER_NODE)
        return ring_seconds(min(gpus, GPUS_PER_NODE), size, self.inside) + ring_seconds(nodes, size, self.between)


A100 = Hardware("A100, NVLink, 100 Gbit/s between nodes", 312e12 * 0.15, Link(200e9, 10e-6), Link(12.5e9 * 0.8, 30e-6))
H100 = Hardware("H100, NVLink, 400 Gbit/s between nodes", 990e12 * 0.10, Link(300e9, 10e-6), Link(50e9 * 0.8, 30e-6))
T4 = Hardware("T4, PCIe, 25 Gbit/s between nodes", 65e12 * 0.20, Link(8e9, 20e-6), Link(3.1e9 * 0.8, 50e-6))


def efficiency(hardware: Hardware, gpus: int, images_each: int) -> float:
    """Images a second of so many GPUs against those of one times their number, `images_each` of them in a step."""
    compute = images_each * OPERATIONS / hardware.operations_per_second
    return compute / step_seconds(compute, hardware.exchange_seconds(gpus, GRADIENT_BYTES), LEAST_EXPOSED)


def main() -> None:
    """Print the predictions."""
    console = Console(width=110)
    for hardware in (T4, A100, H100):
        alone = hardware.operations_per_second / OPERATIONS
        title = f"{hardware.name}: {alone:,.0f} images/s a GPU"
        table = Table("GPUs", "global batch", "efficiency", "images/s", "read GB/s", title=title, title_justify="left")
        for gpus in (1, 8, 16, 32, 64, 128, 256, 512):
            for each in (32, 128):
                share = efficiency(hardware, gpus, each)
                rate = share * gpus * alone
                table.add_row(
                    str(gpus), f"{gpus * each:,}", f"{share:.2f}", f"{rate:,.0f}", f"{rate * JPEG_BYTES / 1e9:.2f}"
                )
        console.print(table)


if __name__ == "__main__":
    main()
