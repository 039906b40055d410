"""Finished runs by name: found, refused with what is wrong, chosen by number."""

import json
from pathlib import Path

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import stored
from orchestrator.launch.config import RunSpec
from orchestrator.storage import files
from orchestrator.training.job import Outcome, outcome_of
from tests.support import finals, launched


@pytest.fixture
def runs(tmp_path: Path) -> list[RunSpec]:
    """Three finished runs, and an ensemble of the first two."""
    made = [launched.spec(finals.small(name=name), str(tmp_path)) for name in ("one", "two", "three")]
    for number, spec in enumerate(made):
        finals.save(Path(spec.folder), spec.recipe, ("a", "b"), number)
        files.write_bytes(files.join(spec.folder, "spec.json"), spec.to_json().encode())
        outcome = Outcome(status="finished")
        files.write_bytes(outcome_of(spec.folder), json.dumps(outcome.to_dict()).encode())
    members = {"members": [spec.name for spec in made[:2]]}
    files.write_bytes(files.join(str(tmp_path), "ensembles", "both", "ensemble.json"), json.dumps(members).encode())
    return made


def test_ensembles_stand_for_their_members(tmp_path: Path, runs: list[RunSpec]) -> None:
    found = stored.runs(str(tmp_path), ["both", runs[2].name], "runs")
    assert [spec.name for spec in found] == [spec.name for spec in runs]


def test_a_model_that_is_named_twice_is_refused(tmp_path: Path, runs: list[RunSpec]) -> None:
    with pytest.raises(ConfigError, match=rf"^include: {runs[0].name}: is given twice"):
        stored.runs(str(tmp_path), ["both", runs[0].name], "include")


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, runs: list[RunSpec]) -> None:
    with pytest.raises(ConfigError, match=rf"^runs: 'bth': no such run .* there are: both, .*{runs[2].name}"):
        stored.runs(str(tmp_path), ["bth"], "runs")


def test_a_run_that_is_not_trained_to_its_end_is_refused(tmp_path: Path, runs: list[RunSpec]) -> None:
    files.remove(outcome_of(runs[1].folder))
    with pytest.raises(ConfigError, match=rf"^runs: {runs[1].name}: is not trained to its end"):
        stored.runs(str(tmp_path), ["both"], "runs")


def test_members_are_chosen_by_number(runs: list[RunSpec]) -> None:
    assert stored.chosen(runs, ()) == runs
    assert stored.chosen(runs, (3, 1)) == [runs[2], runs[0]]
    with pytest.raises(ConfigError, match=r"^members: 4 is refused: there are models 1 to 3"):
        stored.chosen(runs, (1, 4))
    with pytest.raises(ConfigError, match=r"^members: 0 is refused"):
        stored.chosen(runs, (0,))
    with pytest.raises(ConfigError, match=r"^members: 2 is given twice"):
        stored.chosen(runs, (2, 2))
