"""The report of a sweep: one self-contained HTML file, the ranking as JSON and Markdown, and the plots."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.config.base import to_jsonable
from orchestrator.config.overrides import flatten_config
from orchestrator.monitor.formatting import format_duration
from orchestrator.plotting.canvas import Plot
from orchestrator.plotting.report_format import TextRow, escape_markdown, format_count, render_page, write_report_files
from orchestrator.recipe.config import Recipe
from orchestrator.tuning import ranking
from orchestrator.tuning.importance import Importance, compute_importance
from orchestrator.tuning.param_names import format_value
from orchestrator.tuning.ranking import SeedComparison, find_winner, rank_trials
from orchestrator.tuning.report import sweep_plots
from orchestrator.tuning.trial import Metric, State, Trial

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "ranking.md", "ranking.json"
IMPORTANCE_CAVEAT = (
    "Each share is PED-ANOVA's (arXiv 2304.10255): how much the values of that path among the best quarter of the "
    "trials differ from those among all. It says which paths mattered within the ranges searched, not in which "
    "direction, nor what is the cause; of few trials the small shares are noise."
)
_STATE_ORDER: tuple[State, ...] = ("finished", "pruned", "stopped", "running", "waiting", "diverged", "failed")
_ABSENT = "absent"  # no JSON value
# Entries of `about` that the page has elsewhere; the others are listed as they are.
_SHOWN_ELSEWHERE = (
    *("name", "sweep", "winner", "dataset", "sampler", "scheduler"),
    *("budget_trials", "budget_epochs", "budget_seconds"),
)


def write_report(
    folder: str,
    about: Mapping[str, object],
    trials: Sequence[Trial],
    metric: Metric,
    base: Recipe,
    noise: SeedComparison | None,
) -> None:
    """Write report.html, ranking.json, ranking.md and a PNG of each plot below `folder` (a URL).

    about: name (or sweep), dataset, sampler, scheduler, and the limits budget_trials, budget_epochs, budget_seconds;
    each may be absent or None. Other entries are listed as they are. base: the preset that the trials vary. noise: of
    the repeats, if any. Raises StorageError.
    """
    importance = compute_importance(trials, metric)
    plots = sweep_plots.draw_plots(trials, metric, importance.shares)
    record = build_record(about, trials, metric, importance, noise)
    content = {f"{plot.name}.png": plot.png for plot in plots.values()}
    content[JSON_FILE] = (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()
    content[MARKDOWN_FILE] = render_markdown(about, trials, metric, base, noise).encode()
    content[HTML_FILE] = render_html(about, trials, metric, base, noise, importance, plots).encode()
    write_report_files(folder, content, sweep_plots.PLOT_NAMES)


def render_html(
    about: Mapping[str, object],
    trials: Sequence[Trial],
    metric: Metric,
    base: Recipe,
    noise: SeedComparison | None,
    importance: Importance,
    plots: Mapping[str, Plot],
) -> str:
    """Return the page."""
    best, ranked = find_winner(trials, metric), rank_trials(trials, metric)
    head, rows = ranking.build_columns(ranked, metric)
    return render_page(
        "orchestrator.tuning",
        "sweep.html.jinja",
        title=get_title(about),
        headline=compose_headline(trials, metric, base),
        caveat=compose_caveat(trials, metric),
        facts=build_facts(about, trials, metric),
        best=best,
        base=base.name,
        changes=diff_with_base(best, base) if best else [],
        noise=noise,
        noise_rows=_build_seed_rows(noise, base, metric) if noise else [],
        head=head,
        rows=rows,
        ends=[entry.trial.reason for entry in ranked],
        metric=metric,
        plots=plots,
        pictures={name: base64.b64encode(plot.png).decode() for name, plot in plots.items()},
        importance=importance,
        importance_caveat=IMPORTANCE_CAVEAT,
    )


def render_markdown(
    about: Mapping[str, object], trials: Sequence[Trial], metric: Metric, base: Recipe, noise: SeedComparison | None
) -> str:
    """Return the sentences of the report and the ranking, for a README or a ticket."""
    sentences = [*compose_headline(trials, metric, base), *([noise.verdict] if noise else [])]
    facts = build_facts(about, trials, metric)
    caveat = compose_caveat(trials, metric)
    parts = [
        f"# {escape_markdown(get_title(about))}",
        "\n".join(map(escape_markdown, sentences)),
        "\n".join(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in facts),
        *([escape_markdown(caveat)] if caveat else []),
        ranking.render_markdown(rank_trials(trials, metric), metric),
    ]
    return "\n\n".join(parts)


def build_record(
    about: Mapping[str, object],
    trials: Sequence[Trial],
    metric: Metric,
    importance: Importance,
    noise: SeedComparison | None,
) -> dict[str, Any]:
    """Return the ranking as plain JSON values, without NaN; costs in seconds and shares of 1."""
    best = find_winner(trials, metric)
    shares = None if importance.shares is None else dict(importance.shares)
    record = {
        "about": dict(about),
        "metric": metric.name,
        "winner": best.name if best else None,
        "trials": [_build_entry(ranked, metric) for ranked in rank_trials(trials, metric)],
        # Programs may read all four keys; the share of the variance is unknown.
        "importance": {"shares": shares, "trials": importance.trials, "explained": None, "told": importance.note},
        "noise": asdict(noise) if noise else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(_replace_non_finite(record), default=str))
    return plain


def _build_entry(ranked: ranking.RankedTrial, metric: Metric) -> dict[str, Any]:
    trial = ranked.trial
    return {
        "rank": ranked.rank,
        "name": trial.name,
        "number": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        metric.name: ranked.score,
        "epochs": ranked.epochs,
        "seconds": ranked.seconds,
        "cost_share": ranked.cost_share,
        "assignment": dict(trial.assignment),
        "curve": trial.get_curve(metric),
    }


def _replace_non_finite(value: Any) -> Any:
    """Return the value with None for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(name): _replace_non_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _build_seed_rows(noise: SeedComparison, base: Recipe, metric: Metric) -> list[TextRow]:
    return [
        (
            name,
            ", ".join(metric.format_score(score) for score in group.scores) or "-",
            str(group.lost),
            metric.format_score(group.mean),
            metric.format_score(group.deviation),
        )
        for name, group in ((f"base preset, {base.name}", noise.base), ("winner", noise.winner))
    ]


