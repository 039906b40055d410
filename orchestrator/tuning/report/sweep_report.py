"""The report of a sweep: one HTML file that needs no other, its ranking as JSON and Markdown, its plots as files."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jinja2

from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io
from orchestrator.tuning import ranking
from orchestrator.tuning.importance import Importance, compute_importance
from orchestrator.tuning.param_axes import format_value
from orchestrator.tuning.ranking import METRIC_NAMES, SeedComparison, TextRow, find_winner, format_duration, rank_trials
from orchestrator.tuning.report import sweep_plots
from orchestrator.tuning.report.sweep_plots import Plot
from orchestrator.tuning.trial import MetricName, State, Trial

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "ranking.md", "ranking.json"
_TEMPLATE = "sweep.html.jinja"

_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("orchestrator.tuning"),
    autoescape=True,  # reasons and names may hold anything
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    folder: str,
    about: Mapping[str, object],
    trials: Sequence[Trial],
    metric: MetricName,
    base: Recipe,
    noise: SeedComparison | None,
) -> None:
    """Write report.html, ranking.json, ranking.md and a PNG of each plot below `folder` (a URL).

    about: name (or sweep), dataset, sampler, scheduler, and what was allowed: budget_trials, budget_epochs,
    budget_seconds; each may be absent or None. Other entries are listed as they are. base: the preset that the trials
    vary. noise: of repeats, None without. Raises StorageError.
    """
    found = compute_importance(trials, metric)
    drawn = sweep_plots.draw_plots(trials, metric, found.shares)
    content = {f"{plot.name}.png": plot.png for plot in drawn.values()}
    content[JSON_FILE] = (
        json.dumps(build_record(about, trials, metric, found, noise), indent=2, allow_nan=False) + "\n"
    ).encode()
    content[MARKDOWN_FILE] = render_markdown(about, trials, metric, base, noise).encode()
    content[HTML_FILE] = render_html(about, trials, metric, base, noise, found, drawn).encode()
    _remove_stale_plots(folder, content)
    for name, data in content.items():
        file_io.write_bytes(file_io.join(folder, name), data)


def render_html(
    about: Mapping[str, object],
    trials: Sequence[Trial],
    metric: MetricName,
    base: Recipe,
    noise: SeedComparison | None,
    found: Importance,
    drawn: Mapping[str, Plot],
) -> str:
    """The page."""
    best = ranking.find_winner(trials, metric)
    ranked = ranking.rank_trials(trials, metric)
    head, rows = ranking.build_columns(ranked, metric)
    return _environment.get_template(_TEMPLATE).render(
        title=get_title(about),
        headline=compose_headline(trials, metric, base),
        caveat=compose_caveat(trials, metric),
        facts=build_facts(about, trials, metric),
        best=best,
        base=base.name,
        changes=diff_with_base(best, base) if best else [],
        noise=noise,
        noise_rows=_build_seed_rows(noise, base) if noise else [],
        head=head,
        rows=rows,
        ends=[one.trial.reason for one in ranked],
        plots=drawn,
        pictures={name: base64.b64encode(plot.png).decode() for name, plot in drawn.items()},
        importance=found,
        importance_caveat=IMPORTANCE_CAVEAT,
    )


def render_markdown(
    about: Mapping[str, object], trials: Sequence[Trial], metric: MetricName, base: Recipe, noise: SeedComparison | None
) -> str:
    """The sentences of the report and the ranking, for a README or a ticket."""
    escaped = ranking.escape_markdown
    told = [*compose_headline(trials, metric, base), *([noise.verdict] if noise else [])]
    parts = [f"# {escaped(get_title(about))}", "\n".join(map(escaped, told))]
    facts = build_facts(about, trials, metric)
    parts.append("\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in facts))
    if caveat := compose_caveat(trials, metric):
        parts.append(escaped(caveat))
    parts.append(ranking.render_markdown(ranking.rank_trials(trials, metric), metric).rstrip())
    return "\n\n".join(parts) + "\n"


def build_record(
    about: Mapping[str, object],
    trials: Sequence[Trial],
    metric: MetricName,
    found: Importance,
    noise: SeedComparison | None,
) -> dict[str, Any]:
    """The ranking for programs: plain JSON values, without NaN; errors in percent, costs in seconds and shares of 1."""
    best = ranking.find_winner(trials, metric)
    made = {
        "about": dict(about),
        "metric": metric,
        "winner": best.name if best else None,
        "trials": [_build_entry(one, metric) for one in ranking.rank_trials(trials, metric)],
        "importance": asdict(found),
        "noise": asdict(noise) if noise else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(_replace_non_finite(made), default=str))
    return plain


def _build_entry(one: ranking.RankedTrial, metric: MetricName) -> dict[str, Any]:
    return {
        "rank": one.rank,
        "name": one.trial.name,
        "number": one.trial.number,
        "state": one.trial.state,
        "reason": one.trial.reason,
        metric: one.score,
        "epochs": one.epochs,
        "seconds": one.seconds,
        "cost_share": one.cost_share,
        "assignment": dict(one.trial.assignment),
        "curve": one.trial.get_curve(metric),
    }


def _replace_non_finite(value: Any) -> Any:
    """The same with None for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(name): _replace_non_finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _build_seed_rows(noise: SeedComparison, base: Recipe) -> list[ranking.TextRow]:
    return [
        (
            name,
            ", ".join(f"{score:.2f}" for score in one.scores) or "-",
            str(one.lost),
            "-" if one.mean is None else f"{one.mean:.2f}",
            "-" if one.deviation is None else f"{one.deviation:.2f}",
        )
        for name, one in ((f"base preset, {base.name}", noise.base), ("winner", noise.winner))
    ]


