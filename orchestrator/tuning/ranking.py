"""Which trial is best, as a table, and whether its gain is more than the noise of seeds."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from orchestrator.tuning.param_axes import build_axes, format_assignment, format_value, make_short_names
from orchestrator.tuning.trial import MetricName, Trial

MAX_LINE_CHARS = 100  # characters of a line of the plain table
MIN_RELIABLE_SEEDS = 5  # with fewer the spread itself is hardly known
METRIC_NAMES: dict[MetricName, str] = {"top1_error": "top-1 error", "top5_error": "top-5 error"}

TextRow = tuple[str, ...]


@dataclass(frozen=True)
class RankedTrial:
    """A trial and its place.

    rank: from 1. score: the error in percent at the last validated epoch, None without one. cost_share: of the seconds
    that all trials were trained for, from 0 to 1.
    """

    rank: int
    trial: Trial
    score: float | None
    epochs: int
    seconds: float
    cost_share: float


@dataclass(frozen=True)
class RepeatedScores:
    """The errors, in percent, of one recipe under several seeds.

    lost: runs without a score, which are in no figure. deviation: the standard deviation of the seeds, None for fewer
    than two.
    """

    scores: tuple[float, ...]
    lost: int
    mean: float | None
    deviation: float | None


@dataclass(frozen=True)
class SeedComparison:
    """The winner against the base preset, each under several seeds.

    gain: mean error of the base less that of the winner, in points: above 0 where the winner is better. interval: the
    95% interval of the gain after Welch; None where the seeds cannot give one. beyond: whether it excludes 0, so that
    the difference, in whichever direction, is larger than seed noise; None without an interval.
    """

    base: RepeatedScores
    winner: RepeatedScores
    gain: float | None
    interval: tuple[float, float] | None
    beyond: bool | None
    verdict: str


def rank_trials(trials: Sequence[Trial], metric: MetricName) -> tuple[RankedTrial, ...]:
    """The trials, best first.

    Finished ones come first, by their scores; of equals the one of fewer epochs, then the earlier one. An early score
    is no match for a late one, so what was ended or is not done comes behind, by the epochs reached and then by score.
    Diverged and failed ones follow, and those that wait are last.
    """
    total = math.fsum(trial.seconds for trial in trials)
    ordered = sorted(trials, key=lambda trial: _get_sort_key(trial, metric))
    return tuple(
        RankedTrial(
            place,
            trial,
            trial.get_score(metric),
            trial.trained_epochs,
            trial.seconds,
            trial.seconds / total if total > 0 else 0.0,
        )
        for place, trial in enumerate(ordered, 1)
    )


def find_winner(trials: Sequence[Trial], metric: MetricName) -> Trial | None:
    """The best of the trials that finished; None when none has finished with a score."""
    finished = [trial for trial in trials if trial.state == "finished" and trial.get_score(metric) is not None]
    return min(finished, key=lambda trial: _get_sort_key(trial, metric), default=None)


def build_columns(ranking: Sequence[RankedTrial], metric: MetricName) -> tuple[TextRow, tuple[TextRow, ...]]:
    """Head and rows of the ranking as text: seven columns, then one for each searched path ("-" where absent)."""
    searched = build_axes([one.trial for one in ranking])
    head = ("rank", "trial", "state", f"{METRIC_NAMES[metric]}, %", "epochs", "time", "cost, %")
    rows = tuple(
        (
            *_format_facts(one),
            *(
                format_value(one.trial.assignment[axis.path]) if axis.path in one.trial.assignment else "-"
                for axis in searched
            ),
        )
        for one in ranking
    )
    # A path called like a column of the table, as `epochs`, says whose it is.
    return head + tuple(axis.name if axis.name not in head else f"recipe.{axis.path}" for axis in searched), rows


def render_text(ranking: Sequence[RankedTrial], metric: MetricName) -> str:
    """The ranking as a plain table of at most 100 columns, one that a terminal or a log can show."""
    head = ("rank", "trial", "state", "top-1 %" if metric == "top1_error" else "top-5 %", "epochs", "time", "cost %")
    facts = [_format_facts(one) for one in ranking]
    widths = [max(len(row[place]) for row in (head, *facts)) for place in range(len(head))]
    left = sum(widths) + 2 * len(widths)
    names = make_short_names(path for one in ranking for path in one.trial.assignment)
    lines = [_format_line(head, widths) + "assignment"]
    for one, row in zip(ranking, facts, strict=True):
        said = textwrap.wrap(_format_trial(one.trial, names), MAX_LINE_CHARS - left, break_on_hyphens=False) or ["-"]
        lines.append(_format_line(row, widths) + said[0])
        lines += [" " * left + more for more in said[1:]]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def render_markdown(ranking: Sequence[RankedTrial], metric: MetricName) -> str:
    """The ranking as a table in Markdown."""
    head, rows = build_columns(ranking, metric)
    lines = [
        "| " + " | ".join(map(escape_markdown, head)) + " |",
        "|" + "".join(f" {'---' if place in (1, 2) else '---:'} |" for place in range(len(head))),
    ]
    lines += ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def escape_markdown(words: str) -> str:
    """Text that Markdown shows as it is: nothing in it ends a cell, marks it up or is HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(words.split()))