def get_title(about: Mapping[str, object]) -> str:
    """Return the name of the sweep."""
    return str(about.get("name") or about.get("sweep") or "sweep")


def compose_headline(trials: Sequence[Trial], metric: Metric, base: Recipe) -> list[str]:
    """Return sentences that say who won, by how much, and how far to believe it."""
    best = find_winner(trials, metric)
    if best is None:
        return _compose_no_winner(trials, metric)
    score = best.get_score(metric) or 0.0
    sentences = [
        f"{best.name} wins with a {metric.label} of {metric.format_score(score, unit=True)} after "
        f"{format_count(best.trained_epochs, 'epoch')}."
    ]
    same = find_base_trial(trials, base)
    if same is best:
        sentences.append(f"It is the base preset, {base.name}: the sweep found nothing better.")
    elif same is not None and same.state == "finished" and (other := same.get_score(metric)) is not None:
        points, order = " points" if metric.is_error else "", "less" if metric.maximize else "more"
        gap = metric.format_score(metric.to_loss(other) - metric.to_loss(score))
        sentences.append(
            f"The base preset, {base.name}, was {same.name}: {metric.format_score(other, unit=True)}, which is "
            f"{gap}{points} {order}."
        )
    scored = [trial for trial in trials if trial.state == "finished" and trial.get_score(metric) is not None]
    if len(scored) > 1:
        second = metric.format_score(rank_trials(scored, metric)[1].score, unit=True)
        sentences.append(f"It is the best of {len(scored)} that finished; the next has {second}.")
    return sentences


def compose_caveat(trials: Sequence[Trial], metric: Metric) -> str:
    """Return why the winner's own score is too good; empty without a winner."""
    if find_winner(trials, metric) is None:
        return ""
    count, label = format_count(len(trials), "trial"), "error" if metric.is_error else metric.label
    return (
        f"The winner was chosen among {count} by its {label} on the validation split, and luck helped to choose it: "
        "its own score is optimistic. Expect a worse one on other images and under other seeds; only images that chose "
        "nothing show how much worse."
    )