def _remove_stale_plots(folder: str, content: Mapping[str, bytes]) -> None:
    """Remove plots of an earlier report that this one does not have."""
    there = set(file_io.list_names(folder))
    for name in sweep_plots.PLOT_NAMES:
        if f"{name}.png" in there - set(content):
            file_io.remove(file_io.join(folder, f"{name}.png"))


IMPORTANCE_CAVEAT = (
    "Each share is how much worse a random forest foretells the score when that path's values are shuffled among the "
    "trials. It tells which paths mattered within the ranges searched, not which way to go, nor that one causes the "
    "other; two paths that only matter together share the credit, and of few trials the small shares are noise."
)
_STATE_ORDER: tuple[State, ...] = ("finished", "pruned", "stopped", "running", "waiting", "diverged", "failed")
_ABSENT = "absent"  # no JSON value
# Entries of `about` that the page has elsewhere; the others are listed as they are.
_SHOWN_ELSEWHERE = (
    "name",
    "sweep",
    "winner",
    "dataset",
    "sampler",
    "scheduler",
    "budget_trials",
    "budget_epochs",
    "budget_seconds",
)


def get_title(about: Mapping[str, object]) -> str:
    """What the sweep is called."""
    return str(about.get("name") or about.get("sweep") or "sweep")


def compose_headline(trials: Sequence[Trial], metric: MetricName, base: Recipe) -> list[str]:
    """Sentences that tell who won, by how much, and how far to believe it."""
    best, name = find_winner(trials, metric), METRIC_NAMES[metric]
    if best is None:
        return _compose_no_winner(trials, metric)
    score = best.get_score(metric) or 0.0
    told = [f"{best.name} wins with a {name} of {score:.2f}% after {format_count(best.trained_epochs, 'epoch')}."]
    if (same := find_base_trial(trials, base)) is best:
        told.append(f"It is the base preset, {base.name}: the sweep found nothing better.")
    elif same is not None and same.state == "finished" and (its := same.get_score(metric)) is not None:
        told.append(
            f"The base preset, {base.name}, was {same.name}: {its:.2f}%, which is {its - score:.2f} points more."
        )
    scored = [trial for trial in trials if trial.state == "finished" and trial.get_score(metric) is not None]
    if len(scored) > 1:
        told.append(
            f"It is the best of {len(scored)} that finished; the next has {rank_trials(scored, metric)[1].score:.2f}%."
        )
    return told


