"""The printed tables of what networks cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.models import table1
from orchestrator.models.config import (
    AlexNetConfig,
    AnyModel,
    GoogLeNetConfig,
    LeNet5Config,
    NINConfig,
    SPPNetConfig,
    VGG16Config,
    ZFNetConfig,
)
from orchestrator.models.cost_notes import FEWER, NOTES, TOTALS
from orchestrator.models.measure import CLASSES, RowCost, cost_table, totals

BUDGET = 1.5e9  # multiply-adds at inference (section 1)
# Name, network, and its own number of classes where it has one.
COMPARED: tuple[tuple[str, AnyModel, int | None], ...] = (
    ("lenet-5", LeNet5Config(), 10),
    ("alexnet", AlexNetConfig(), None),
    ("zfnet", ZFNetConfig(), None),
    ("spp-net", SPPNetConfig(), None),
    ("nin", NINConfig(), None),
    ("vgg-16", VGG16Config(), None),
    ("googlenet", GoogLeNetConfig(), None),
    ("  separable stem", GoogLeNetConfig(stem="separable"), None),
    ("  batch norm", GoogLeNetConfig(batch_norm=True, lrn=False), None),
    ("  naive modules", GoogLeNetConfig(module="naive"), None),
)


def show(rows: Sequence[RowCost], config: AnyModel, classes: int, auxiliary: bool, console: Console) -> None:
    """Print the rows, the totals beside the paper's, and why they differ."""
    ours = [row for row in rows if auxiliary or not row.is_head]
    of_paper = isinstance(config, GoogLeNetConfig)
    papers_own = config == GoogLeNetConfig() and classes == CLASSES
    titles = ["output", "weights", "params", "paper", "differs", "mult-adds", "paper", "differs"]
    table = _table(*(titles if of_paper else [title for title in titles if title not in ("paper", "differs")]))
    if of_paper:
        table.add_column("note", justify="center")
    for row in ours:
        table.add_row(*_cells(row, of_paper), *([_letter(row.name) if papers_own else ""] if of_paper else []))
    console.print(f"{_title(config)}, {classes} classes: cost of one image", style="bold")
    console.print(table)
    console.print()
    for line in _totals(rows):
        console.print(line)
    if papers_own:
        console.print()
        _print_legend(console)
    elif of_paper:
        console.print()
        console.print("The paper's columns are those of its own network: width 1, reduced, 224 x 224, 1000 classes.")


def compare(classes: int, console: Console) -> None:
    """Print a line for each network as published and for GoogLeNet's variants, and what the paper claims of them."""
    alexnet = totals(cost_table(AlexNetConfig(), classes)).params
    table = _table("input", "classes", "weights", "params", "AlexNet's /", "mult-adds", "of 1.5 billion")
    for name, config, own in COMPARED:
        found = totals(cost_table(config, own or classes))
        table.add_row(
            name,
            f"{config.image_size}x{config.image_size}",
            str(own or classes),
            f"{found.weights:,}",
            f"{found.params:,}",
            f"{alexnet / found.params:.1f}x",
            f"{found.multiply_adds / table1.M:,.1f}M",
            f"{found.multiply_adds / BUDGET:.2f}x",
        )
    console.print("networks as published, and GoogLeNet's variants: cost of one image at inference", style="bold")
    console.print(table)
    if classes == CLASSES:
        console.print()
        console.print(Text(FEWER))


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("row")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _title(config: AnyModel) -> str:
    if not isinstance(config, GoogLeNetConfig):
        return f"{config.kind}, {config.image_size} x {config.image_size} input"
    stem = ", separable stem" if config.stem == "separable" else ""
    return (
        f"GoogLeNet, {config.image_size} x {config.image_size} input, width {config.width:g}, "
        f"{config.module} modules{stem}"
    )


def _cells(row: RowCost, of_paper: bool) -> list[str]:
    height, width, channels = row.output
    size = [
        row.name,
        f"{height}x{width}x{channels}",
        f"{row.weights:,}" if row.weights else "",
        f"{row.params:,}" if row.params else "",
    ]
    products = f"{row.multiply_adds / table1.M:.1f}M" if row.multiply_adds else ""
    if not of_paper:
        return [*size, products]
    return [
        *size,
        "" if row.paper_weights is None else f"{row.paper_weights / table1.K:g}K",
        _difference(row.weights, row.paper_weights),
        products,
        "" if row.paper_multiply_adds is None else f"{row.paper_multiply_adds / table1.M:g}M",
        _difference(row.multiply_adds, row.paper_multiply_adds),
    ]


def _difference(ours: float, papers: float | None) -> str:
    return "" if papers is None else f"{100 * (ours / papers - 1):+.1f}%"


def _totals(rows: Sequence[RowCost]) -> Iterator[str]:
    ours, training = totals(rows), totals(rows, heads=True)
    heads = any(row.is_head for row in rows)
    yield f"parameters      {ours.params:>14,}  at inference (weights alone: {ours.weights:,})"
    if heads:
        yield f"                {training.params:>14,}  with both auxiliary heads, while training"
    over = _difference(ours.multiply_adds, BUDGET)
    yield f"multiply-adds   {ours.multiply_adds:>14,}  at inference: {over} against the 1.5 billion budget"
    if heads:
        yield f"                {training.multiply_adds:>14,}  with both auxiliary heads, forward"
    papers = sum(row.paper_multiply_adds or 0.0 for row in rows)
    if papers:
        yield f"                {papers:>14,.0f}  sum of the paper's column"


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