def build_facts(about: Mapping[str, object], trials: Sequence[Trial], metric: Metric) -> list[TextRow]:
    """Return names and values: what was searched and how, and the budget used of the budget allowed."""
    counts = Counter(trial.state for trial in trials)
    states = ", ".join(f"{counts[state]} {state}" for state in _STATE_ORDER if counts[state])
    facts: list[TextRow] = [
        (name, _format_fact(about[name])) for name in ("dataset", "sampler", "scheduler") if about.get(name) is not None
    ]
    unit = "in percent" if metric.is_error else "higher is better" if metric.maximize else "less is better"
    facts.append(("metric", f"{metric.label} on the validation split, {unit}; of the averaged weights, if any"))
    allowed = _format_allowed(f"{len(trials):,}", about.get("budget_trials"))
    facts.append(("trials", allowed + (f": {states}" if states else "")))
    epochs = sum(trial.trained_epochs for trial in trials)
    facts.append(("epochs trained", _format_allowed(f"{epochs:,}", about.get("budget_epochs"))))
    limit = about.get("budget_seconds")
    time = format_duration(sum(trial.seconds for trial in trials))
    time = _format_allowed(time, format_duration(limit) if isinstance(limit, int | float) else None)
    facts.append(("time trained, of all trials together", time))
    rest = {name: value for name, value in about.items() if name not in _SHOWN_ELSEWHERE}
    return facts + [(name.replace("_", " "), _format_fact(value)) for name, value in rest.items()]


def diff_with_base(best: Trial, base: Recipe) -> list[TextRow]:
    """Return each searched path with the base preset's value, the winner's, and a mark where they differ.

    Then come other differences, such as those that a searched kind brings along.
    """
    before, after = _flatten_recipe(base), _flatten_recipe(best.recipe)
    rows: list[TextRow] = []
    for path, value in best.assignment.items():
        old, new = before.get(path, _ABSENT), json.dumps(value, default=to_jsonable)
        rows.append((path, old, new, "" if _is_same_value(old, new) else "changed"))
    for path in dict.fromkeys((*before, *after)):
        old, new = before.get(path, _ABSENT), after.get(path, _ABSENT)
        if path != "name" and path not in best.assignment and old != new:
            rows.append((path, old, new, "changed, not searched"))
    return rows


def find_base_trial(trials: Sequence[Trial], base: Recipe) -> Trial | None:
    """Return the first trial whose recipe is the base preset, whatever its name; None without one."""
    expected = _flatten_recipe(base) | {"name": ""}
    return next((trial for trial in trials if _flatten_recipe(trial.recipe) | {"name": ""} == expected), None)


def _compose_no_winner(trials: Sequence[Trial], metric: Metric) -> list[str]:
    sentences = ["No trial has finished with a score, so there is no winner."]
    first = next((ranked for ranked in rank_trials(trials, metric) if ranked.score is not None), None)
    if first is not None:
        sentences.append(
            f"{first.trial.name} came furthest: {metric.label} {metric.format_score(first.score, unit=True)} at "
            f"{format_count(first.epochs, 'epoch')} of {first.trial.recipe.epochs}. An early score does not predict "
            "the final one."
        )
    return sentences


def _flatten_recipe(recipe: Recipe) -> dict[str, str]:
    """Return every dotted path of a recipe with its value as JSON."""
    return {path: json.dumps(value, default=to_jsonable) for path, value in flatten_config(recipe).items()}


def _is_same_value(old: str, new: str) -> bool:
    """Return whether two values are the same, such as 1 and 1.0."""
    return old == new or (old != _ABSENT and bool(json.loads(old) == json.loads(new)))


def _format_allowed(used: str, allowed: object) -> str:
    if allowed is None:
        return used
    return f"{used} of {f'{allowed:,}' if isinstance(allowed, int) else allowed} allowed"


def _format_fact(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_fact, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_format_fact(item)}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else format_value(value)
