"""Command lines: fields that have to be said, fields that may not be said, and presets from files."""

import pytest

from orchestrator.config.arg_parser import Preset, parse_args
from orchestrator.config.errors import ConfigError
from tests.config.samples import Handed, Member, Pieces, Predict, Recipe, Train
from tests.config.test_arg_parser import PRESETS, predict, train

# ------------------------------------------------------------------ what has no default, and what is fixed
HANDED = {"plain": Preset(Handed()), "other": Preset(Handed(origin=Member(seed=3)))}


def handed(*arguments: str) -> Handed:
    return parse_args("hand", "Hands over.", HANDED, "plain", arguments)


def test_a_kind_that_has_to_be_said_is_given_as_json() -> None:
    pieces = Pieces(pieces=(Member(seed=1), Member(width=2.0)))
    kind = ["--schedule.kind", "pieces"]
    assert handed(*kind, "--schedule.pieces", '{"seed": 1}', '{"width": 2}').schedule == pieces
    assert handed(*kind, '--schedule.pieces=[{"seed": 1}, {"width": 2}]').schedule == pieces


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--schedule.kind", "pieces"], "schedule.pieces: must be given"),
        (["--schedule.pieces", "{}"], "--schedule.pieces: belongs to --schedule.kind pieces; set that too"),
        (
            ["--schedule.kind", "pieces", "--schedule.base-rate", "1"],
            "--schedule.base-rate: belongs to --schedule.kind step; set that too",
        ),
        (["other", "--origin.seed", "4"], "--origin.seed: unknown flag; known flags: --schedule.kind, "),
        (["--origin", "none"], "--origin: unknown flag; known flags: --schedule.kind, "),
    ],
)
def test_a_required_or_fixed_field_is_rejected(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        handed(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"hand: error: {line}")


def test_what_is_fixed_stays_and_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert handed("other", "--epochs", "2") == Handed(origin=Member(seed=3), epochs=2)
    with pytest.raises(SystemExit):
        handed("other", "--schedule.kind", "pieces", "--help")
    shown = capsys.readouterr().out
    assert "origin" not in shown
    assert "--schedule.pieces JSON ..." in " ".join(shown.split())


# ------------------------------------------------------------------ presets from files
def filed(*arguments: str) -> Train:
    """Like train(), but `N.json` is a file that holds a preset of N epochs."""

    def read(place: str) -> Preset[Train]:
        epochs = place.rpartition("/")[2].removesuffix(".json")
        if not epochs.isdigit():
            raise ConfigError(f"{place}: nothing there")
        return Preset(Train(recipe=Recipe(epochs=int(epochs)), data="of the file"))

    return parse_args("train", "Trains one model.", PRESETS, "digits", arguments, from_file=read)


def test_a_file_is_a_preset_with_flags_on_top() -> None:
    assert filed("s3://b/20.json") == Train(recipe=Recipe(epochs=20), data="of the file")
    assert filed("30.json", "--clip", "2", "--data", "d") == Train(recipe=Recipe(epochs=30, clip=2.0), data="d")
    assert filed() == filed("digits") == Train()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["many.json"], "many.json: nothing there"),
        (["20.json", "--epochs", "3"], "epochs must be 8 or more for a step schedule, got 3"),
        (["20.yaml"], "20.yaml: unknown preset; known presets: digits, googlenet-imagenet"),
        (["digits", "20.json"], "20.json: unexpected argument; flags begin with --"),
    ],
)
def test_a_file_that_cannot_be_used_is_rejected_in_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        filed(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"train: error: {line}\n")


def test_help_tells_of_files_where_they_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        filed("--help")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: train [PRESET | FILE.json] [--FLAG VALUE ...]\n")
    assert shown.endswith("\n`train FILE.json` starts from the recipe in a file, by path or URL.\n")
    with pytest.raises(SystemExit):
        filed("20.json", "--help")
    assert "--epochs INT (default: 20)" in " ".join(capsys.readouterr().out.replace("\u2502", " ").split())


def test_without_a_reader_a_file_is_no_preset() -> None:
    with pytest.raises(SystemExit):
        train("20.json")
    assert predict("20.json") == Predict(images=("20.json",))
