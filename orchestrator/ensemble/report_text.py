"""What the figures say, in words and numbers for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.evaluation.findings import Analysis, Difference, Paired
from orchestrator.evaluation.resampling import LEAST_P
from orchestrator.evaluation.table3 import PAPER_TOP5, Cell

MINUS = "\N{MINUS SIGN}"
FEW_CLASSES = 100  # with fewer the top-5 error hardly tells models apart, so the top-1 error leads
PAPER_MODELS = 7
ALPHA = 0.05


def percent(value: float) -> str:
    """An error in percent, without the sign."""
    return f"{value:.2f}"


def points(value: float) -> str:
    """A difference of errors in points, with its sign."""
    shown = f"{value:+.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", MINUS)


def between(bounds: tuple[float, float]) -> str:
    """An interval of errors."""
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def points_between(bounds: tuple[float, float]) -> str:
    """An interval of differences."""
    return f"{points(bounds[0])} to {points(bounds[1])}"


def p_value(p: float) -> str:
    """A p-value to two digits."""
    if p <= LEAST_P:
        return f"< {LEAST_P:.0e}".replace("-", MINUS)
    if p >= 0.001:
        return f"{p:.2f}" if p >= 0.0995 else f"{p:#.2g}"
    digits, exponent = f"{p:.1e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", MINUS)


def cell_name(cell: tuple[int, int]) -> str:
    """The models and crops of a cell of the table."""
    models, crops = cell
    return f"{counted(models, 'model')} x {counted(crops, 'crop')}"


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def class_name(analysis: Analysis, label: int) -> str:
    """A class as people call it."""
    return analysis.class_names[label]


def leading_rank(analysis: Analysis) -> int:
    """Which error the headline begins with: 1 or 5."""
    return 1 if len(analysis.class_names) < FEW_CLASSES else 5


def largest(analysis: Analysis) -> tuple[Cell, Cell]:
    """The cells of a single model and of the ensemble with the most crops; the same cell of a single member."""
    crops = max(cell.crops for cell in analysis.table.cells)
    return analysis.table.cell(1, crops), analysis.table.cell(len(analysis.member_names), crops)


def compared(analysis: Analysis, cell: tuple[int, int], other: tuple[int, int]) -> Paired:
    """The comparison of two cells of the table. Raises KeyError when it is not there."""
    for paired in analysis.paired:
        if (paired.cell, paired.other) == (cell, other):
            return paired
    raise KeyError((cell, other))


def headline(analysis: Analysis) -> list[str]:
    """Sentences that tell what the ensemble, or for a single model what its crops, are worth."""
    single, together = largest(analysis)
    base = analysis.table.cells[0]
    several = together.models > 1
    paired = compared(analysis, (together.models, together.crops), _key(single if several else base))
    told = []
    ranks = (1, 5) if leading_rank(analysis) == 1 else (5, 1)
    for rank in ranks:
        have, against = error(together, rank), error(single if several else base, rank)
        difference = paired.top1 if rank == 1 else paired.top5
        subject = (
            f"The {together.models} models together have a top-{rank} error of {percent(have)}%"
            if several
            else f"With {together.crops} crops the model has a top-{rank} error of {percent(have)}%"
        )
        other = "one of them alone has on average" if several else "it has with a single crop"
        told.append(f"{subject}, {_less(difference.points)} {percent(against)}% that {other}: {verdict(difference)}.")
    if together.models == PAPER_MODELS and analysis.table.of_ilsvrc:
        paper = percent(PAPER_TOP5[PAPER_MODELS, together.crops])
        told.append(f"The paper's seven have a top-5 error of {paper}% on ILSVRC 2014's 50,000 validation images.")
    return told


def verdict(difference: Difference) -> str:
    """Whether chance explains a difference, honestly."""
    facts = f"95% interval {points_between(difference.interval)} points, exact paired test p {_p(difference.p)}"
    low, high = difference.interval
    covered, chance = low <= 0 <= high, difference.p >= ALPHA
    if covered and chance:
        return f"the interval covers 0, so these images do not show a difference ({facts})"
    if covered or chance:
        return f"interval and test do not agree that it is more than chance, so take it with care ({facts})"
    return f"more than chance explains ({facts})"


def partial(about: Mapping[str, object], members: int) -> str:
    """What a partial ensemble has of the models asked for, as in "5 of 7 models"; nothing of a whole one."""
    asked = about.get("members_asked_for", members)
    return "" if asked == members else f"{members} of {asked} models"


def tiles(analysis: Analysis) -> list[tuple[str, str, str]]:
    """The few figures that matter most: what, how much, a remark."""
    single, together = largest(analysis)
    crops = counted(together.crops, "crop")
    found = []
    for rank in (1, 5) if leading_rank(analysis) == 1 else (5, 1):
        interval = together.top1_interval if rank == 1 else together.top5_interval
        what = f"top-{rank} error, {counted(together.models, 'model')}, {crops}"
        found.append((what, f"{percent(error(together, rank))}%", f"95% interval {between(interval)}"))
    if together.models > 1:
        rank = leading_rank(analysis)
        what = f"top-{rank} error, a single model, {crops}"
        found.append((what, f"{percent(error(single, rank))}%", "mean over the models"))
    found.append(("images", f"{analysis.table.images:,}", counted_classes(analysis)))
    return found


def counted_classes(analysis: Analysis) -> str:
    """How many classes there are."""
    return f"of {len(analysis.class_names):,} classes"


def warnings(about: Mapping[str, object], members: int) -> Iterator[str]:
    """What a reader must know before the figures."""
    if short := partial(about, members):
        yield f"This is a partial ensemble: {short}. It stands for no whole one; the others have no scores."
    if about.get("weights") == "best":
        yield (
            "The weights of each model are those of the epoch with its least validation error: they were chosen on the "
            "images that they are scored on here. The errors tend to be too low; compare them with no others."
        )
    if about.get("weights") == "raw":
        yield "The weights are those of the last step of training (raw), not the average that the paper uses."


def error(cell: Cell, rank: int) -> float:
    """The top-1 or the top-5 error of a cell."""
    return cell.top1_error if rank == 1 else cell.top5_error


def _key(cell: Cell) -> tuple[int, int]:
    return cell.models, cell.crops


def _p(p: float) -> str:
    shown = p_value(p)
    return shown if shown.startswith("<") else f"= {shown}"


def _less(difference: float) -> str:
    """How a figure lies to another, of which "the" goes on to speak."""
    size = f"{abs(difference):.2f}"
    if float(size) == 0:
        return "the same as the"
    return f"{size} points {'less' if difference < 0 else 'more'} than the"
