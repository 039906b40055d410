"""The report of a sweep: one self-contained HTML file, the ranking as JSON and Markdown, and the plots."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from pydantic_core import to_json

from orchestrator.config.base import to_jsonable
from orchestrator.config.overrides import flatten_config
from orchestrator.monitor.formatting import format_duration
from orchestrator.plotting.canvas import add_legend, create_figure, label_axes, render_png
from orchestrator.plotting.report_format import TextRow, escape_markdown, format_count, render_page, write_report_files
from orchestrator.recipe.config import Recipe, is_same_but_for_code
from orchestrator.tuning import ranking
from orchestrator.tuning.importance import Importance, compute_importance, is_log
from orchestrator.tuning.ranking import SeedComparison, find_winner, rank_trials
from orchestrator.tuning.trial import Metric, State, Trial

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "ranking.md", "ranking.json"
# Some of older versions, which a new report replaces.
PLOT_NAMES = ("errors", "budget", "rates", "parallel", "importance")
# Okabe and Ito's colours, which colour-blind readers tell apart, each with a marker of its own.
STATE_STYLES: dict[State, tuple[str, str]] = {
    "finished": ("#0072b2", "o"),
    "pruned": ("#e69f00", "v"),
    "stopped": ("#009e73", "s"),
    "running": ("#56b4e9", ">"),
    "diverged": ("#d55e00", "X"),
    "failed": ("#000000", "P"),
    "waiting": ("#9aa3ac", "."),
}
_ABSENT = "absent"  # no JSON value


@dataclass(frozen=True)
class SweepReport:
    """The report of the trials of a sweep.

    about: the name as `sweep`, and facts, listed but for None. base: the preset that the trials vary. noise: of the
    repeats, if any.
    """

    about: Mapping[str, object]
    trials: Sequence[Trial]
    metric: Metric
    base: Recipe
    noise: SeedComparison | None = None

    def write(self, folder: str) -> None:
        """Write report.html, ranking.json, ranking.md and a PNG of each plot below `folder` (a URL).

        Raises StorageError.
        """
        content: dict[str, bytes] = {}
        if any(math.isfinite(score) for trial in self.trials for _, score in trial.get_curve(self.metric)):
            content["errors.png"] = render_png(draw_errors(self.trials, self.metric), self._plot_title)
        content[JSON_FILE] = to_json(self.build_record(), indent=2, inf_nan_mode="null", fallback=str) + b"\n"
        content[MARKDOWN_FILE] = self.render_markdown().encode()
        content[HTML_FILE] = self.render_html(content.get("errors.png")).encode()
        write_report_files(folder, content, PLOT_NAMES)

    @cached_property
    def _best(self) -> Trial | None:
        return find_winner(self.trials, self.metric)

    @cached_property
    def _ranked(self) -> tuple[Trial, ...]:
        return rank_trials(self.trials, self.metric)

    @cached_property
    def _importance(self) -> Importance:
        return compute_importance(self.trials, self.metric)

    @property
    def _plot_title(self) -> str:
        return f"Validation {'error' if self.metric.is_error else self.metric.label} of every trial"

    def render_html(self, plot: bytes | None) -> str:
        """Return the page; plot: a PNG of the errors."""
        head, rows = ranking.build_columns(self._ranked, self.metric)
        noise = self.noise
        return render_page(
            "orchestrator.tuning",
            "sweep.html.jinja",
            title=self.about.get("sweep", "sweep"),
            headline=self.compose_headline(),
            caveat=self._compose_caveat(),
            facts=self.build_facts(),
            best=self._best,
            base=self.base.name,
            changes=diff_with_base(self._best, self.base) if self._best else [],
            noise=noise,
            noise_rows=[(f"base preset, {self.base.name}", noise.base), ("winner", noise.winner)] if noise else [],
            head=head,
            rows=rows,
            ends=[trial.reason for trial in self._ranked],
            metric=self.metric,
            plot_title=self._plot_title,
            plot=base64.b64encode(plot).decode() if plot else "",
            importance=self._importance,
        )

    def render_markdown(self) -> str:
        """Return the sentences of the report and the ranking, for a README or a ticket."""
        sentences = [*self.compose_headline(), *([self.noise.verdict] if self.noise else [])]
        caveat = self._compose_caveat()
        parts = [
            f"# {escape_markdown(str(self.about.get('sweep', 'sweep')))}",
            "\n".join(map(escape_markdown, sentences)),
            "\n".join(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in self.build_facts()),
            *([escape_markdown(caveat)] if caveat else []),
            ranking.render_markdown(self._ranked, self.metric),
        ]
        return "\n\n".join(parts)

    def build_record(self) -> dict[str, Any]:
        """Return the ranking for JSON; costs in seconds and shares of 1."""
        entries = [
            {
                "rank": rank,
                "name": trial.name,
                "number": trial.number,
                "state": trial.state,
                "reason": trial.reason,
                self.metric.name: trial.get_score(self.metric),
                "epochs": trial.trained_epochs,
                "seconds": trial.seconds,
                "cost_share": share,
                "assignment": dict(trial.assignment),
                "curve": trial.get_curve(self.metric),
            }
            for rank, (trial, share) in enumerate(
                zip(self._ranked, ranking.compute_cost_shares(self._ranked), strict=True), 1
            )
        ]
        # Programs may read all four keys of the importance; the share of the variance is unknown.
        shares, count, note = self._importance
        return {
            "about": dict(self.about),
            "metric": self.metric.name,
            "winner": self._best.name if self._best else None,
            "trials": entries,
            "importance": {"shares": shares, "trials": count, "explained": None, "told": note},
            "noise": asdict(self.noise) if self.noise else None,
        }

    def compose_headline(self) -> list[str]:
        """Return sentences that say who won, by how much, and how far to believe it."""
        metric, base, best = self.metric, self.base, self._best

        def format_score(trial: Trial) -> str:
            return metric.format_score(trial.get_score(metric), unit=True)

        if best is None:
            return ["No trial has finished with a score, so there is no winner."]
        finished = [trial for trial in self._ranked if trial.state == "finished"]
        others = [trial for trial in finished[1:] if trial.get_score(metric) is not None]
        sentences = [
            f"{best.name} wins with a {metric.label} of {format_score(best)} after "
            f"{format_count(best.trained_epochs, 'epoch')}."
        ]
        same = find_base_trial(self.trials, base)
        if same is best:
            sentences.append(f"It is the base preset, {base.name}: the sweep found nothing better.")
        elif same is not None and same in others:
            points, order = " points" if metric.is_error else "", "less" if metric.maximize else "more"
            gap = metric.format_score(same.get_loss(metric) - best.get_loss(metric))
            sentences.append(
                f"The base preset, {base.name}, was {same.name}: {format_score(same)}, which is {gap}{points} {order}."
            )
        if others:
            count, second = len(others) + 1, format_score(others[0])
            sentences.append(f"It is the best of {count} that finished; the next has {second}.")
        return sentences

    def _compose_caveat(self) -> str:
        """Return why the winner's own score is too good; empty without a winner."""
        if self._best is None:
            return ""
        label = "error" if self.metric.is_error else self.metric.label
        return (
            f"The winner was chosen among {format_count(len(self.trials), 'trial')} by its {label} on the validation "
            "split, and luck helped to choose it: its own score is optimistic. Expect a worse one on other images and "
            "under other seeds; only images that chose nothing show how much worse."
        )

    def build_facts(self) -> list[TextRow]:
        """Return names and values: what came of it, then what was searched and how."""
        metric, trials = self.metric, self.trials
        counts = Counter(trial.state for trial in trials)
        states = ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts[state])
        unit = "in percent" if metric.is_error else "higher is better" if metric.maximize else "less is better"
        others = {name: value for name, value in self.about.items() if value is not None and name != "sweep"}
        return [
            ("metric", f"{metric.label} on the validation split, {unit}; of the averaged weights, if any"),
            ("trials", f"{len(trials):,}" + (f": {states}" if states else "")),
            ("epochs trained", f"{sum(trial.trained_epochs for trial in trials):,}"),
            ("time trained, of all trials together", format_duration(sum(trial.seconds for trial in trials))),
            *(
                (name.replace("_", " "), value if isinstance(value, str) else json.dumps(value, default=str))
                for name, value in others.items()
            ),
        ]