def format_duration(seconds: float) -> str:
    """Seconds as people say them, as in "45s", "4m10s", "3h07m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def compare_seeds(base_scores: Sequence[float], winner_scores: Sequence[float]) -> SeedComparison:
    """Whether the winner's gain over the base preset is larger than what seeds do.

    Both are errors in percent, of runs of fresh seeds: the score that the winner was chosen by is lucky and would
    flatter it. Give a run without a score as a NaN: it is counted, and left out of the figures.
    """
    base, best = _summarize_scores(base_scores), _summarize_scores(winner_scores)
    gain = None if base.mean is None or best.mean is None else base.mean - best.mean
    interval = None if gain is None else _compute_interval(gain, base, best)
    beyond = None if interval is None else not interval[0] <= 0 <= interval[1]
    return SeedComparison(base, best, gain, interval, beyond, _compose_verdict(base, best, gain, interval))


def _get_sort_key(trial: Trial, metric: MetricName) -> tuple[int, float, float, int]:
    score = trial.get_score(metric)
    last = math.inf if score is None else score
    if trial.state == "finished":
        return 0, last, trial.trained_epochs, trial.number
    group = {"diverged": 2, "failed": 2, "waiting": 3}.get(trial.state, 1)
    return group, -trial.trained_epochs, last, trial.number


def _format_facts(one: RankedTrial) -> TextRow:
    return (
        str(one.rank),
        one.trial.name,
        one.trial.state,
        "-" if one.score is None else f"{one.score:.2f}",
        str(one.epochs),
        format_duration(one.seconds),
        f"{100 * one.cost_share:.1f}",
    )


def _format_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells side by side; the trial and its state are words, the others numbers."""
    return "".join(
        f"{cell:<{width}}  " if place in (1, 2) else f"{cell:>{width}}  "
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def _format_trial(trial: Trial, names: dict[str, str]) -> str:
    """The assignment, and why a trial failed or diverged."""
    told = format_assignment(trial.assignment, names)
    if trial.reason and trial.state in ("diverged", "failed"):
        told += f" ({textwrap.shorten(trial.reason, 70, placeholder='...')})"
    return told.strip()


def _summarize_scores(scores: Sequence[float]) -> RepeatedScores:
    kept = tuple(float(score) for score in scores if math.isfinite(score))
    return RepeatedScores(
        kept,
        len(scores) - len(kept),
        statistics.fmean(kept) if kept else None,
        statistics.stdev(kept) if len(kept) > 1 else None,
    )


def _compute_interval(gain: float, base: RepeatedScores, best: RepeatedScores) -> tuple[float, float] | None:
    """Welch's: the two may spread differently. None where there is no spread to reckon with."""
    if base.deviation is None or best.deviation is None:
        return None
    parts = [one.deviation**2 / len(one.scores) for one in (base, best) if one.deviation is not None]
    if sum(parts) <= 0:
        return None
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(one.scores) - 1) for part, one in zip(parts, (base, best), strict=True)
    )
    reach = float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts))
    return gain - reach, gain + reach


def _compose_verdict(
    base: RepeatedScores, best: RepeatedScores, gain: float | None, interval: tuple[float, float] | None
) -> str:
    lost = "".join(
        f" {one.lost} of {one.lost + len(one.scores)} runs of the {name} gave no score and are left out, "
        "which flatters it."
        for name, one in (("base preset", base), ("winner", best))
        if one.lost
    )
    if gain is None:
        return f"No verdict: no run of the {'winner' if best.mean is None else 'base preset'} gave a score.{lost}"
    direction = "better" if gain > 0 else "worse"
    counts = f"{_format_seeds(len(best.scores))} against {len(base.scores)}"
    said = f"The winner is {abs(gain):.2f} points {direction} than the base preset on average ({counts}"
    if interval is None:
        few = min(len(base.scores), len(best.scores)) < 2
        why = "a single seed shows no spread" if few else "the seeds differ in nothing"
        return f"{said}): {why}, so there is no interval, and seed noise alone may explain the difference.{lost}"
    said += f"; 95% interval of the gain {_format_points(interval[0])} to {_format_points(interval[1])})"
    if interval[0] <= 0 <= interval[1]:
        said += ": no more than seed noise may explain."
    else:
        said += f": more than seed noise explains{'' if gain > 0 else ', so keep the base preset'}."
    if min(len(base.scores), len(best.scores)) < MIN_RELIABLE_SEEDS:
        said += " So few seeds hardly tell how far seeds spread; the interval takes their errors to be normal."
    return said + lost


def _format_points(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def _format_seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"
