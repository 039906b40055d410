"""The sentences and numbers of an ensemble's report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.evaluation.analysis_results import Analysis, CellComparison, ErrorDifference
from orchestrator.evaluation.bootstrap import MIN_P_VALUE
from orchestrator.evaluation.table3 import PAPER_TOP5, Cell
from orchestrator.plotting.report_format import format_count

MINUS = "\N{MINUS SIGN}"
FEW_CLASSES = 100  # with fewer the top-5 error hardly separates models, so the top-1 error comes first
PAPER_MODELS = 7
SIGNIFICANCE_LEVEL = 0.05


def format_percent(value: float) -> str:
    """Return an error in percent, without the sign."""
    return f"{value:.2f}"


def format_points(value: float) -> str:
    """Return a difference of errors in points, with its sign."""
    shown = f"{value:+.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", MINUS)


def format_interval(bounds: tuple[float, float]) -> str:
    """Return an interval of errors."""
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def format_points_interval(bounds: tuple[float, float]) -> str:
    """Return an interval of differences."""
    return f"{format_points(bounds[0])} to {format_points(bounds[1])}"


def format_p_value(p: float) -> str:
    """Return a p-value to two digits."""
    if p <= MIN_P_VALUE:
        return f"< {MIN_P_VALUE:.0e}".replace("-", MINUS)
    if p >= 0.001:
        return f"{p:.2f}" if p >= 0.0995 else f"{p:#.2g}"
    digits, exponent = f"{p:.1e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", MINUS)


def format_cell(cell: tuple[int, int]) -> str:
    """Return the models and crops of a cell of the table."""
    models, crops = cell
    return f"{format_count(models, 'model')} x {format_count(crops, 'crop')}"


def order_ranks(analysis: Analysis) -> tuple[int, int]:
    """Return the errors of the headline in order: top-1 and top-5, or the reverse."""
    return (1, 5) if len(analysis.class_names) < FEW_CLASSES else (5, 1)


def get_largest_cells(analysis: Analysis) -> tuple[Cell, Cell]:
    """Return the cells with most crops of a single model and of the ensemble; the same cell twice for one member."""
    crops = max(cell.crops for cell in analysis.table.cells)
    return analysis.table.get_cell(1, crops), analysis.table.get_cell(len(analysis.member_names), crops)


def find_comparison(analysis: Analysis, cell: tuple[int, int], other: tuple[int, int]) -> CellComparison:
    """Return the comparison of two cells of the table. Raises KeyError for an unknown one."""
    for paired in analysis.paired:
        if (paired.cell, paired.other) == (cell, other):
            return paired
    raise KeyError((cell, other))


def compose_headline(analysis: Analysis) -> list[str]:
    """Return sentences on what the ensemble gains, or of a single model what its crops gain."""
    single, together = get_largest_cells(analysis)
    base = analysis.table.cells[0]
    several = together.models > 1
    paired = find_comparison(analysis, (together.models, together.crops), _get_cell_key(single if several else base))
    sentences = []
    for rank in order_ranks(analysis):
        error, reference = get_error(together, rank), get_error(single if several else base, rank)
        difference = paired.top1 if rank == 1 else paired.top5
        subject = (
            f"The {together.models} models together have a top-{rank} error of {format_percent(error)}%"
            if several
            else f"With {together.crops} crops the model has a top-{rank} error of {format_percent(error)}%"
        )
        other = "one of them alone has on average" if several else "it has with a single crop"
        sentences.append(
            f"{subject}, {_format_relation(difference.points)} {format_percent(reference)}% that {other}: "
            f"{compose_verdict(difference)}."
        )
    if together.models == PAPER_MODELS and analysis.table.of_ilsvrc:
        paper = format_percent(PAPER_TOP5[PAPER_MODELS, together.crops])
        sentences.append(f"The paper's seven have a top-5 error of {paper}% on ILSVRC 2014's 50,000 validation images.")
    return sentences


def compose_verdict(difference: ErrorDifference) -> str:
    """Return whether chance explains a difference."""
    interval = format_points_interval(difference.interval)
    facts = f"95% interval {interval} points, exact paired test p {_format_p(difference.p)}"
    low, high = difference.interval
    covered, chance = low <= 0 <= high, difference.p >= SIGNIFICANCE_LEVEL
    if covered and chance:
        return f"the interval covers 0, so these images do not show a difference ({facts})"
    if covered or chance:
        return f"interval and test disagree on whether it is more than chance, so treat it with care ({facts})"
    return f"more than chance explains ({facts})"


def describe_partial(about: Mapping[str, object], members: int) -> str:
    """Return how much of the requested models a partial ensemble has, as in "5 of 7 models"; else an empty text."""
    requested = about.get("members_asked_for", members)
    return "" if requested == members else f"{members} of {requested} models"


def build_tiles(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Return name, value and remark of the most important figures."""
    single, together = get_largest_cells(analysis)
    crops = format_count(together.crops, "crop")
    tiles = []
    for rank in order_ranks(analysis):
        name = f"top-{rank} error, {format_count(together.models, 'model')}, {crops}"
        remark = f"95% interval {format_interval(get_interval(together, rank))}"
        tiles.append((name, f"{format_percent(get_error(together, rank))}%", remark))
    if together.models > 1:
        rank = order_ranks(analysis)[0]
        error = f"{format_percent(get_error(single, rank))}%"
        tiles.append((f"top-{rank} error, a single model, {crops}", error, "mean over the models"))
    tiles.append(("images", f"{analysis.table.images:,}", f"of {len(analysis.class_names):,} classes"))
    return tiles


def compose_warnings(about: Mapping[str, object], members: int) -> Iterator[str]:
    """Yield what a reader must know before the figures."""
    if short := describe_partial(about, members):
        yield f"This is a partial ensemble: {short}. It does not stand for the whole one; the others have no scores."
    if about.get("weights") == "best":
        yield (
            "The weights of each model are those of the epoch with its least validation error: they were chosen on the "
            "images that they are scored on here. The errors tend to be too low; compare them with no others."
        )
    if about.get("weights") == "raw":
        yield "The weights are those of the last step of training (raw), not the average that the paper uses."


def get_error(cell: Cell, rank: int) -> float:
    """Return the top-1 or the top-5 error of a cell, in percent."""
    return cell.top1_error if rank == 1 else cell.top5_error


def get_interval(cell: Cell, rank: int) -> tuple[float, float]:
    """Return the 95% interval of a cell's top-1 or top-5 error, in percent."""
    return cell.top1_interval if rank == 1 else cell.top5_interval


def _get_cell_key(cell: Cell) -> tuple[int, int]:
    return cell.models, cell.crops


def _format_p(p: float) -> str:
    shown = format_p_value(p)
    return shown if shown.startswith("<") else f"= {shown}"


def _format_relation(difference: float) -> str:
    """Return how a figure compares with the one named next."""
    size = f"{abs(difference):.2f}"
    if float(size) == 0:
        return "the same as the"
    return f"{size} points {'less' if difference < 0 else 'more'} than the"
