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
    assert [spec.name for spec in found.runs] == [spec.name for spec in runs]


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


def test_one_that_was_not_chosen_need_not_be_trained(tmp_path: Path, runs: list[RunSpec]) -> None:
    files.remove(outcome_of(runs[1].folder))
    assert stored.runs(str(tmp_path), ["both"], "runs", (1,)).runs == (runs[0],)
    with pytest.raises(ConfigError, match=rf"^runs: {runs[1].name}: is not trained to its end"):
        stored.runs(str(tmp_path), ["both"], "runs", (2,))


def test_what_is_not_trained_is_named_where_a_part_will_do(tmp_path: Path, runs: list[RunSpec]) -> None:
    files.remove(outcome_of(runs[1].folder))
    found = stored.runs(str(tmp_path), ["both", runs[2].name], "runs", partial=True)
    assert found == stored.Stored((runs[0], runs[2]), (runs[1].name,))
    with pytest.raises(ConfigError, match=rf"^runs: {runs[1].name}: is not trained to its end"):
        stored.runs(str(tmp_path), [runs[1].name], "runs", partial=True)
    members = {"members": [runs[0].name, "never-begun"]}
    files.write_bytes(files.join(str(tmp_path), "ensembles", "two", "ensemble.json"), json.dumps(members).encode())
    assert stored.runs(str(tmp_path), ["two"], "runs", partial=True).unfinished == ("never-begun",)


def test_members_are_chosen_by_number() -> None:
    names = ["one", "two", "three"]
    assert stored.chosen(names, ()) == names
    assert stored.chosen(names, (3, 1)) == ["three", "one"]
    with pytest.raises(ConfigError, match=r"^members: 4 is refused: there are models 1 to 3"):
        stored.chosen(names, (1, 4))
    with pytest.raises(ConfigError, match=r"^members: 0 is refused"):
        stored.chosen(names, (0,))
    with pytest.raises(ConfigError, match=r"^members: 2 is given twice"):
        stored.chosen(names, (2, 2))
