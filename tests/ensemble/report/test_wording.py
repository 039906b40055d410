import json

import pytest

from orchestrator.ensemble import train_and_score
from orchestrator.ensemble.report import wording
from orchestrator.evaluation.analysis_results import ErrorDifference
from orchestrator.evaluation.table3 import PAPER_TOP5, Cell, Table3
from tests.support.launched import recipe, spec


def cell(models: int, crops: int, top1: float, top5: float) -> Cell:
    return Cell(
        models, crops, top1, (top1 - 1, top1 + 1), top5, (top5 - 0.5, top5 + 0.5), PAPER_TOP5.get((models, crops))
    )


SEVEN = Table3(
    tuple(
        cell(models, crops, top1, top5)
        for models, crops, top1, top5 in (
            (1, 1, 30.125, 10.0), (1, 10, 29.0, 9.0), (1, 144, 28.0, 8.0),
            (7, 1, 27.0, 8.5), (7, 10, 26.0, 7.5), (7, 144, 25.0, 10.25),
        )
    ),
    images=50_000,
    bad_images=2,
)  # fmt: skip
TWO = Table3((cell(1, 1, 30.0, 10.0), cell(2, 1, 29.0, 9.0)), 10, 0)


def test_rows_begin_with_models_and_crops() -> None:
    lines = wording.render_text(SEVEN).splitlines()
    assert lines[0].startswith("models crops")
    assert set(lines[1]) == {"-"}
    assert [" ".join(line.split()[:2]) for line in lines[2:]] == ["1 1", "1 10", "1 144", "7 1", "7 10", "7 144"]
    assert all(
        line.startswith(f"{cell.models} {cell.crops} ") for line, cell in zip(lines[2:], SEVEN.cells, strict=True)
    )
    assert max(map(len, lines)) <= 110


def test_a_row_holds_the_figures_and_the_papers() -> None:
    rows = wording.build_rows(SEVEN)
    assert rows[0] == (
        "1 1", "1", "30.12", "29.12 - 31.12", "base", "10.00", "9.50 - 10.50", "base", "10.07", "base",
    )  # fmt: skip
    assert rows[5] == (
        "7 144", "1008", "25.00", "24.00 - 26.00", "-5.12", "10.25", "9.75 - 10.75", "+0.25", "6.67", "-3.40",
    )  # fmt: skip


def test_a_cell_that_the_paper_lacks_has_no_paper_figure() -> None:
    row = wording.build_rows(TWO)[1]
    assert row[-2:] == ("-", "-")
    assert (row[4], row[7]) == ("-1.00", "-1.00")


def test_markdown_has_a_head_and_equally_many_cells_in_each_line() -> None:
    lines = wording.render_markdown(SEVEN).splitlines()
    assert len(lines) == 2 + 6
    assert {line.count("|") for line in lines} == {len(wording.HEADER) + 1}
    assert set(lines[1]) == {"|", "-", " "}
    assert lines[2].startswith("| 1 1 | 1 | 30.12 |")


def test_columns_are_numbers_of_equal_length() -> None:
    columns = wording.build_columns(SEVEN)
    assert {len(column) for column in columns.values()} == {6}
    assert columns["cost"] == [1, 10, 144, 7, 70, 1008]
    assert columns["top1_error"][0] == 30.125
    assert columns["top5_low"][0] == 9.5
    assert columns["top1_vs_base"][5] == -5.125
    assert columns["top5_vs_base"] == [0.0, -1.0, -2.0, -1.5, -2.5, 0.25]
    assert columns["paper_top5_error"] == list(PAPER_TOP5.values())
    assert json.loads(json.dumps(columns)) == columns
    assert wording.build_columns(TWO)["paper_top5_error"] == [10.07, None]


def test_the_files_hold_the_table() -> None:
    files = wording.build_table_files(SEVEN, {"members": ["m1"]})
    assert sorted(files) == ["table.json", "table.md", "table.txt"]
    assert json.loads(files["table.json"]) == {
        "about": {"members": ["m1"]}, "images": 50_000, "bad_images": 2, "table": wording.build_columns(SEVEN),
    }  # fmt: skip
    assert files["table.txt"].decode() == wording.render_text(SEVEN) + "\n"
    assert files["table.md"].decode() == wording.render_markdown(SEVEN)


@pytest.mark.parametrize(
    ("name", "family"),
    [("googlenet-digits-m1", "googlenet-digits"), ("net-m12-wide", "net"), ("net", "net"), ("net-m", "net-m")],
)
def test_an_ensemble_is_called_after_its_first_member(name: str, family: str) -> None:
    assert train_and_score.get_family_name([spec(recipe(name)), spec(recipe("other-m2"))]) == family


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (ErrorDifference(-1.0, (-1.5, -0.5), 0.001), "more than chance explains"),
        (ErrorDifference(-1.0, (-2.5, 0.5), 0.2), "the interval covers 0, so these images do not show a difference"),
        (ErrorDifference(-1.0, (-2.5, -0.1), 0.06), "treat it with care"),
        (ErrorDifference(0.0, (0.0, 0.0), 1.0), "do not show a difference"),
    ],
)
def test_verdicts_on_differences(found: ErrorDifference, said: str) -> None:
    assert said in wording.compose_verdict(found)


@pytest.mark.parametrize(
    ("p", "text"),
    [(1.0, "1.00"), (0.2, "0.20"), (0.03, "0.030"), (0.0011, "0.0011"), (2.04e-8, "2.0e-8"), (1e-12, "< 1e-12")],
)
def test_p_values(p: float, text: str) -> None:
    assert wording.format_p_value(p).replace(wording.MINUS, "-") == text


def test_points_have_their_sign() -> None:
    minus = wording.MINUS
    assert [wording.format_points(value) for value in (1.234, -0.5, -0.001)] == ["+1.23", f"{minus}0.50", "0.00"]
