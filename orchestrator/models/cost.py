"""Tables of parameters and multiply-adds of one image, row by row or network by network.

GoogLeNet's rows are those of Table 1 (arXiv 1409.4842, section 5), beside the paper's own figures.

Run it: python -m orchestrator.models.cost [--model alexnet] [--width 1.0] [--module naive] [--image-size 224]
        python -m orchestrator.models.cost --compare
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config.base import Config
from orchestrator.config.output import PrintableConsole, prepare_output
from orchestrator.models import table1
from orchestrator.models.config import (
    AlexNetConfig,
    AnyModelConfig,
    GoogLeNetConfig,
    LeNet5Config,
    ModelConfig,
    NINConfig,
    SPPNetConfig,
    VGG16Config,
    ZFNetConfig,
)
from orchestrator.models.flops import IMAGENET_CLASSES, RowCost, measure_row_costs, sum_costs

MAX_COLUMNS = 110  # widest print


class _ModelArguments(Config):
    model: ModelConfig


def main(arguments: Sequence[str] | None = None, program: str = "python -m orchestrator.models.cost") -> None:
    """Print the table for the command line's network; exits with status 2 and one line for an impossible one."""
    parser = _build_parser(program)
    chosen = parser.parse_args(arguments)
    fields = ("width", "module", "stem", "image_size")
    overrides = {name: getattr(chosen, name) for name in fields if getattr(chosen, name) is not None}
    if chosen.compare and (overrides or chosen.auxiliary or chosen.model):
        parser.error("--compare lists each network as it was published; leave all but --classes out")
    try:
        if chosen.compare:
            print_comparison(chosen.classes, _make_console())
            return
        config = _ModelArguments.from_dict({"model": {"kind": chosen.model or "googlenet", **overrides}}).model
        rows = measure_row_costs(config, chosen.classes)
    except ValueError as error:
        parser.error(str(error))
    print_cost_table(rows, config, chosen.classes, chosen.auxiliary, _make_console())


def _build_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = GoogLeNetConfig.model_fields["kind"].description
    parser.add_argument("--model", help=f"{kinds} (default: googlenet)")
    parser.add_argument("--compare", action="store_true", help="all networks, a line each, as they were published")
    parser.add_argument("--width", type=float, help="googlenet: multiplier on every filter count (default: 1.0)")
    parser.add_argument("--module", help="googlenet: reduced (Figure 2b, default) or naive (Figure 2a)")
    parser.add_argument("--stem", help="googlenet: plain (default) or separable, the one that Table 1 counts")
    parser.add_argument("--image-size", type=int, help="side of the input in pixels (default: the network's own)")
    parser.add_argument("--classes", type=int, default=IMAGENET_CLASSES, help="classes (default: 1000)")
    parser.add_argument("--auxiliary", action="store_true", help="googlenet: also list the two auxiliary heads")
    return parser


def _make_console() -> Console:
    # A pipe has no width: rich would take 80 columns and cut.
    width = min(MAX_COLUMNS, shutil.get_terminal_size().columns) if sys.stdout.isatty() else MAX_COLUMNS
    prepare_output()
    return PrintableConsole(width=width, highlight=False)


_OPS_FIT = "the paper's operations fit ours, and its own parameters would give"

ROW_NOTES: dict[str, str] = {
    "conv1": "a 7x7 convolution of 64 filters has 9,408 weights; the paper's figures fit a depthwise-separable 7x7 "
    "with multiplier 8: 1,176 + 1,536 = 2,712 weights, 34.0M multiply-adds.",
    "conv2": "exact: 4,096 (1x1 reduction) + 110,592 (3x3) = 112K with K = 1024.",
    "3a": "159.5K, which the paper cuts to 159K.",
    "3b": f"379.0K; {_OPS_FIT} 305M, not 304M.",
    "4a": "parameters (364K) and operations (73M) of the paper agree with each other, so about 3K weights fewer were "
    "counted; the row's filter counts do not say where.",
    "4b": f"438.0K; {_OPS_FIT} the same 88M: a matter of rounding.",
    "4c": f"497.5K against 463K; {_OPS_FIT} 93M, not 100M.",
    "4d": f"590.5K against 580K; {_OPS_FIT} 116M, not 119M.",
    "4e": f"847.0K against 840K; {_OPS_FIT} 169M, not 170M.",
    "5a": "parameters (1072K) and operations (54M) of the paper agree with each other, so some 54K weights more were "
    "counted than the row's filters have (it names the same filters as 4e).",
    "5b": f"1,409K against 1388K; {_OPS_FIT} 70M, not 71M.",
    "linear": "exact: 1,024 x 1,000 weights = 1000K with K = 1024, and about 1M multiply-adds.",
}

TOTALS_NOTE = (
    "The paper leaves biases out and K is 1024; 'differs' holds our weights against its parameters. Its column of "
    "operations adds up to the budget of 1.5 billion; ours is over it because of the 7x7 convolution of the first row "
    "(with --stem separable it fits: 1,498.7M)."
)

