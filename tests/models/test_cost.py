"""The cost table: where the paper is right, where it is not, and the printed command."""

import subprocess
import sys

import pytest

from orchestrator.models import table1
from orchestrator.models.config import AlexNetConfig, GoogLeNetConfig, LeNet5Config, SPPNetConfig, VGG16Config
from orchestrator.models.cost import MULTIPLY_ADD_BUDGET, PARAMETER_CLAIM_NOTE, ROW_NOTES, main
from orchestrator.models.flops import IMAGENET_CLASSES, RowCost, count_image_multiply_adds, measure_row_costs, sum_costs

K = 1024


def table(classes: int = 1000, **changes: object) -> dict[str, RowCost]:
    return {row.name: row for row in measure_row_costs(GoogLeNetConfig.from_dict(changes), classes)}


@pytest.fixture(scope="module")
def papers() -> dict[str, RowCost]:
    return table()


def test_rows_are_table_1s_then_linear_then_heads(papers: dict[str, RowCost]) -> None:
    assert list(papers) == [*(row.name for row in table1.TABLE_1), "linear", "head 4a", "head 4d"]
    assert papers["4d"].output == (14, 14, 528)
    assert papers["linear"].output == (1, 1, 1000)


def test_totals(papers: dict[str, RowCost]) -> None:
    inference = [row for row in papers.values() if not row.name.startswith("head")]
    assert sum(row.params for row in inference) == 6_998_552
    assert sum(row.params for row in papers.values()) == 13_378_280
    assert sum(row.multiply_adds for row in inference) == 1_582_671_872
    assert sum(row.paper_multiply_adds or 0 for row in inference) == pytest.approx(1.5e9, rel=0.002), "the budget"


def test_multiply_adds_by_hand(papers: dict[str, RowCost]) -> None:
    assert papers["conv1"].multiply_adds == 112 * 112 * 64 * 7 * 7 * 3
    assert papers["conv2"].multiply_adds == 56 * 56 * (64 * 64 + 64 * 192 * 9)
    assert papers["linear"].multiply_adds == 1024 * 1000
    assert papers["head 4a"].multiply_adds == 16 * 512 * 128 + 2048 * 1024 + 1024 * 1000
    assert papers["pool1"] == RowCost("pool1", (56, 56, 64), 0, 0, 0)
    assert papers["5a"].params - papers["5a"].weights == 256 + 160 + 320 + 32 + 128 + 128, "biases"


@pytest.mark.parametrize("name", [*(r.name for r in table1.TABLE_1 if not isinstance(r, table1.MaxPoolRow)), "linear"])
def test_rows_are_as_near_the_paper_as_its_rounding_and_its_known_oddities_allow(
    papers: dict[str, RowCost], name: str
) -> None:
    row = papers[name]
    odd = {"conv1": 2.5, "4c": 0.08, "4d": 0.02, "5a": 0.055, "5b": 0.02}
    assert row.paper_weights is not None
    assert row.paper_multiply_adds is not None
    assert row.weights == pytest.approx(row.paper_weights, rel=odd.get(name, 0.01))
    # The operations are right everywhere but in the first row and in 5a; a figure such as 1M is rounded by half of it.
    tolerance = odd[name] if name in ("conv1", "5a") else 0.005
    assert row.multiply_adds == pytest.approx(row.paper_multiply_adds, rel=tolerance, abs=0.7e6)


def test_the_first_row_of_the_paper_is_a_separable_convolution() -> None:
    depthwise, pointwise = 7 * 7 * 3 * 8, 3 * 8 * 64
    assert (depthwise, pointwise) == (1176, 1536)
    assert round((depthwise + pointwise) / 1000, 1) == 2.7
    assert round((depthwise + pointwise) * 112 * 112 / 1e6, 1) == 34.0


@pytest.mark.parametrize(
    ("name", "side", "said", "figure"),
    [("3b", 28, "305M", 304), ("4b", 14, "88M", 88), ("4c", 14, "93M", 100), ("4d", 14, "116M", 119),
     ("4e", 14, "169M", 170), ("5b", 7, "70M", 71)],
)  # fmt: skip
def test_notes_say_what_the_papers_own_parameters_would_give(
    papers: dict[str, RowCost], name: str, side: int, said: str, figure: int
) -> None:
    row = papers[name]
    assert row.paper_weights is not None
    assert f"{row.paper_weights * side * side / 1e6:.0f}M" == said
    assert said in ROW_NOTES[name]
    assert row.paper_multiply_adds == figure * 1e6
    assert ROW_NOTES[name].startswith(f"{row.weights / K:,.{0 if name == '5b' else 1}f}K")


