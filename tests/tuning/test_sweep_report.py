"""The report of a sweep: complete, by itself, escaped, and there whatever became of the trials."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from orchestrator.recipe.presets import googlenet_digits
from orchestrator.tuning import ranking, sweep_report
from orchestrator.tuning.ranking import SeedComparison
from orchestrator.tuning.sweep_report import SweepReport
from orchestrator.tuning.trial import Metric, Trial
from tests.support.pages import Page
from tests.tuning import made

METRIC = Metric(name="top1_error")
ABOUT = {
    "sweep": "digits-rates",
    "dataset": "digits",
    "sampler": "random",
    "scheduler": "asha",
    "budget_trials": 16,
    "budget_epochs": 1000,
    "budget_seconds": None,
    "seed": 7,
}


def page(trials: list[Trial], noise: SeedComparison | None = None, **about: object) -> Page:
    """The page without plots: they take a while."""
    return Page(SweepReport({**ABOUT, **about}, trials, METRIC, googlenet_digits(), noise).render_html(None))


# ------------------------------------------------------------------ the whole
def test_everything_is_written_and_needs_no_other_file(tmp_path: Path) -> None:
    trials = made.sweep(16)
    best = ranking.find_winner(trials, METRIC)
    assert best is not None
    noise = ranking.compare_seeds([5.0, 5.2, 5.1], [4.0, 4.1, 4.2], METRIC)
    SweepReport(ABOUT, trials, METRIC, googlenet_digits(), noise).write(str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "ranking.json", "ranking.md", "errors.png"} <= names
    assert {name for name in names if name.endswith(".png")} <= {f"{name}.png" for name in sweep_report.PLOT_NAMES}
    text = (tmp_path / "report.html").read_text()
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    outward = [value for _, name, value in found.attributes if name in ("href", "src", "action")]
    assert not [value for value in outward if not value.startswith(("#", "data:image/png;base64,"))]
    assert not re.search(r"https?:|@import|url\(", text)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert found.tags.count("img") == sum(name.endswith(".png") for name in names)
    identifiers = {value for _, name, value in found.attributes if name == "id"}
    assert {value[1:] for value in outward if value.startswith("#")} <= identifiers
    assert "@media print" in text
    assert f"{best.name} wins with a top-1 error of {best.get_score(METRIC):.2f}% after 26 epochs." in found.all_text
    assert "its own score is optimistic" in found.all_text
    assert "more than seed noise explains" in found.all_text
    assert "budget trials 16" in found.all_text
    assert f"epochs trained {sum(one.trained_epochs for one in trials):,}" in found.all_text
    assert "seed 7" in found.all_text
    for one in trials:
        assert one.name in found.all_text


def test_the_json_holds_every_trial(tmp_path: Path) -> None:
    trials = made.sweep(12)
    SweepReport(ABOUT, trials, METRIC, googlenet_digits(), None).write(str(tmp_path))
    found = json.loads((tmp_path / "ranking.json").read_text())
    best = ranking.find_winner(trials, METRIC)
    assert best is not None
    assert found["winner"] == best.name == found["trials"][0]["name"]
    assert found["metric"] == METRIC.name
    assert [one["rank"] for one in found["trials"]] == list(range(1, 13))
    assert found["trials"][0]["assignment"] == best.assignment
    assert found["trials"][0][METRIC.name] == best.get_score(METRIC)
    assert found["trials"][0]["curve"][-1] == [26, best.get_score(METRIC)]
    assert sum(one["cost_share"] for one in found["trials"]) == pytest.approx(1.0)
    assert found["noise"] is None
    assert found["about"] == ABOUT


def test_the_markdown_holds_the_ranking() -> None:
    trials = made.sweep(12)
    noise = ranking.compare_seeds([5.0], [4.0], METRIC)
    text = SweepReport(ABOUT, trials, METRIC, googlenet_digits(), noise).render_markdown()
    assert text.startswith("# digits-rates\n")
    assert ranking.render_markdown(ranking.rank_trials(trials, METRIC), METRIC) in text
    assert "too few or equal scores for an interval" in text
    assert "is optimistic" in text


def test_names_may_hold_anything(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    trials = [
        made.trial(1, [5.0], assignment={"a.kind": evil, f"b.{evil}": 1.0}),
        made.trial(2, [6.0], "failed", {"a.kind": "$x$"}, reason=f"{evil} & more"),
    ]
    about = {**ABOUT, "sweep": f"<b>{evil}", "sampler": evil, evil: {evil: [evil]}}
    SweepReport(about, trials, METRIC, googlenet_digits(), None).write(str(tmp_path))
    text = (tmp_path / "report.html").read_text()
    assert "script" not in Page(text).tags
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"(?<!\\)<", (tmp_path / "ranking.md").read_text())


# ------------------------------------------------------------------ whatever became of the trials
@pytest.mark.parametrize(
    "trials",
    [
        [],
        [made.trial(1, [], "waiting", {"a": 1})],
        [made.trial(1, [5.0], assignment={"a": 1})],
        [made.trial(1, [5.0])],
        [made.trial(1, [math.nan], "diverged", {"a": 1}), made.trial(2, [math.inf], assignment={"a": 2})],
        [made.trial(n, [50.0 - n], "pruned", {"a": n}) for n in range(1, 10)],
    ],
)
def test_any_sweep_has_a_report(tmp_path: Path, trials: list[Trial]) -> None:
    (tmp_path / "importance.png").write_bytes(b"of an earlier report")
    SweepReport({}, trials, METRIC, googlenet_digits(), None).write(str(tmp_path))
    found = json.loads((tmp_path / "ranking.json").read_text(), parse_constant=pytest.fail)
    assert len(found["trials"]) == len(trials)
    assert "importance.png" not in {one.name for one in tmp_path.iterdir()} or len(trials) >= 8
    text = Page((tmp_path / "report.html").read_text()).all_text
    if any(one.state == "finished" and one.get_score(METRIC) for one in trials):
        assert "t001 wins with a top-1 error of 5.00% after 1 epoch." in text
    else:
        assert "No trial has finished with a score, so there is no winner." in text
        assert "optimistic" not in text


# ------------------------------------------------------------------ against the base
def test_the_base_among_the_trials_is_named() -> None:
    base = googlenet_digits()
    wide = base.model_copy(update={"name": "t2", "model": base.model.model_copy(update={"width": 0.5})})
    first = made.trial(1, [9.0, 6.0], assignment={"model.width": 0.25}, recipe=base.model_copy(update={"name": "t1"}))
    second = made.trial(2, [9.0, 5.5], assignment={"model.width": 0.5}, recipe=wide)
    sentences = SweepReport({}, [first, second], METRIC, base).compose_headline()
    assert sentences == [
        "t002 wins with a top-1 error of 5.50% after 2 epochs.",
        "The base preset, googlenet-digits, was t001: 6.00%, which is 0.50 points more.",
        "It is the best of 2 that finished; the next has 6.00%.",
    ]
    assert sweep_report.diff_with_base(second, base) == [("model.width", "0.25", "0.5", "changed")]
    assert sweep_report.diff_with_base(first, base) == [("model.width", "0.25", "0.25", "")]
    assert "It is the base preset, googlenet-digits" in page([first]).all_text


def test_fields_that_a_kind_brings_along_are_listed() -> None:
    base = googlenet_digits()  # a polynomial
    (cosine,) = [one for one in made.sweep(40) if one.assignment["schedule.kind"] == "cosine"][:1]
    rows = {row[0]: row[1:] for row in sweep_report.diff_with_base(cosine, base)}
    assert rows["schedule.kind"] == ('"polynomial"', '"cosine"', "changed")
    assert rows["schedule.power"] == ("0.5", "absent", "changed, not searched")
    assert "name" not in rows


def test_budgets_in_words() -> None:
    trials = [made.trial(1, [5.0, 4.0]), made.trial(2, [6.0], "pruned")]
    about = {"budget_trials": 2, "budget_seconds": 3600.0, "note": ["a", "b"]}
    assert SweepReport(about, trials, METRIC, googlenet_digits()).build_facts() == [
        ("metric", "top-1 error on the validation split, in percent; of the averaged weights, if any"),
        ("trials", "2: 1 finished, 1 pruned"),
        ("epochs trained", "3"),
        ("time trained, of all trials together", "0:30"),
        ("budget trials", "2"),
        ("budget seconds", "3600.0"),
        ("note", '["a", "b"]'),
    ]


def test_a_metric_of_its_own() -> None:
    trials = [made.trial(1, [8.0], assignment={"a": 1})]
    assert (
        SweepReport({}, trials, Metric(name="top5_error"), googlenet_digits())
        .compose_headline()[0]
        .startswith("t001 wins with a top-5 error of 2.00%")
    )


# ------------------------------------------------------------------ the plot
ONE = {"schedule.base_rate": 0.01}


def test_the_winner_is_wider_and_scores_far_apart_have_a_logarithmic_axis() -> None:
    trials = [made.trial(1, [50.0] * 3, "pruned", ONE), made.trial(2, [50.0, 4.0], assignment=ONE)]
    axes = sweep_report.draw_errors(trials, METRIC).axes[0]
    widths = {line.get_label(): line.get_linewidth() for line in axes.get_lines()}
    assert widths["t002, the winner"] > 2 * widths["pruned (1)"]
    assert axes.get_yscale() == "log"
    assert sweep_report.draw_errors(trials[:1], METRIC).axes[0].get_yscale() == "linear"


def test_each_trial_is_drawn_as_its_curve_with_gaps_and_a_mark_at_its_end() -> None:
    trials = [
        made.trial(1, [50.0, 30.0, 20.0], "pruned", ONE),
        made.trial(2, [40.0, math.inf, 4.0, math.nan], "diverged", ONE),
        made.trial(3, [45.0, 5.0], assignment=ONE),
        made.trial(4, [], "waiting", ONE),
    ]
    axes = sweep_report.draw_errors(trials, METRIC).axes[0]
    drawn = [points for line in axes.get_lines() if len(points := np.asarray(line.get_xydata()))]
    gap = math.nan
    curves = [  # the winner last
        [(1, 50), (2, 30), (3, 20)], [(3, 20)],
        [(1, 40), (2, gap), (3, 4), (4, gap)], [(3, 4)],
        [(1, 45), (2, 5)], [(2, 5)],
    ]  # fmt: skip
    for line, curve in zip(drawn, curves, strict=True):
        np.testing.assert_array_equal(line, np.array(curve, dtype=float))
    colors = [line.get_color() for line in axes.get_lines()][:6]
    pruned, diverged, finished = (sweep_report.STATE_STYLES[trial.state][0] for trial in trials[:3])
    assert colors == [pruned, pruned, diverged, diverged, finished, finished]
    _, labels = axes.get_legend_handles_labels()
    assert sorted(labels) == ["diverged (1)", "finished (1)", "pruned (1)", "t003, the winner"]


def test_the_plot_is_a_picture_with_something_on_it(tmp_path: Path) -> None:
    SweepReport({}, made.sweep(12), METRIC, googlenet_digits()).write(str(tmp_path))
    image = imread(tmp_path / "errors.png")
    assert image.shape[0] > 200
    assert image.shape[1] > 800
    assert np.mean(image[..., :3].min(axis=2) < 0.9) > 0.005


@pytest.mark.parametrize(
    ("trials", "has_plot"),
    [
        ([made.trial(1, [], "waiting", ONE)], False),
        ([made.trial(1, [math.nan], "diverged", ONE)], False),
        ([made.trial(n, [math.nan, 5.0, math.inf], "diverged", ONE) for n in (1, 2)], True),
        ([made.trial(n, [5.0], "pruned", {"a$b.x_{y": "$1" * n, "c": None}) for n in (1, 2)], True),
    ],
)
def test_there_is_a_plot_where_there_is_a_finite_score(tmp_path: Path, trials: list[Trial], has_plot: bool) -> None:
    SweepReport({}, trials, METRIC, googlenet_digits()).write(str(tmp_path))
    assert (tmp_path / "errors.png").exists() == has_plot