PARAMETER_CLAIM_NOTE = (
    "The paper claims 12 times fewer parameters than AlexNet (section 1). No count of the network that Table 1 "
    "describes gives that: all parameters give 60,965,224 / 6,998,552 = 8.7, the table's own column (6,797.7K) 9.0 "
    "with K = 1000 and 8.8 with K = 1024, leaving out GoogLeNet's linear layer (5,973,552) 10.2. Its authors "
    "later speak of 5 million against 60 million (arXiv 1512.00567, section 1), which is where 12 comes from."
)


MULTIPLY_ADD_BUDGET = 1.5e9  # multiply-adds at inference (section 1)
# Name, network, and its own number of classes where it has one.
COMPARED_NETWORKS: tuple[tuple[str, AnyModelConfig, int | None], ...] = (
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


def print_cost_table(
    rows: Sequence[RowCost], config: AnyModelConfig, classes: int, auxiliary: bool, console: Console
) -> None:
    """Print the rows, the totals beside the paper's, and why they differ."""
    ours = [row for row in rows if auxiliary or not row.is_head]
    of_paper = isinstance(config, GoogLeNetConfig)
    papers_own = config == GoogLeNetConfig() and classes == IMAGENET_CLASSES
    titles = ["output", "weights", "params", "paper", "differs", "mult-adds", "paper", "differs"]
    table = _make_table(*(titles if of_paper else [title for title in titles if title not in ("paper", "differs")]))
    if of_paper:
        table.add_column("note", justify="center")
    for row in ours:
        table.add_row(
            *_format_cells(row, of_paper), *([_get_note_letter(row.name) if papers_own else ""] if of_paper else [])
        )
    console.print(f"{_format_title(config)}, {classes} classes: cost of one image", style="bold")
    console.print(table)
    console.print()
    for line in _format_totals(rows):
        console.print(line)
    if papers_own:
        console.print()
        _print_legend(console)
    elif of_paper:
        console.print()
        console.print("The paper's columns are those of its own network: width 1, reduced, 224 x 224, 1000 classes.")


def print_comparison(classes: int, console: Console) -> None:
    """Print a line for each network as published and for GoogLeNet's variants, and what the paper claims of them."""
    alexnet = sum_costs(measure_row_costs(AlexNetConfig(), classes)).params
    table = _make_table("input", "classes", "weights", "params", "AlexNet's /", "mult-adds", "of 1.5 billion")
    for name, config, own in COMPARED_NETWORKS:
        total = sum_costs(measure_row_costs(config, own or classes))
        table.add_row(
            name,
            f"{config.image_size}x{config.image_size}",
            str(own or classes),
            f"{total.weights:,}",
            f"{total.params:,}",
            f"{alexnet / total.params:.1f}x",
            f"{total.multiply_adds / table1.M:,.1f}M",
            f"{total.multiply_adds / MULTIPLY_ADD_BUDGET:.2f}x",
        )
    console.print("networks as published, and GoogLeNet's variants: cost of one image at inference", style="bold")
    console.print(table)
    if classes == IMAGENET_CLASSES:
        console.print()
        console.print(Text(PARAMETER_CLAIM_NOTE))


def _make_table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("row")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _format_title(config: AnyModelConfig) -> str:
    if not isinstance(config, GoogLeNetConfig):
        return f"{config.kind}, {config.image_size} x {config.image_size} input"
    stem = ", separable stem" if config.stem == "separable" else ""
    return (
        f"GoogLeNet, {config.image_size} x {config.image_size} input, width {config.width:g}, "
        f"{config.module} modules{stem}"
    )


def _format_cells(row: RowCost, of_paper: bool) -> list[str]:
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
        _format_difference(row.weights, row.paper_weights),
        products,
        "" if row.paper_multiply_adds is None else f"{row.paper_multiply_adds / table1.M:g}M",
        _format_difference(row.multiply_adds, row.paper_multiply_adds),
    ]


def _format_difference(ours: float, papers: float | None) -> str:
    return "" if papers is None else f"{100 * (ours / papers - 1):+.1f}%"


def _format_totals(rows: Sequence[RowCost]) -> Iterator[str]:
    ours, training = sum_costs(rows), sum_costs(rows, heads=True)
    heads = any(row.is_head for row in rows)
    yield f"parameters      {ours.params:>14,}  at inference (weights alone: {ours.weights:,})"
    if heads:
        yield f"                {training.params:>14,}  with both auxiliary heads, while training"
    over = _format_difference(ours.multiply_adds, MULTIPLY_ADD_BUDGET)
    yield f"multiply-adds   {ours.multiply_adds:>14,}  at inference: {over} against the 1.5 billion budget"
    if heads:
        yield f"                {training.multiply_adds:>14,}  with both auxiliary heads, forward"
    papers = sum(row.paper_multiply_adds or 0.0 for row in rows)
    if papers:
        yield f"                {papers:>14,.0f}  sum of the paper's column"


def _get_note_letter(name: str) -> str:
    return chr(ord("a") + list(ROW_NOTES).index(name)) if name in ROW_NOTES else ""


def _print_legend(console: Console) -> None:
    legend = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    legend.add_column(no_wrap=True)
    legend.add_column()
    for name, note in ROW_NOTES.items():
        legend.add_row(_get_note_letter(name), Text(f"{name}: {note}"))
    legend.add_row("", Text(TOTALS_NOTE))
    console.print(legend)


if __name__ == "__main__":
    main()
