"""The ranking of trials as a table, and whether the winner's gain is more than the noise of seeds."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from orchestrator.monitor.formatting import format_duration
from orchestrator.plotting.report_format import TextRow, format_count, format_markdown_table, format_text_table
from orchestrator.tuning.param_names import format_assignment, format_value, list_paths, make_short_names
from orchestrator.tuning.trial import Metric, Trial

MAX_LINE_CHARS = 100  # characters of a line of the plain table
MIN_RELIABLE_SEEDS = 5  # fewer hardly show how far seeds spread
_TEXT_COLUMNS = (1, 2)  # trial and state; the others are numbers


@dataclass(frozen=True)
class RankedTrial:
    """A trial and its place.

    rank: from 1. score: at the last validated epoch; None without one. cost_share: of the seconds of training of all
    trials, from 0 to 1.
    """

    rank: int
    trial: Trial
    score: float | None
    epochs: int
    seconds: float
    cost_share: float


@dataclass(frozen=True)
class RepeatedScores:
    """The scores of one recipe under several seeds.

    lost: runs without a score, which count in no figure. deviation: the standard deviation; None for fewer than two.
    """

    scores: tuple[float, ...]
    lost: int
    mean: float | None
    deviation: float | None


@dataclass(frozen=True)
class SeedComparison:
    """The winner against the base preset, each under several seeds.

    gain: by how much the winner's mean is better; below 0 it is worse. interval: the 95% interval of the gain after
    Welch; None when the seeds cannot give one. beyond: whether it excludes 0, so that the difference, in either
    direction, is larger than seed noise; None without an interval.
    """

    base: RepeatedScores
    winner: RepeatedScores
    gain: float | None
    interval: tuple[float, float] | None
    beyond: bool | None
    verdict: str


def rank_trials(trials: Sequence[Trial], metric: Metric) -> tuple[RankedTrial, ...]:
    """Return the trials, best first.

    Finished ones come first, by their scores; of equals the one of fewer epochs, then the earlier one. An early score
    does not compare with a late one, so the others follow by the epochs that they reached and then by score. Diverged
    and failed ones come next, and waiting ones are last.
    """
    total = math.fsum(trial.seconds for trial in trials)
    ordered = sorted(trials, key=lambda trial: _get_sort_key(trial, metric))
    return tuple(
        RankedTrial(
            rank, trial, trial.get_score(metric), trial.trained_epochs, trial.seconds,
            trial.seconds / total if total > 0 else 0.0,
        )
        for rank, trial in enumerate(ordered, 1)
    )  # fmt: skip


def find_winner(trials: Sequence[Trial], metric: Metric) -> Trial | None:
    """Return the best of the finished trials; None when none has finished with a score."""
    finished = [trial for trial in trials if trial.state == "finished" and trial.get_score(metric) is not None]
    return min(finished, key=lambda trial: _get_sort_key(trial, metric), default=None)


def build_columns(ranking: Sequence[RankedTrial], metric: Metric) -> tuple[TextRow, tuple[TextRow, ...]]:
    """Return head and rows of the ranking: seven columns, then one for each searched path ("-" where absent)."""
    names = make_short_names(list_paths(ranked.trial for ranked in ranking))
    head: TextRow = ("rank", "trial", "state", metric.axis_label, "epochs", "time", "cost, %")

    def format_values(trial: Trial) -> TextRow:
        return tuple(format_value(trial.assignment[path]) if path in trial.assignment else "-" for path in names)

    # A path named like a column of the table, such as `epochs`, is shown as the recipe's.
    head += tuple(name if name not in head else f"recipe.{path}" for path, name in names.items())
    return head, tuple((*_format_facts(ranked, metric), *format_values(ranked.trial)) for ranked in ranking)


def render_text(ranking: Sequence[RankedTrial], metric: Metric) -> str:
    """Return the ranking as a plain table of at most 100 columns for a terminal or a log."""
    label = metric.label.replace(" error", " %") if metric.is_error else metric.label
    head = ("rank", "trial", "state", label, "epochs", "time", "cost %")
    names = make_short_names(list_paths(ranked.trial for ranked in ranking))
    table = format_text_table([head, *(_format_facts(ranked, metric) for ranked in ranking)], _TEXT_COLUMNS)
    width = len(table[0]) + 2
    lines = [f"{table[0]}  assignment"]
    for ranked, row in zip(ranking, table[1:], strict=True):
        text = _format_trial(ranked.trial, names)
        first, *more = textwrap.wrap(text, MAX_LINE_CHARS - width, break_on_hyphens=False) or ["-"]
        lines += [f"{row}  {first}", *(" " * width + line for line in more)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def render_markdown(ranking: Sequence[RankedTrial], metric: Metric) -> str:
    """Return the ranking as a table in Markdown."""
    head, rows = build_columns(ranking, metric)
    return format_markdown_table(head, rows, [column for column in range(len(head)) if column not in _TEXT_COLUMNS])


def compare_seeds(base_scores: Sequence[float], winner_scores: Sequence[float], metric: Metric) -> SeedComparison:
    """Return whether the winner's gain over the base preset is larger than seed noise.

    The scores are of runs with new seeds: the score that the winner was chosen by is lucky and would flatter it. A run
    without a score is given as NaN: it is counted, and left out of the figures.
    """
    base, best = _summarize_scores(base_scores), _summarize_scores(winner_scores)
    gain = None
    if base.mean is not None and best.mean is not None:
        gain = metric.to_loss(base.mean) - metric.to_loss(best.mean)
    interval = None if gain is None else _compute_interval(gain, base, best)
    beyond = None if interval is None else not interval[0] <= 0 <= interval[1]
    return SeedComparison(base, best, gain, interval, beyond, _compose_verdict(base, best, gain, interval, metric))


def _get_sort_key(trial: Trial, metric: Metric) -> tuple[int, float, float, int]:
    loss = trial.get_loss(metric)
    if trial.state == "finished":
        return 0, loss, trial.trained_epochs, trial.number
    group = {"diverged": 2, "failed": 2, "waiting": 3}.get(trial.state, 1)
    return group, -trial.trained_epochs, loss, trial.number


def _format_facts(ranked: RankedTrial, metric: Metric) -> TextRow:
    score, time, cost = metric.format_score(ranked.score), format_duration(ranked.seconds), 100 * ranked.cost_share
    return str(ranked.rank), ranked.trial.name, ranked.trial.state, score, str(ranked.epochs), time, f"{cost:.1f}"


def _format_trial(trial: Trial, names: Mapping[str, str]) -> str:
    """Return the assignment, and why a trial failed or diverged."""
    text = format_assignment(trial.assignment, names)
    if trial.reason and trial.state in ("diverged", "failed"):
        text += f" ({textwrap.shorten(trial.reason, 70, placeholder='...')})"
    return text.strip()


def _summarize_scores(scores: Sequence[float]) -> RepeatedScores:
    finite = tuple(float(score) for score in scores if math.isfinite(score))
    mean = statistics.fmean(finite) if finite else None
    deviation = statistics.stdev(finite) if len(finite) > 1 else None
    return RepeatedScores(finite, len(scores) - len(finite), mean, deviation)


def _compute_interval(gain: float, base: RepeatedScores, best: RepeatedScores) -> tuple[float, float] | None:
    """Return Welch's interval, which allows for different spreads; None without any spread."""
    if base.deviation is None or best.deviation is None:
        return None
    base_part, best_part = base.deviation**2 / len(base.scores), best.deviation**2 / len(best.scores)
    variance = base_part + best_part
    if variance <= 0:
        return None
    freedom = variance**2 / (base_part**2 / (len(base.scores) - 1) + best_part**2 / (len(best.scores) - 1))
    reach = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return gain - reach, gain + reach