def test_every_row_with_figures_has_a_note(papers: dict[str, RowCost]) -> None:
    assert set(ROW_NOTES) == {row.name for row in papers.values() if row.paper_weights is not None}


def test_width_and_the_naive_module_cost_what_they_should() -> None:
    slim, wide = table(width=0.5), table(width=1.5)
    full = table()
    # Filters on both sides: the square of the width, but for the first row, whose input is RGB.
    assert slim["4c"].multiply_adds * 4 == full["4c"].multiply_adds
    assert wide["4c"].weights == full["4c"].weights * 2.25
    assert slim["conv1"].weights * 2 == full["conv1"].weights
    naive = table(module="naive")
    assert naive["3a"].output == (28, 28, 64 + 128 + 32 + 192)
    assert naive["3a"].weights == 192 * 64 + 192 * 128 * 9 + 192 * 32 * 25
    assert naive["3a"].multiply_adds == naive["3a"].weights * 28 * 28
    assert sum(r.multiply_adds for r in naive.values()) > 6 * sum(r.multiply_adds for r in full.values()), "section 4"


def test_the_separable_stem_is_the_first_row_that_the_paper_counts_and_fits_its_budget(
    papers: dict[str, RowCost],
) -> None:
    rows = table(stem="separable")
    assert rows["conv1"].weights == 2712
    assert rows["conv1"].multiply_adds == (1176 + 1536) * 112 * 112 == pytest.approx(34e6, rel=0.001)
    assert [row for row in rows.values() if row.name != "conv1"] == [r for r in papers.values() if r.name != "conv1"]
    assert sum_costs(list(rows.values())).multiply_adds == pytest.approx(MULTIPLY_ADD_BUDGET, rel=0.001)


def test_batch_norm_adds_two_numbers_a_filter_for_the_bias_that_it_takes() -> None:
    plain, normed = table(), table(batch_norm=True, lrn=False)
    filters = 64 + 96 + 128 + 16 + 32 + 32
    assert normed["3a"].params - plain["3a"].params == filters
    assert normed["3a"].weights == plain["3a"].weights
    assert normed["3a"].multiply_adds == plain["3a"].multiply_adds


def test_smaller_images_and_other_classes() -> None:
    rows = table(classes=10, image_size=32, auxiliary=False)
    assert list(rows)[-1] == "linear"
    assert rows["linear"].output == (1, 1, 10)
    assert rows["5b"].output == (1, 1, 1024)
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        table(classes=1)


# ------------------------------------------------------------------ other networks
def test_alexnets_rows_by_hand() -> None:
    rows = {row.name: row for row in measure_row_costs(AlexNetConfig(), IMAGENET_CLASSES)}
    assert rows["conv2"].output == (27, 27, 256)
    assert rows["conv2"].params == 256 * 48 * 25 + 256, "each half sees 48 of the 96 maps"
    assert rows["fc6"].params == 6 * 6 * 256 * 4096 + 4096
    # The literature: 666M in convolutions (arXiv 1703.09039, table II) and 58.6M in the fully connected layers.
    convolutions = sum(row.multiply_adds for row in rows.values() if row.name.startswith("conv"))
    assert round(convolutions / 1e6) == 666
    assert round((sum_costs(list(rows.values())).multiply_adds - convolutions) / 1e6, 1) == 58.6


@pytest.mark.parametrize(
    ("config", "classes", "products"),
    [
        (LeNet5Config(), 10, 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10),
        # 15.35 billion in the convolutions and 0.12 in the fully connected layers.
        (VGG16Config(), 1000, 15_470_264_320),
    ],
)
def test_multiply_adds_of_the_literature(config: LeNet5Config | VGG16Config, classes: int, products: int) -> None:
    assert sum_costs(measure_row_costs(config, classes)).multiply_adds == products


def test_a_pyramid_makes_50_numbers_of_each_map_at_any_size() -> None:
    for side in (224, 180):  # arXiv 1406.4729 trains on both
        rows = {row.name: row for row in measure_row_costs(SPPNetConfig(image_size=side), IMAGENET_CLASSES)}
        assert rows["spp"].output == (1, 1, 50 * 256)
        assert sum_costs(list(rows.values())).params == 77_037_672


