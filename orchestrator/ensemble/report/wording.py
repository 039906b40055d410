"""What the figures say, in words and numbers for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.evaluation.analysis_results import Analysis, CellComparison, ErrorDifference
from orchestrator.evaluation.bootstrap import MIN_P_VALUE
from orchestrator.evaluation.table3 import PAPER_TOP5, Cell

MINUS = "\N{MINUS SIGN}"
FEW_CLASSES = 100  # with fewer the top-5 error hardly tells models apart, so the top-1 error leads
PAPER_MODELS = 7
SIGNIFICANCE_LEVEL = 0.05


def format_percent(value: float) -> str:
    """An error in percent, without the sign."""
    return f"{value:.2f}"


def format_points(value: float) -> str:
    """A difference of errors in points, with its sign."""
    shown = f"{value:+.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", MINUS)


def format_interval(bounds: tuple[float, float]) -> str:
    """An interval of errors."""
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def format_points_interval(bounds: tuple[float, float]) -> str:
    """An interval of differences."""
    return f"{format_points(bounds[0])} to {format_points(bounds[1])}"


def format_p_value(p: float) -> str:
    """A p-value to two digits."""
    if p <= MIN_P_VALUE:
        return f"< {MIN_P_VALUE:.0e}".replace("-", MINUS)
    if p >= 0.001:
        return f"{p:.2f}" if p >= 0.0995 else f"{p:#.2g}"
    digits, exponent = f"{p:.1e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", MINUS)


def format_cell(cell: tuple[int, int]) -> str:
    """The models and crops of a cell of the table."""
    models, crops = cell
    return f"{format_count(models, 'model')} x {format_count(crops, 'crop')}"


def format_count(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def get_class_name(analysis: Analysis, label: int) -> str:
    """A class as people call it."""
    return analysis.class_names[label]


def choose_leading_rank(analysis: Analysis) -> int:
    """Which error the headline begins with: 1 or 5."""
    return 1 if len(analysis.class_names) < FEW_CLASSES else 5


def get_largest_cells(analysis: Analysis) -> tuple[Cell, Cell]:
    """The cells of a single model and of the ensemble with the most crops; the same cell of a single member."""
    crops = max(cell.crops for cell in analysis.table.cells)
    return analysis.table.get_cell(1, crops), analysis.table.get_cell(len(analysis.member_names), crops)


def find_comparison(analysis: Analysis, cell: tuple[int, int], other: tuple[int, int]) -> CellComparison:
    """The comparison of two cells of the table. Raises KeyError when it is not there."""
    for paired in analysis.paired:
        if (paired.cell, paired.other) == (cell, other):
            return paired
    raise KeyError((cell, other))


def compose_headline(analysis: Analysis) -> list[str]:
    """Sentences that tell what the ensemble, or for a single model what its crops, are worth."""
    single, together = get_largest_cells(analysis)
    base = analysis.table.cells[0]
    several = together.models > 1
    paired = find_comparison(analysis, (together.models, together.crops), _get_cell_key(single if several else base))
    told = []
    ranks = (1, 5) if choose_leading_rank(analysis) == 1 else (5, 1)
    for rank in ranks:
        have, against = get_error(together, rank), get_error(single if several else base, rank)
        difference = paired.top1 if rank == 1 else paired.top5
        subject = (
            f"The {together.models} models together have a top-{rank} error of {format_percent(have)}%"
            if several
            else f"With {together.crops} crops the model has a top-{rank} error of {format_percent(have)}%"
        )
        other = "one of them alone has on average" if several else "it has with a single crop"
        told.append(
            f"{subject}, {_format_relation(difference.points)} {format_percent(against)}% that {other}: "
            f"{compose_verdict(difference)}."
        )
    if together.models == PAPER_MODELS and analysis.table.of_ilsvrc:
        paper = format_percent(PAPER_TOP5[PAPER_MODELS, together.crops])
        told.append(f"The paper's seven have a top-5 error of {paper}% on ILSVRC 2014's 50,000 validation images.")
    return told


def compose_verdict(difference: ErrorDifference) -> str:
    """Whether chance explains a difference, honestly."""
    interval = format_points_interval(difference.interval)
    facts = f"95% interval {interval} points, exact paired test p {_format_p(difference.p)}"
    low, high = difference.interval
    covered, chance = low <= 0 <= high, difference.p >= SIGNIFICANCE_LEVEL
    if covered and chance:
        return f"the interval covers 0, so these images do not show a difference ({facts})"
    if covered or chance:
        return f"interval and test do not agree that it is more than chance, so take it with care ({facts})"
    return f"more than chance explains ({facts})"


def describe_partial(about: Mapping[str, object], members: int) -> str:
    """What a partial ensemble has of the models asked for, as in "5 of 7 models"; nothing of a whole one."""
    asked = about.get("members_asked_for", members)
    return "" if asked == members else f"{members} of {asked} models"


def build_tiles(analysis: Analysis) -> list[tuple[str, str, str]]:
    """The few figures that matter most: what, how much, a remark."""
    single, together = get_largest_cells(analysis)
    crops = format_count(together.crops, "crop")
    found = []
    for rank in (1, 5) if choose_leading_rank(analysis) == 1 else (5, 1):
        interval = together.top1_interval if rank == 1 else together.top5_interval
        what = f"top-{rank} error, {format_count(together.models, 'model')}, {crops}"
        found.append(
            (what, f"{format_percent(get_error(together, rank))}%", f"95% interval {format_interval(interval)}")
        )
    if together.models > 1:
        rank = choose_leading_rank(analysis)
        what = f"top-{rank} error, a single model, {crops}"
        found.append((what, f"{format_percent(get_error(single, rank))}%", "mean over the models"))
    found.append(("images", f"{analysis.table.images:,}", format_class_count(analysis)))
    return found


def format_class_count(analysis: Analysis) -> str:
    """How many classes there are."""
    return f"of {len(analysis.class_names):,} classes"


def compose_warnings(about: Mapping[str, object], members: int) -> Iterator[str]:
    """What a reader must know before the figures."""
    if short := describe_partial(about, members):
        yield f"This is a partial ensemble: {short}. It stands for no whole one; the others have no scores."
    if about.get("weights") == "best":
        yield (
            "The weights of each model are those of the epoch with its least validation error: they were chosen on the "
            "images that they are scored on here. The errors tend to be too low; compare them with no others."
        )
    if about.get("weights") == "raw":
        yield "The weights are those of the last step of training (raw), not the average that the paper uses."


def get_error(cell: Cell, rank: int) -> float:
    """The top-1 or the top-5 error of a cell."""
    return cell.top1_error if rank == 1 else cell.top5_error


def _get_cell_key(cell: Cell) -> tuple[int, int]:
    return cell.models, cell.crops


def _format_p(p: float) -> str:
    shown = format_p_value(p)
    return shown if shown.startswith("<") else f"= {shown}"


def _format_relation(difference: float) -> str:
    """How a figure lies to another, of which "the" goes on to speak."""
    size = f"{abs(difference):.2f}"
    if float(size) == 0:
        return "the same as the"
    return f"{size} points {'less' if difference < 0 else 'more'} than the"