def diff_with_base(best: Trial, base: Recipe) -> list[TextRow]:
    """Return each searched path with the base preset's value, the winner's, and a mark where they differ.

    Then come other differences, such as those that a searched kind brings along.
    """
    before, after = _flatten_recipe(base), _flatten_recipe(best.recipe)
    rows: list[TextRow] = []
    for path in dict.fromkeys((*best.assignment, *before, *after)):
        old, new = before.get(path, _ABSENT), after.get(path, _ABSENT)
        is_searched = path in best.assignment
        mark = "" if old == new else "changed" if is_searched else "changed, not searched"
        if is_searched or (mark and path not in ("name", "code")):
            rows.append((path, old, new, mark))
    return rows


def find_base_trial(trials: Sequence[Trial], base: Recipe) -> Trial | None:
    """Return the first trial whose recipe is the base preset, whatever its name; None without one."""
    renamed = ((trial, trial.recipe.model_copy(update={"name": base.name})) for trial in trials)
    return next((trial for trial, recipe in renamed if is_same_but_for_code(recipe, base)), None)


def _flatten_recipe(recipe: Recipe) -> dict[str, str]:
    return {path: json.dumps(value, default=to_jsonable) for path, value in flatten_config(recipe).items()}


def draw_errors(trials: Sequence[Trial], metric: Metric) -> Figure:
    """Draw the score of each trial against the epoch, coloured by the trial's state."""
    figure, (axes,) = create_figure(9.0, 4.6)
    label_axes(axes, "", "epoch", metric.axis_label)
    best = find_winner(trials, metric)
    validated = [trial for trial in trials if trial.get_curve(metric)]
    all_scores = []
    for trial in sorted(validated, key=lambda trial: trial is best):  # the winner lies above the others
        curve = [(epoch, score if math.isfinite(score) else math.nan) for epoch, score in trial.get_curve(metric)]
        color, marker = STATE_STYLES[trial.state]
        style: dict[str, Any] = {"linewidth": 1.3, "alpha": max(0.4, min(0.95, 1.1 - 0.01 * len(validated)))}
        if trial is best:
            rim = withStroke(linewidth=4.6, foreground="white")
            style = {"linewidth": 3.2, "path_effects": [rim], "label": f"{best.name}, the winner"}
        axes.plot(*zip(*curve, strict=True), color=color, zorder=4 if trial is best else 2, **style)
        finite = [point for point in curve if math.isfinite(point[1])]
        all_scores += [score for _, score in finite]
        if finite:
            axes.plot(*finite[-1], marker, markersize=6, color=color, markeredgecolor="white", zorder=5)
    if is_log(all_scores):
        # With 5 and 20 instead of powers of ten.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0.0)
    for state, (color, marker) in STATE_STYLES.items():
        if count := sum(trial.state == state for trial in validated):
            axes.plot([], [], color=color, marker=marker, linewidth=1.3, label=f"{state} ({count})")
    add_legend(figure, axes, 6)
    return figure