def compose_caveat(trials: Sequence[Trial], metric: MetricName) -> str:
    """Why the winner's own score is too good; empty without a winner."""
    if find_winner(trials, metric) is None:
        return ""
    return (
        f"The winner was chosen among {format_count(len(trials), 'trial')} by its error on the validation "
        "split, and luck "
        "helped to choose it: its own score is optimistic. Expect more errors on other images and under other seeds; "
        "only images that chose nothing can tell how many."
    )


def build_facts(about: Mapping[str, object], trials: Sequence[Trial], metric: MetricName) -> list[TextRow]:
    """What was searched and how, and the budget used of the budget allowed, as name and value."""
    counts = Counter(trial.state for trial in trials)
    states = ", ".join(f"{counts[state]} {state}" for state in _STATE_ORDER if counts[state])
    found: list[TextRow] = [
        (name, _format_fact(about[name])) for name in ("dataset", "sampler", "scheduler") if about.get(name) is not None
    ]
    found.append(
        ("metric", f"{METRIC_NAMES[metric]} on the validation split, in percent; of the averaged weights, if any")
    )
    allowed_trials = _format_allowed(f"{len(trials):,}", about.get("budget_trials"))
    found.append(("trials", allowed_trials + (f": {states}" if states else "")))
    epochs = sum(trial.trained_epochs for trial in trials)
    found.append(("epochs trained", _format_allowed(f"{epochs:,}", about.get("budget_epochs"))))
    seconds = about.get("budget_seconds")
    allowed = format_duration(seconds) if isinstance(seconds, int | float) else None
    found.append(
        (
            "time trained, of all trials together",
            _format_allowed(format_duration(sum(one.seconds for one in trials)), allowed),
        )
    )
    found += [
        (name.replace("_", " "), _format_fact(value)) for name, value in about.items() if name not in _SHOWN_ELSEWHERE
    ]
    return found


def diff_with_base(best: Trial, base: Recipe) -> list[TextRow]:
    """Each searched path with the base preset's value and the winner's, whole, and a mark where they differ.

    Then what differs without being searched, as what a searched kind brings along.
    """
    before, after = _flatten_recipe(base.to_dict()), _flatten_recipe(best.recipe.to_dict())
    rows: list[TextRow] = []
    for path, value in best.assignment.items():
        its = before.get(path, _ABSENT)
        rows.append((path, its, _to_json(value), "" if _is_same_value(its, _to_json(value)) else "changed"))
    for path in dict.fromkeys((*before, *after)):
        its, now = before.get(path, _ABSENT), after.get(path, _ABSENT)
        if path != "name" and path not in best.assignment and its != now:
            rows.append((path, its, now, "changed, not searched"))
    return rows


def find_base_trial(trials: Sequence[Trial], base: Recipe) -> Trial | None:
    """The trial whose recipe is the base preset, but for its name; the first if there are several."""
    wanted = _flatten_recipe(base.to_dict()) | {"name": ""}
    return next((trial for trial in trials if _flatten_recipe(trial.recipe.to_dict()) | {"name": ""} == wanted), None)


def format_count(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _compose_no_winner(trials: Sequence[Trial], metric: MetricName) -> list[str]:
    told = ["No trial has finished with a score, so there is no winner."]
    scored = [one for one in rank_trials(trials, metric) if one.score is not None]
    if scored:
        first = scored[0]
        told.append(
            f"{first.trial.name} came furthest: {METRIC_NAMES[metric]} {first.score:.2f}% at "
            f"{format_count(first.epochs, 'epoch')} of {first.trial.recipe.epochs}. "
            "An early score does not foretell the end."
        )
    return told


def _flatten_recipe(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every dotted path of a recipe with its value as JSON."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flatten_recipe(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _to_json(value)
    return found


def _to_json(value: Any) -> str:
    return json.dumps(value, default=str)


def _is_same_value(one: str, other: str) -> bool:
    """Whether two values are the same, be it 1 and 1.0."""
    return one == other or (one != _ABSENT and bool(json.loads(one) == json.loads(other)))


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
        return ", ".join(f"{name}: {_format_fact(one)}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else format_value(value)
