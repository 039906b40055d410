"""The report of a sweep: one HTML file that needs no other, its ranking as JSON and Markdown, its plots as files."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jinja2

from orchestrator.recipe.config import Recipe
from orchestrator.storage import files
from orchestrator.tuning import plots, ranking, report_text
from orchestrator.tuning.importance import Importance, importance
from orchestrator.tuning.plots import Plot
from orchestrator.tuning.ranking import Noise
from orchestrator.tuning.trials import Metric, Trial

HTML, MARKDOWN, JSON = "report.html", "ranking.md", "ranking.json"
_TEMPLATE = "sweep.html.jinja"

_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("orchestrator.tuning"),
    autoescape=True,  # reasons and names may hold anything
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(
    folder: str, about: Mapping[str, object], trials: Sequence[Trial], metric: Metric, base: Recipe, noise: Noise | None
) -> None:
    """Write report.html, ranking.json, ranking.md and a PNG of each plot below `folder` (a URL).

    about: name (or sweep), dataset, sampler, scheduler, and what was allowed: budget_trials, budget_epochs,
    budget_seconds; each may be absent or None. Other entries are listed as they are. base: the preset that the trials
    vary. noise: of repeats, None without. Raises StorageError.
    """
    found = importance(trials, metric)
    drawn = plots.plots(trials, metric, found.shares)
    content = {f"{plot.name}.png": plot.png for plot in drawn.values()}
    content[JSON] = (json.dumps(record(about, trials, metric, found, noise), indent=2, allow_nan=False) + "\n").encode()
    content[MARKDOWN] = markdown(about, trials, metric, base, noise).encode()
    content[HTML] = html(about, trials, metric, base, noise, found, drawn).encode()
    _remove_stale(folder, content)
    for name, data in content.items():
        files.write_bytes(files.join(folder, name), data)


def html(
    about: Mapping[str, object],
    trials: Sequence[Trial],
    metric: Metric,
    base: Recipe,
    noise: Noise | None,
    found: Importance,
    drawn: Mapping[str, Plot],
) -> str:
    """The page."""
    best = ranking.winner(trials, metric)
    ranked = ranking.rank(trials, metric)
    head, rows = ranking.columns(ranked, metric)
    return _environment.get_template(_TEMPLATE).render(
        title=report_text.title(about),
        headline=report_text.headline(trials, metric, base),
        caveat=report_text.caveat(trials, metric),
        facts=report_text.facts(about, trials, metric),
        best=best,
        base=base.name,
        changes=report_text.against_base(best, base) if best else [],
        noise=noise,
        noise_rows=_noise_rows(noise, base) if noise else [],
        head=head,
        rows=rows,
        ends=[one.trial.reason for one in ranked],
        plots=drawn,
        pictures={name: base64.b64encode(plot.png).decode() for name, plot in drawn.items()},
        importance=found,
        importance_caveat=report_text.IMPORTANCE_CAVEAT,
    )


def markdown(
    about: Mapping[str, object], trials: Sequence[Trial], metric: Metric, base: Recipe, noise: Noise | None
) -> str:
    """The sentences of the report and the ranking, for a README or a ticket."""
    escaped = ranking.escaped
    told = [*report_text.headline(trials, metric, base), *([noise.verdict] if noise else [])]
    parts = [f"# {escaped(report_text.title(about))}", "\n".join(map(escaped, told))]
    facts = report_text.facts(about, trials, metric)
    parts.append("\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in facts))
    if caveat := report_text.caveat(trials, metric):
        parts.append(escaped(caveat))
    parts.append(ranking.markdown(ranking.rank(trials, metric), metric).rstrip())
    return "\n\n".join(parts) + "\n"


def record(
    about: Mapping[str, object], trials: Sequence[Trial], metric: Metric, found: Importance, noise: Noise | None
) -> dict[str, Any]:
    """The ranking for programs: plain JSON values, without NaN; errors in percent, costs in seconds and shares of 1."""
    best = ranking.winner(trials, metric)
    made = {
        "about": dict(about),
        "metric": metric,
        "winner": best.name if best else None,
        "trials": [_entry(one, metric) for one in ranking.rank(trials, metric)],
        "importance": asdict(found),
        "noise": asdict(noise) if noise else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(_finite(made), default=str))
    return plain


def _entry(one: ranking.Ranked, metric: Metric) -> dict[str, Any]:
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
        "curve": one.trial.curve(metric),
    }


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _noise_rows(noise: Noise, base: Recipe) -> list[ranking.Row]:
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


def _remove_stale(folder: str, content: Mapping[str, bytes]) -> None:
    """Remove plots of an earlier report that this one does not have."""
    there = set(files.list_names(folder))
    for name in plots.FILES:
        if f"{name}.png" in there - set(content):
            files.remove(files.join(folder, f"{name}.png"))
