"""What the network costs, row by row of Table 1 (arXiv 1409.4842, section 5), beside the paper's own figures.

Run it: python -m orchestrator.models.cost [--width 1.0] [--module naive] [--image-size 224] [--classes 1000]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from orchestrator.models import table1
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.models.cost_notes import NOTES, TOTALS
from orchestrator.models.googlenet import GoogLeNet

LINEAR = "linear"
HEAD = "head "  # before the name of the module that an auxiliary head reads
PAPER_CLASSES = 1000
BUDGET = 1.5e9  # multiply-adds at inference (section 1)
COLUMNS = 110  # widest print


@dataclass(frozen=True)
class RowCost:
    """A row of Table 1, the final linear layer or an auxiliary head: its size and what one image costs."""

    name: str
    output: tuple[int, int, int]  # height, width, channels
    weights: int  # parameters without biases, as the paper counts
    params: int  # with biases
    multiply_adds: int  # of convolutions and linear layers, for one image
    paper_weights: float | None = None  # None: the paper gives no figure
    paper_multiply_adds: float | None = None


def cost_table(config: GoogLeNetConfig, classes: int) -> list[RowCost]:
    """The rows of Table 1 in order, then the linear layer, then the auxiliary heads if the config has them.

    Shapes, parameters and multiply-adds are measured on a built network; only the paper's columns are data.
    Raises ValueError for fewer than 2 classes.
    """
    # On the meta device nothing is stored or computed. LRN has no parameters and no products with weights, and its
    # autocast guard does not know that device.
    with torch.device("meta"):
        model = GoogLeNet(config.model_copy(update={"lrn": False}), classes).train()
        images = torch.empty(1, 3, config.image_size, config.image_size)
    parts: dict[str, nn.Module] = {row.name: model.stages[row.name] for row in table1.TABLE_1}
    parts[LINEAR] = model.classifier
    parts.update({HEAD + name: head for name, head in model.heads.items()})
    outputs, products = _note_shapes(parts), _note_products(model)
    with torch.no_grad():
        model(images)
    paper = {row.name: row for row in table1.TABLE_1 if not isinstance(row, table1.MaxPool)}
    return [_row(name, part, outputs[name], products, paper.get(name)) for name, part in parts.items()]


def _row(
    name: str,
    part: nn.Module,
    shape: torch.Size,
    products: dict[nn.Module, int],
    paper: table1.Convolution | table1.Inception | None,
) -> RowCost:
    _, channels, height, width = (*shape, 1, 1)[:4]
    figures = (paper.paper_params, paper.paper_ops) if paper is not None else (None, None)
    if name == LINEAR:
        figures = (table1.LINEAR_PAPER_PARAMS, table1.LINEAR_PAPER_OPS)
    return RowCost(
        name,
        (height, width, channels),
        sum(p.numel() for label, p in part.named_parameters() if label.endswith("weight")),
        sum(p.numel() for p in part.parameters()),
        sum(products.get(module, 0) for module in part.modules()),
        *figures,
    )


def _note_shapes(parts: dict[str, nn.Module]) -> dict[str, torch.Size]:
    """Shapes of the outputs of modules, by name, filled as they run."""
    shapes: dict[str, torch.Size] = {}
    for name, part in parts.items():

        def note(_module: nn.Module, _inputs: object, out: Tensor, name: str = name) -> None:
            shapes[name] = out.shape

        part.register_forward_hook(note)
    return shapes


def _note_products(model: nn.Module) -> dict[nn.Module, int]:
    """Multiply-adds of each convolution and linear layer for one image, filled as they run."""
    products: dict[nn.Module, int] = {}

    def note(module: nn.Module, _inputs: object, out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # Every number of the output is a sum of as many products as a filter has weights.
        products[module] = out[0].numel() * weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    return products


# ------------------------------------------------------------------ the printed table
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for the command line's network; exits with status 2 and one line for an impossible one."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.models.cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--width", type=float, default=1.0, help="multiplier on every filter count (default: 1.0)")
    parser.add_argument("--module", default="reduced", help="reduced (Figure 2b, default) or naive (Figure 2a)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the input in pixels (default: 224)")
    parser.add_argument("--classes", type=int, default=PAPER_CLASSES, help="classes (default: 1000)")
    parser.add_argument("--auxiliary", action="store_true", help="also list the two auxiliary heads")
    chosen = parser.parse_args(arguments)
    try:
        config = GoogLeNetConfig.from_dict(
            {"width": chosen.width, "module": chosen.module, "image_size": chosen.image_size}
        )
        rows = cost_table(config, chosen.classes)
    except ValueError as error:
        parser.error(str(error))
    show(rows, config, chosen.classes, chosen.auxiliary, _console())


def _console() -> Console:
    # A pipe has no width: rich would take 80 columns and cut.
    width = min(COLUMNS, shutil.get_terminal_size().columns) if sys.stdout.isatty() else COLUMNS
    return Console(width=width, highlight=False)


def show(rows: Sequence[RowCost], config: GoogLeNetConfig, classes: int, auxiliary: bool, console: Console) -> None:
    """Print the rows, the totals beside the paper's, and why they differ."""
    ours = [row for row in rows if not row.name.startswith(HEAD)]
    heads = [row for row in rows if row.name.startswith(HEAD)]
    papers_own = config == GoogLeNetConfig() and classes == PAPER_CLASSES
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("row")
    for title in ("output", "weights", "params", "paper", "differs", "mult-adds", "paper", "differs"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("note", justify="center")
    for row in (*ours, *heads) if auxiliary else ours:
        table.add_row(*_cells(row), _letter(row.name) if papers_own else "")
    console.print(
        f"GoogLeNet, {config.image_size} x {config.image_size} input, width {config.width:g}, "
        f"{config.module} modules, {classes} classes: cost of one image",
        style="bold",
    )
    console.print(table)
    console.print()
    for line in _totals(ours, heads):
        console.print(line)
    console.print()
    if papers_own:
        _print_legend(console)
    else:
        console.print("The paper's columns are those of its own network: width 1, reduced, 224 x 224, 1000 classes.")


def _cells(row: RowCost) -> list[str]:
    height, width, channels = row.output
    return [
        row.name,
        f"{height}x{width}x{channels}",
        f"{row.weights:,}" if row.weights else "",
        f"{row.params:,}" if row.params else "",
        "" if row.paper_weights is None else f"{row.paper_weights / table1.K:g}K",
        _difference(row.weights, row.paper_weights),
        f"{row.multiply_adds / table1.M:.1f}M" if row.multiply_adds else "",
        "" if row.paper_multiply_adds is None else f"{row.paper_multiply_adds / table1.M:g}M",
        _difference(row.multiply_adds, row.paper_multiply_adds),
    ]


def _difference(ours: float, papers: float | None) -> str:
    return "" if papers is None else f"{100 * (ours / papers - 1):+.1f}%"


def _totals(ours: Sequence[RowCost], heads: Sequence[RowCost]) -> Iterator[str]:
    params = sum(row.params for row in ours)
    with_heads = params + sum(row.params for row in heads)
    products = sum(row.multiply_adds for row in ours)
    training = products + sum(row.multiply_adds for row in heads)
    yield f"parameters      {params:>13,}  at inference (weights alone: {sum(row.weights for row in ours):,})"
    yield f"                {with_heads:>13,}  with both auxiliary heads, while training"
    over = _difference(products, BUDGET)
    yield f"multiply-adds   {products:>13,}  at inference: {over} against the 1.5 billion budget"
    yield f"                {training:>13,}  with both auxiliary heads, forward"
    papers = sum(row.paper_multiply_adds or 0.0 for row in ours)
    yield f"                {papers:>13,.0f}  sum of the paper's column"


def _letter(name: str) -> str:
    return chr(ord("a") + list(NOTES).index(name)) if name in NOTES else ""


def _print_legend(console: Console) -> None:
    legend = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    legend.add_column(no_wrap=True)
    legend.add_column()
    for name, note in NOTES.items():
        legend.add_row(_letter(name), Text(f"{name}: {note}"))
    legend.add_row("", Text(TOTALS))
    console.print(legend)


if __name__ == "__main__":
    main()