def _compose_verdict(
    base: RepeatedScores, best: RepeatedScores, gain: float | None, interval: tuple[float, float] | None, metric: Metric
) -> str:
    lost = "".join(
        f" {group.lost} of {group.lost + len(group.scores)} runs of the {name} gave no score and are left out, "
        "which flatters it."
        for name, group in (("base preset", base), ("winner", best))
        if group.lost
    )
    if gain is None:
        return f"No verdict: no run of the {'winner' if best.mean is None else 'base preset'} gave a score.{lost}"
    points = " points" if metric.is_error else ""
    counts = f"{format_count(len(best.scores), 'seed')} against {len(base.scores)}"
    verdict = (
        f"The winner is {metric.format_score(abs(gain))}{points} {'better' if gain > 0 else 'worse'} than the base "
        f"preset on average ({counts}"
    )
    if interval is None:
        is_single = min(len(base.scores), len(best.scores)) < 2
        why = "a single seed shows no spread" if is_single else "all seeds have the same score"
        return f"{verdict}): {why}, so there is no interval, and seed noise alone may explain the difference.{lost}"
    low, high = (metric.format_score(round(bound, 2 if metric.is_error else 9) + 0.0) for bound in interval)  # no -0.00
    verdict += f"; 95% interval of the gain {low} to {high})"
    if interval[0] <= 0 <= interval[1]:
        verdict += ": no more than seed noise may explain."
    else:
        verdict += f": more than seed noise explains{'' if gain > 0 else ', so keep the base preset'}."
    if min(len(base.scores), len(best.scores)) < MIN_RELIABLE_SEEDS:
        verdict += " So few seeds hardly show how far seeds spread; the interval assumes normal errors."
    return verdict + lost