def test_how_many_times_fewer_than_alexnet() -> None:
    """Section 1 says 12 times: what the counts give is what the note says."""
    alexnet, ours = (
        sum_costs(measure_row_costs(AlexNetConfig(), IMAGENET_CLASSES)),
        measure_row_costs(GoogLeNetConfig(), IMAGENET_CLASSES),
    )
    without_linear = sum_costs([row for row in ours if row.name != "linear"]).params
    column = sum(row.paper_weights or 0 for row in ours)
    assert (alexnet.params, sum_costs(ours).params, without_linear) == (60_965_224, 6_998_552, 5_973_552)
    assert (
        f"{alexnet.params:,} / {sum_costs(ours).params:,} = {alexnet.params / sum_costs(ours).params:.1f}"
        in PARAMETER_CLAIM_NOTE
    )
    assert f"({without_linear:,}) {alexnet.params / without_linear:.1f}" in PARAMETER_CLAIM_NOTE
    assert f"({column / K:,.1f}K) {alexnet.weights / (column / K * 1000):.1f}" in PARAMETER_CLAIM_NOTE
    assert f"{alexnet.weights / column:.1f} with K = 1024" in PARAMETER_CLAIM_NOTE
    assert alexnet.params / 12 == pytest.approx(5e6, rel=0.02), "5 million, as its authors say later"


def test_an_image_costs_what_training_does() -> None:
    assert (
        count_image_multiply_adds(GoogLeNetConfig())
        == sum_costs(measure_row_costs(GoogLeNetConfig(), IMAGENET_CLASSES), heads=True).multiply_adds
    )
    assert count_image_multiply_adds(GoogLeNetConfig(auxiliary=False)) == 1_582_671_872


# ------------------------------------------------------------------ the command
@pytest.mark.process
def test_the_command_prints_plain_text_that_fits() -> None:
    command = [sys.executable, "-m", "orchestrator.models.cost", "--auxiliary"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 110
    assert "\x1b" not in done.stdout
    assert done.stdout.isascii()
    assert not done.stderr
    (row,) = [line.split() for line in lines if line.startswith("4c ")]
    assert row == ["4c", "14x14x512", "509,440", "510,104", "463K", "+7.5%", "99.9M", "100M", "-0.1%", "g"]
    for figure in ("6,998,552", "13,378,280", "1,582,671,872", "+5.5%", "1.5 billion", "head 4d"):
        assert figure in done.stdout
    assert any(line.startswith("g  4c:") for line in lines), "the legend explains the letter"


def test_another_network_has_no_notes_but_the_papers_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--width", "0.25", "--image-size", "64", "--classes", "10", "--module", "naive"])
    printed = capsys.readouterr().out
    assert "width 0.25, naive modules, 10 classes" in printed
    assert "463K" in printed
    assert "head 4a" not in printed
    assert ROW_NOTES["4c"][:20] not in printed
    assert "1.5 billion" in printed


def test_a_network_without_paper_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "alexnet"])
    printed = capsys.readouterr().out
    assert "60,965,224" in printed
    assert "differs" not in printed
    assert "auxiliary" not in printed
    assert "-51.7% against the 1.5 billion budget" in printed


def test_the_comparison_has_a_line_for_each_network_and_its_note(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--compare"])
    printed = capsys.readouterr().out
    lines = {line[:18].strip(): line.split() for line in printed.splitlines() if line}
    assert lines["googlenet"][-4:] == ["6,998,552", "8.7x", "1,582.7M", "1.06x"]
    assert lines["vgg-16"][-4:] == ["138,357,544", "0.4x", "15,470.3M", "10.31x"]
    assert lines["separable stem"][-1] == "1.00x"
    assert "12 times fewer" in printed
    assert max(map(len, printed.splitlines())) <= 110
    main(["--compare", "--classes", "10"])
    assert "12 times fewer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--model", "vgg"], "did you mean vgg-16?"), (["--model", "alexnet", "--width", "2"], "width: unknown key"),
     (["--compare", "--width", "2"], "--compare lists each network"),
     (["--width", "0"], "width: must be"), (["--module", "wide"], "module"), (["--classes", "1"], "classes must be"),
     (["--image-size", "7"], "image_size: must be")],
)  # fmt: skip
def test_impossible_networks_are_refused_in_a_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
