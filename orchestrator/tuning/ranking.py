"""The ranking of trials as a table, and whether the winner's gain is more than the noise of seeds."""

from __future__ import annotations

import math
import statistics
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.monitor.formatting import format_duration
from orchestrator.plotting.report_format import TextRow, format_count, format_markdown_table, format_text_table
from orchestrator.tuning.trial import Metric, Trial, format_assignment, format_value, make_short_names

MIN_RELIABLE_SEEDS = 5  # fewer hardly show how far seeds spread
_TEXT_COLUMNS = (1, 2)  # trial and state; the others are numbers


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


def rank_trials(trials: Sequence[Trial], metric: Metric) -> tuple[Trial, ...]:
    """Return the trials, best first.

    Finished ones come first, by their scores; of equals the one of fewer epochs, then the earlier one. An early score
    does not compare with a late one, so the others follow by the epochs that they reached and then by score. Diverged
    and failed ones come next, and waiting ones are last.
    """

    def get_sort_key(trial: Trial) -> tuple[int, float, float, int]:
        loss = trial.get_loss(metric)
        if trial.state == "finished":
            return 0, loss, trial.trained_epochs, trial.number
        group = {"diverged": 2, "failed": 2, "waiting": 3}.get(trial.state, 1)
        return group, -trial.trained_epochs, loss, trial.number

    return tuple(sorted(trials, key=get_sort_key))


def find_winner(trials: Sequence[Trial], metric: Metric) -> Trial | None:
    """Return the best of the finished trials; None when none has finished with a score."""
    first = next(iter(rank_trials(trials, metric)), None)
    has_won = first is not None and first.state == "finished" and first.get_score(metric) is not None
    return first if has_won else None


def compute_cost_shares(trials: Sequence[Trial]) -> list[float]:
    """Return the share of each trial in the seconds of training of all, from 0 to 1."""
    total = math.fsum(trial.seconds for trial in trials)
    return [trial.seconds / total if total > 0 else 0.0 for trial in trials]


def build_columns(ranked: Sequence[Trial], metric: Metric) -> tuple[TextRow, list[TextRow]]:
    """Return head and rows of the ranking: seven columns, then one for each searched path ("-" where absent)."""
    names = make_short_names(ranked)
    head: TextRow = ("rank", "trial", "state", metric.axis_label, "epochs", "time", "cost, %")
    # A path named like a column of the table, such as `epochs`, is shown as the recipe's.
    head += tuple(name if name not in head else f"recipe.{path}" for path, name in names.items())
    values = [
        tuple(format_value(trial.assignment[path]) if path in trial.assignment else "-" for path in names)
        for trial in ranked
    ]
    return head, [facts + rest for facts, rest in zip(_format_facts(ranked, metric), values, strict=True)]


def render_text(ranked: Sequence[Trial], metric: Metric, rows: int | None = None) -> str:
    """Return the ranking, or its first rows, as a plain table for a terminal or a log."""
    label = metric.label.replace(" error", " %") if metric.is_error else metric.label
    names, lines = make_short_names(ranked), list[TextRow]()
    for trial, facts in zip(ranked[:rows], _format_facts(ranked, metric)[:rows], strict=True):
        text = format_assignment(trial.assignment, names) or "-"
        if trial.reason and trial.state in ("diverged", "failed"):
            text += f" ({textwrap.shorten(trial.reason, 70, placeholder='...')})"
        lines.append((*facts, text))
    head = ("rank", "trial", "state", label, "epochs", "time", "cost %", "assignment")
    table = format_text_table([head, *lines], (*_TEXT_COLUMNS, len(head) - 1))
    return "\n".join(line.rstrip() for line in table) + "\n"


def render_markdown(ranked: Sequence[Trial], metric: Metric, rows: int | None = None) -> str:
    """Return the ranking, or its first rows, as a table in Markdown."""
    head, lines = build_columns(ranked, metric)
    right = [column for column in range(len(head)) if column not in _TEXT_COLUMNS]
    return format_markdown_table(head, lines[:rows], right)


def _format_facts(ranked: Sequence[Trial], metric: Metric) -> list[TextRow]:
    scores = metric.format_column([trial.get_score(metric) for trial in ranked])
    rows: list[TextRow] = []
    for trial, score, share in zip(ranked, scores, compute_cost_shares(ranked), strict=True):
        epochs, time = str(trial.trained_epochs), format_duration(trial.seconds)
        rows.append((str(len(rows) + 1), trial.name, trial.state, score, epochs, time, f"{100 * share:.1f}"))
    return rows


def compare_seeds(base_scores: Sequence[float], winner_scores: Sequence[float], metric: Metric) -> SeedComparison:
    """Return whether the winner's gain over the base preset is larger than seed noise.

    The scores are of runs with new seeds: the score that the winner was chosen by is lucky and would flatter it. A run
    without a score is given as NaN: it is counted, and left out of the figures.
    """
    base, best = _summarize_scores(base_scores), _summarize_scores(winner_scores)
    gain = None
    if base.mean is not None and best.mean is not None:
        gain = metric.to_loss(base.mean) - metric.to_loss(best.mean)
    interval = beyond = None
    if base.deviation is not None and best.deviation is not None and base.deviation + best.deviation > 0:
        from scipy import stats  # takes a second to import; few sweeps repeat

        losses = [[metric.to_loss(score) for score in group.scores] for group in (base, best)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a group whose scores are equal
            low, high = stats.ttest_ind(*losses, equal_var=False).confidence_interval(0.95)
        interval, beyond = (float(low), float(high)), bool(low > 0 or high < 0)
    return SeedComparison(base, best, gain, interval, beyond, _compose_verdict(base, best, gain, interval, metric))


def _summarize_scores(scores: Sequence[float]) -> RepeatedScores:
    finite = tuple(float(score) for score in scores if math.isfinite(score))
    mean = statistics.fmean(finite) if finite else None
    deviation = statistics.stdev(finite) if len(finite) > 1 else None
    return RepeatedScores(finite, len(scores) - len(finite), mean, deviation)


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
    verdict = (
        f"The winner is {metric.format_score(abs(gain))}{points} {'better' if gain > 0 else 'worse'} than the base "
        f"preset on average ({format_count(len(best.scores), 'seed')} against {len(base.scores)}"
    )
    if interval is None:
        return (
            f"{verdict}): too few or equal scores for an interval; seed noise alone may explain the difference.{lost}"
        )
    low, high = (metric.format_score(round(bound, 2 if metric.is_error else 9) + 0.0) for bound in interval)  # no -0.00
    verdict += f"; 95% interval of the gain {low} to {high}): "
    if interval[0] <= 0 <= interval[1]:
        verdict += "no more than seed noise may explain."
    else:
        verdict += f"more than seed noise explains{'' if gain > 0 else ', so keep the base preset'}."
    if min(len(base.scores), len(best.scores)) < MIN_RELIABLE_SEEDS:
        verdict += " So few seeds hardly show how far seeds spread; the interval assumes normal errors."
    return verdict + lost
