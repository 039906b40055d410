"""The report against the analysis that it is of: structure, nothing from outside, escaping, figures."""

import re
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.figure import Figure

from orchestrator.ensemble.report import ensemble_plots, ensemble_report, wording
from orchestrator.ensemble.report.ensemble_plots import ErrorCurves
from orchestrator.evaluation.analysis import analyze_ensemble
from orchestrator.evaluation.analysis_results import Analysis, Differences, Errors
from orchestrator.evaluation.table3 import PAPER_TOP5
from orchestrator.plotting.report_format import format_count
from tests.support import stores
from tests.support.pages import Page

PAPER = "https://arxiv.org/abs/1409.4842"
CURVES = {"m0": [(1.0, 60.0), (2.0, float("nan")), (3.0, 50.0)], "m1": [(1.0, 55.0)]}


def made(root: Path, members: int, classes: int, images: int = 120) -> Analysis:
    drawn = np.random.default_rng(5).integers(0, classes, images)
    drawn[:3] = -1
    parts = np.split(drawn, [images // 2])
    scores = {f"m{n}": stores.write_drawn(root / f"m{n}", n, parts, classes) for n in range(members)}
    return analyze_ensemble(scores, stores.manifest([len(part) for part in parts], classes), stores.SPLIT)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """As if its classes were ILSVRC's, so that the paper's figures stand beside its own."""
    analysis = made(tmp_path_factory.mktemp("seven"), 7, 10)
    return replace(analysis, table=replace(analysis.table, of_ilsvrc=True))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return made(tmp_path_factory.mktemp("one"), 1, 3)


def about(analysis: Analysis, **more: object) -> dict[str, object]:
    return {
        "ensemble": "net-x7",
        "weights": "averaged",
        "members": list(analysis.member_names),
        "members_asked_for": len(analysis.member_names),
        "dataset": "made",
        "dataset_digest": "0123abcd",
        "split": analysis.split,
    } | more


def page(analysis: Analysis, **more: object) -> str:
    """The page without plots: they take a while."""
    return ensemble_report.render_html(about(analysis, **more), analysis, {})


# ------------------------------------------------------------------ the whole
def test_the_report_is_complete_and_self_contained(tmp_path: Path, seven: Analysis) -> None:
    ensemble_report.write_report(str(tmp_path), about(seven), seven, CURVES)
    names = {path.name for path in tmp_path.iterdir()}
    tables = {"table.json", "table.md", "table.txt"}
    assert names == {"report.html", "report.md", *tables, *(f"{name}.png" for name in ensemble_plots.PLOT_NAMES)}
    for name in ensemble_plots.PLOT_NAMES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.html").read_text()
    found = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    outward = [(name, value) for _, name, value in found.attributes if name in ("href", "src", "xlink:href", "action")]
    assert {value for _, value in outward if not value.startswith(("#", "data:image/"))} == {PAPER}
    assert set(re.findall(r"https?://[^\"<\s]*", text)) == {PAPER}
    assert not re.search(r"@import|url\((?!#)", text)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert found.tags.count("svg") == len(ensemble_plots.PLOT_NAMES)
    identifiers = [value for _, name, value in found.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert {value[1:] for _, value in outward if value.startswith("#")} <= set(identifiers)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(identifiers)
    # What a plot draws in the page's colours follows the screen's.
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", text)) <= {"#ffffff", "#111111"}
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_names_are_escaped(tmp_path: Path, one: Analysis) -> None:
    evil = '<script>alert("1")</script>', r"$\frac{$ | <img src=x onerror=alert(1)> `a`", "--> \u8c61 ]]>"
    analysis = replace(one, class_names=evil, member_names=("<b>m</b>",))
    analysis = replace(analysis, members={("<b>m</b>", crops): found for (_, crops), found in analysis.members.items()})
    curves = {"_$\\x$ <i>": [(1.0, 3.0)]}
    ensemble_report.write_report(
        str(tmp_path), about(analysis, ensemble="<u>e</u>", extra={"<s>": "&amp;"}), analysis, curves
    )
    text = (tmp_path / "report.html").read_text()
    found = Page(text)
    assert not {"script", "b>m", "i", "u", "s"} & set(found.tags)
    assert found.tags.count("img") == 0
    rows = found.table("class")
    assert {row[0] for row in rows} == {evil[one.label] for one in analysis.classes}
    assert "<u>e</u>" in found.text
    assert ["extra", "<s>: &amp;"] in found.table("split")
    markdown = (tmp_path / "report.md").read_text()
    assert "\n# " not in markdown
    assert r"\<u\>e\</u\>" in markdown


# ------------------------------------------------------------------ figure by figure
def test_the_table_is_that_of_the_analysis(seven: Analysis) -> None:
    rows = Page(page(seven)).table("models crops")
    assert [tuple(row) for row in rows] == wording.build_rows(seven.table)
    assert len(rows) == len(seven.table.cells) == 6


def percents(*pairs: Errors) -> list[str]:
    return [f"{value:.2f}" for pair in pairs for value in pair]


def differences(found: Differences) -> list[str]:
    shown = []
    for difference in found:
        low, high = difference.interval
        shown += [
            wording.format_points(difference.points),
            f"{wording.format_points(low)} to {wording.format_points(high)}",
            wording.format_p_value(difference.p),
        ]
    return shown


def test_comparisons_gains_and_variants_are_those_of_the_analysis(seven: Analysis) -> None:
    found = Page(page(seven))
    assert found.table("cell") == [
        [wording.format_cell(cell), wording.format_cell(other), *differences(pair)]
        for (cell, other), pair in seven.paired.items()
    ]
    assert found.table("model", "top-1, points") == [
        [member, *differences(pair)] for member, pair in seven.gains.items()
    ]
    assert found.table("", "top-1, %") == [
        [format_count(models, "model"), *percents(errors), *differences(pair)]
        for models, (errors, pair) in seven.maximum.items()
    ]
    assert [row[1:] for row in found.table("", "ECE")] == [
        [f"{one.ece:.4f}", f"{one.confidence:.4f}", f"{one.accuracy:.4f}"] for one in seven.calibration
    ]


def test_pairs_of_models_are_below_the_diagonal(seven: Analysis) -> None:
    rows = Page(page(seven)).table("", "1")
    assert [row[0] for row in rows] == [f"{number} m{number - 1}" for number in range(1, 8)]
    for row, cells in enumerate(rows):
        assert cells[1:] == [
            *(f"{seven.disagreement[row][n]:.2f}\n{seven.correlation[row][n]:.3f}" for n in range(row)),
            *[""] * (6 - row),
        ]


def test_the_papers_figures_are_marked_beside_other_data(seven: Analysis) -> None:
    here = replace(seven, table=replace(seven.table, of_ilsvrc=False))
    found = Page(page(here))
    assert {row[8] for row in found.table("models crops")} == {f"{value:.2f}" for value in PAPER_TOP5.values()}
    assert wording.PAPER_NOTE in found.text
    assert "The paper's seven" not in " ".join(wording.compose_headline(here))
    assert wording.PAPER_NOTE not in Page(page(seven)).text
    assert wording.PAPER_NOTE in wording.render_markdown(here.table)
    assert wording.PAPER_NOTE not in wording.render_markdown(seven.table)


def test_scales_are_those_of_the_networks(seven: Analysis) -> None:
    found = Page(page(seven, input_sizes=[48, 112]))
    assert [row[0] for row in found.table("shorter side", "top-1, 1 model, %")] == [
        "55 / 128", "62 / 144", "69 / 160", "75 / 176"
    ]  # fmt: skip
    assert "networks that see 48 / 112" in found.text


def test_members_sizes_and_scales_are_those_of_the_analysis(seven: Analysis) -> None:
    found = Page(page(seven))
    assert found.table("model", "top-1, 1 crop, %") == [
        [name, *percents(*(seven.members[name, crops] for crops in (1, 10, 144)))] for name in seven.member_names
    ]
    for row in found.table("models", "subsets"):
        subsets = [seven.subsets[crops, int(row[0])] for crops in (1, 10, 144)]
        assert row[1] == str(subsets[0].subsets)
        assert row[2:] == [
            f"{one.mean[rank]:.2f}\n{one.least[rank]:.2f} to {one.most[rank]:.2f}" for one in subsets for rank in (0, 1)
        ]
    for row in found.table("shorter side", "top-1, 1 model, %"):
        assert row[1:] == percents(*(seven.scales[models, int(row[0])] for models in (1, 7)))


def test_classes_confusions_and_mistakes_are_those_of_the_analysis(seven: Analysis) -> None:
    found, names = Page(page(seven)), seven.class_names
    rows = found.table("class")
    by_name = {names[one.label]: one for one in seven.classes}
    errors = [float(row[3]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert {row[0] for row in rows} == set(by_name)
    for row in rows:
        one = by_name[row[0]]
        assert row[2:] == [str(one.images), f"{one.top1_error:.2f}", f"{one.top5_error:.2f}"]
        if one.confused_with is not None:
            assert row[1] == f"{names[one.confused_with]} ({one.confused_images})"
    assert found.table("true class", "named instead") == [
        [names[one.true], names[one.predicted], str(one.images)] for one in seven.confusions
    ]
    assert found.table("true class", "answer") == [
        [names[one.true], names[one.predicted], f"{100 * one.confidence:.1f}", str(one.image)] for one in seven.mistakes
    ]


def test_sources_are_listed(seven: Analysis) -> None:
    facts = dict(row for row in Page(page(seven, commit="abc", versions={"torch": "2"})).tables[-1] if len(row) == 2)
    assert facts["images with a label, which the figures are of"] == str(seven.table.images)
    assert facts["images without a label, left out"] == str(seven.table.unlabelled) == "3"
    assert facts["images that cannot be decoded, left out"] == "0"
    assert facts["dataset digest"] == "0123abcd"
    assert facts["commit"] == "abc"
    assert facts["versions"] == "torch: 2"
    assert facts["models"] == "7 of 7"


# ------------------------------------------------------------------ the plots
def draw_figures(analysis: Analysis, curves: ErrorCurves | None = None) -> dict[str, Figure]:
    """Return the figures that the files of the plots are saved from, by name."""
    figures: list[Figure] = []

    def record(figure: Figure, file: IO[bytes], **_: object) -> None:
        file.write(b"<svg>")
        if figure not in figures:
            figures.append(figure)

    with patch.object(Figure, "savefig", record):
        plots = ensemble_plots.draw_plots(analysis, curves or {})
    return dict(zip(plots, figures, strict=True))


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_each_cell_is_drawn_with_its_interval(seven: Analysis) -> None:
    for rank, panel in enumerate(draw_figures(seven)["table"].axes):
        rows = [((c.top1_error, c.top1_interval), (c.top5_error, c.top5_interval))[rank] for c in seven.table.cells]
        ((line, _, (intervals,)),) = panel.containers
        assert points(line) == [(error, row) for row, (error, _) in enumerate(rows)]
        drawn = [[float(x) for x, _ in segment] for segment in intervals.get_segments()]
        # Rounding may move an error outside of its interval.
        ends = [[min(low, error), max(high, error)] for error, (low, high) in rows]
        assert np.allclose(drawn, ends, atol=1e-9)
        assert [text.get_text() for text in panel.texts] == [f"{error:.2f}" for error, _ in rows]
    names = [label.get_text() for label in draw_figures(seven)["table"].axes[0].get_yticklabels()]
    assert names == [
        f"{format_count(cell.models, 'model')}, {format_count(cell.crops, 'crop')}" for cell in seven.table.cells
    ]


def test_the_papers_figures_are_drawn_for_ilsvrc_alone(seven: Analysis) -> None:
    def papers(analysis: Analysis) -> list[list[tuple[float, float]]]:
        return [
            points(line)
            for panel in draw_figures(analysis)["table"].axes
            for line in panel.get_lines()
            if str(line.get_label()).startswith("the paper's figure")
        ]

    assert papers(seven) == [[(cell.paper_top5, row) for row, cell in enumerate(seven.table.cells)]]
    assert papers(replace(seven, table=replace(seven.table, of_ilsvrc=False))) == []


def test_errors_of_subsets_are_drawn_by_size(seven: Analysis) -> None:
    for rank, panel in enumerate(draw_figures(seven)["error_by_models"].axes):
        lines = {str(line.get_label()): points(line) for line in panel.get_lines()}
        assert lines.keys() == {"1 crop", "10 crops", "144 crops"}
        for crops, band in zip((1, 10, 144), panel.collections, strict=True):
            rows = {size: errors for (count, size), errors in seven.subsets.items() if count == crops}
            assert lines[format_count(crops, "crop")] == [(size, row.mean[rank]) for size, row in rows.items()]
            (path,) = band.get_paths()
            corners = {(float(x), float(y)) for x, y in np.asarray(path.vertices)}
            assert corners == {(s, end) for s, row in rows.items() for end in (row.least[rank], row.most[rank])}


def test_reliability_is_drawn_by_bins(seven: Analysis) -> None:
    by_confidence, shares = draw_figures(seven)["reliability"].axes
    diagonal, *lines = by_confidence.get_lines()
    assert points(diagonal) == [(0, 0), (1, 1)]
    for calibration, line, bars in zip(seven.calibration, lines, shares.containers, strict=True):
        assert line.get_label() == format_count(calibration.models, "model")
        assert points(line) == [(confidence, accuracy) for answers, confidence, accuracy in calibration.bins if answers]
        total = sum(answers for answers, _, _ in calibration.bins)
        assert [bar.get_height() for bar in bars] == [100 * answers / total for answers, _, _ in calibration.bins]
        width = 1 / len(calibration.bins)
        assert [int(bar.get_x() / width) for bar in bars] == list(range(len(calibration.bins)))


def test_training_curves_are_drawn_by_member_with_gaps(one: Analysis) -> None:
    curves = {**CURVES, "m2": [], "m3": [(1.0, float("inf")), (2.0, 40.0)]}
    (axes,) = draw_figures(one, curves)["curves"].axes
    drawn = {str(line.get_label()): points(line) for line in axes.get_lines()}
    gap = float("nan")
    expected = {"m0": [(1, 60), (2, gap), (3, 50)], "m1": [(1, 55)], "m3": [(1, gap), (2, 40)]}
    assert drawn.keys() == expected.keys()
    for name, line in drawn.items():
        np.testing.assert_array_equal(line, expected[name])


# ------------------------------------------------------------------ in words
def test_a_partial_ensemble_is_called_partial(seven: Analysis) -> None:
    found = Page(page(seven, members_asked_for=9))
    assert "net-x7 7 of 9 models" in found.text
    assert "This is a partial ensemble: 7 of 9 models" in found.text
    assert "partial" not in Page(page(seven)).text
    assert "(7 of 9 models)" in ensemble_report.render_markdown(about(seven, members_asked_for=9), seven)


def test_weights_chosen_on_the_split_give_a_warning(seven: Analysis) -> None:
    assert "they were chosen on the images that they are scored on" in Page(page(seven, weights="best")).text
    assert "not the average that the paper uses" in Page(page(seven, weights="raw")).text
    assert 'class="warning"' not in page(seven)


def test_the_headline_gives_the_gain(seven: Analysis) -> None:
    single, together = seven.table.get_cell(1, 144), seven.table.get_cell(7, 144)
    top1, _ = seven.paired[(7, 144), (1, 144)]
    first, second, third = wording.compose_headline(seven)
    assert f"top-1 error of {together.top1_error:.2f}%" in first
    assert f"{abs(top1.points):.2f} points less than the {single.top1_error:.2f}%" in first
    assert wording.format_p_value(top1.p) in first
    assert f"top-5 error of {together.top5_error:.2f}%" in second
    assert "6.67%" in third


# ------------------------------------------------------------------ small and large
def test_a_single_model(one: Analysis, tmp_path: Path) -> None:
    (tmp_path / "error_by_models.png").write_bytes(b"of an earlier result")
    ensemble_report.write_report(str(tmp_path), about(one, ensemble="net-x1"), one, {})
    found = Page((tmp_path / "report.html").read_text())
    assert not {"sizes", "diversity"} & set(found.sections)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"table", "reliability"}
    assert "With 144 crops the model has a top-1 error of" in found.text
    assert "together" not in found.text.split("Models and crops")[0]


def test_two_models(tmp_path: Path) -> None:
    analysis = made(tmp_path / "store", 2, 3)
    ensemble_report.write_report(str(tmp_path / "out"), about(analysis), analysis, CURVES)
    text = (tmp_path / "out" / "report.html").read_text()
    assert {"sizes", "diversity"} <= set(Page(text).sections)
    rows = Page(text).table("models crops")
    assert [row[8] for row in rows] == ["10.07", "9.15", "7.89", "-", "-", "-"]


def test_a_thousand_classes_are_not_a_thousand_rows(tmp_path: Path) -> None:
    analysis = made(tmp_path, 2, 1000, images=2500)
    assert len(analysis.classes) > 800
    found = Page(page(analysis))
    assert len(found.table("class")) == ensemble_report.MAX_CLASSES
    assert sum(map(len, found.tables)) < 160
    assert f"Of the {len(analysis.classes):,} classes the {ensemble_report.MAX_CLASSES} worst are shown" in found.text
    assert f"{1000 - len(analysis.classes)} of the 1,000 classes have no image" in found.text
    assert wording.compose_headline(analysis)[0].startswith("The 2 models together have a top-5 error")
    errors = sorted((one.top1_error for one in analysis.classes), reverse=True)
    shown = [float(row[3]) for row in found.table("class")]
    assert shown == [round(error, 2) for error in errors[: ensemble_report.MAX_CLASSES]]


def test_the_markdown_holds_the_table(seven: Analysis) -> None:
    text = ensemble_report.render_markdown(about(seven), seven)
    assert text.startswith("# net-x7\n")
    assert wording.render_markdown(seven.table) in text
    assert "| dataset digest | 0123abcd |" in text
    assert wording.compose_headline(seven)[0] in text
