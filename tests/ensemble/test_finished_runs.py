"""Finished runs by name: found, refused with what is wrong, chosen by number."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from orchestrator.cli import train_ensemble
from orchestrator.cli.exit_status import make_console
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest
from orchestrator.ensemble import finished_runs
from orchestrator.ensemble.config import EvaluateConfig
from orchestrator.ray_backend.launch_errors import PreflightError
from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.training.config import Outcome
from orchestrator.training.run_dir import get_outcome_path
from tests.support import finals, launched, tiny_shards


@pytest.fixture
def runs(tmp_path: Path) -> list[RunSpec]:
    """Three finished runs, and an ensemble of the first two."""
    made = [launched.spec(finals.small(name=name), str(tmp_path)) for name in ("one", "two", "three")]
    for number, spec in enumerate(made):
        finals.save(Path(spec.folder), spec.recipe, ("a", "b"), number)
        file_io.write_bytes(file_io.join(spec.folder, "spec.json"), spec.to_json().encode())
        outcome = Outcome(status="finished")
        file_io.write_bytes(get_outcome_path(spec.folder), json.dumps(outcome.to_dict()).encode())
    members = {"members": [spec.name for spec in made[:2]]}
    file_io.write_bytes(file_io.join(str(tmp_path), "ensembles", "both", "ensemble.json"), json.dumps(members).encode())
    return made


def test_ensembles_stand_for_their_members(tmp_path: Path, runs: list[RunSpec]) -> None:
    found, _ = finished_runs.find_runs(str(tmp_path), ["both", runs[2].name], "runs")
    assert [spec.name for spec in found] == [spec.name for spec in runs]


def test_a_model_given_twice_is_rejected(tmp_path: Path, runs: list[RunSpec]) -> None:
    with pytest.raises(ConfigError, match=rf"^include: {runs[0].name}: is given twice"):
        finished_runs.find_runs(str(tmp_path), ["both", runs[0].name], "include")


def test_two_folders_of_a_name_are_one_model_twice(tmp_path: Path, runs: list[RunSpec]) -> None:
    copied = tmp_path / "other" / "models" / runs[0].name
    shutil.copytree(runs[0].folder, copied)
    with pytest.raises(ConfigError, match=rf"^runs: {runs[0].name}: is given twice"):
        finished_runs.find_runs(str(tmp_path), ["both", str(copied)], "runs")


def test_an_unknown_name_is_rejected_with_the_known_ones(tmp_path: Path, runs: list[RunSpec]) -> None:
    with pytest.raises(ConfigError, match=rf"^runs: 'bth': no such run .* known: both, .*{runs[2].name}"):
        finished_runs.find_runs(str(tmp_path), ["bth"], "runs")


def test_an_unfinished_run_is_rejected(tmp_path: Path, runs: list[RunSpec]) -> None:
    file_io.remove(get_outcome_path(runs[1].folder))
    with pytest.raises(ConfigError, match=rf"^runs: {runs[1].name}: is not finished"):
        finished_runs.find_runs(str(tmp_path), ["both"], "runs")


def test_runs_that_are_not_chosen_may_be_unfinished(tmp_path: Path, runs: list[RunSpec]) -> None:
    file_io.remove(get_outcome_path(runs[1].folder))
    assert finished_runs.find_runs(str(tmp_path), ["both"], "runs", (1,))[0] == (runs[0],)
    with pytest.raises(ConfigError, match=rf"^runs: {runs[1].name}: is not finished"):
        finished_runs.find_runs(str(tmp_path), ["both"], "runs", (2,))


def test_unfinished_runs_of_a_partial_ensemble_are_listed(tmp_path: Path, runs: list[RunSpec]) -> None:
    file_io.remove(get_outcome_path(runs[1].folder))
    found = finished_runs.find_runs(str(tmp_path), ["both", runs[2].name], "runs", partial=True)
    assert found == ((runs[0], runs[2]), [runs[1].name])
    with pytest.raises(ConfigError, match=rf"^runs: {runs[1].name}: is not finished"):
        finished_runs.find_runs(str(tmp_path), [runs[1].name], "runs", partial=True)
    members = {"members": [runs[0].name, "never-begun"]}
    file_io.write_bytes(file_io.join(str(tmp_path), "ensembles", "two", "ensemble.json"), json.dumps(members).encode())
    assert finished_runs.find_runs(str(tmp_path), ["two"], "runs", partial=True)[1] == ["never-begun"]


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"members": []}'])
def test_an_ensemble_whose_record_is_damaged_is_named_with_its_file(tmp_path: Path, record: bytes) -> None:
    file_io.write_bytes(file_io.join(str(tmp_path), "ensembles", "damaged", "ensemble.json"), record)
    with pytest.raises(ConfigError, match=r"/damaged/ensemble\.json: "):
        finished_runs.find_runs(str(tmp_path), [f"{tmp_path}/ensembles/damaged"], "runs")


def test_runs_and_ensembles_by_path_or_url(tmp_path: Path, runs: list[RunSpec]) -> None:
    elsewhere = str(tmp_path / "not-there")
    for place in (f"{tmp_path}/ensembles/both", f"file://{tmp_path}/ensembles/both/"):
        found, _ = finished_runs.find_runs(elsewhere, [place, runs[2].folder], "include")
        assert [(spec.name, spec.folder) for spec in found] == [(spec.name, spec.folder) for spec in runs]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{0}/models/nothing", "^include: .*/models/nothing': no such run"),
        ("{0}", "^include: .*: holds the run|^include: '[^']*': no such run"),
        ("models/one", "^include: .*models/one.*absolute"),
        ("/", "^include: "),
    ],
)
def test_a_path_without_a_run_is_one_line(tmp_path: Path, runs: list[RunSpec], place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        finished_runs.find_runs(str(tmp_path), [place.format(tmp_path)], "include")
    assert "\n" not in str(caught.value)
    with pytest.raises((ConfigError, StorageError)):
        finished_runs.find_runs(str(tmp_path), ["https://["], "include")


def test_a_run_in_a_folder_of_another_name_is_rejected(tmp_path: Path, runs: list[RunSpec]) -> None:
    moved = tmp_path / "models" / "renamed"
    Path(runs[0].folder).rename(moved)
    with pytest.raises(ConfigError, match=rf"renamed: holds the run {runs[0].name}; its folder must be"):
        finished_runs.find_runs(str(tmp_path), ["renamed"], "runs")


def kept(data: Path, *specs: RunSpec) -> list[RunSpec]:
    """The same runs as if they were trained on the dataset at `data`."""
    digest = manifest.load(str(data)).digest()
    places = specs[0].destination.model_copy(update={"data": str(data)})
    return [spec.model_copy(update={"destination": places, "dataset_digest": digest}) for spec in specs]


def test_the_data_of_a_run_is_known(tmp_path: Path, runs: list[RunSpec]) -> None:
    tiny_shards.dataset(tmp_path / "data")
    specs = kept(tmp_path / "data", *runs)
    assert finished_runs.resolve_dataset(specs, Destination()).data == str(tmp_path / "data")
    assert finished_runs.resolve_dataset(specs, Destination(data="/given")).data == "/given"
    embedded = Destination(data="digits", storage=str(tmp_path), tracking="none").resolve()
    own = runs[0].model_copy(update={"destination": embedded})
    assert finished_runs.resolve_dataset([own], Destination()).data == "digits"


def test_moved_data_is_an_error_that_names_the_flag(tmp_path: Path, runs: list[RunSpec]) -> None:
    tiny_shards.dataset(tmp_path / "data")
    specs = kept(tmp_path / "data", *runs)
    with pytest.raises(ConfigError, match=r"were trained on different datasets .* set --data"):
        finished_runs.resolve_dataset([specs[0], runs[1]], Destination())
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=rf"^data: .*{specs[0].name} was .*set --data to where its dataset is now"):
        finished_runs.resolve_dataset(specs, Destination())
    tiny_shards.dataset(tmp_path / "data", 7)
    with pytest.raises(ConfigError, match=r"it is dataset \w+ now, not \w+; set --data"):
        finished_runs.resolve_dataset(specs, Destination())


def test_another_dataset_needs_the_same_classes(tmp_path: Path, runs: list[RunSpec]) -> None:
    other = tiny_shards.dataset(tmp_path / "data")
    destination = Destination(data=str(tmp_path / "data"), storage=str(tmp_path), tracking="none")
    at = cast("Session", SimpleNamespace(manifest=other, destination=destination, placement=Placement()))
    with pytest.raises(ConfigError, match=r"has 2 classes, .* has 3; the first that differs is 'a' there, 'ant' here"):
        finished_runs.adapt_to_session(at, runs[0], "runs", other_data=True)
    finals.save(Path(runs[0].folder), runs[0].recipe, tiny_shards.CLASSES, 0)
    placed = finished_runs.adapt_to_session(at, runs[0], "runs", other_data=True)
    assert (placed.name, placed.folder, placed.destination.data) == (runs[0].name, runs[0].folder, destination.data)
    with pytest.raises(ConfigError, match=r"^include: .*: was trained on another dataset"):
        finished_runs.adapt_to_session(at, runs[0], "include")


def test_a_dry_run_looks_at_the_places(tmp_path: Path, runs: list[RunSpec]) -> None:
    packed = tiny_shards.dataset(tmp_path / "data")
    places = Destination(data=str(tmp_path / "data"), storage=str(tmp_path))
    asked = EvaluateConfig(runs=("both",), destination=places, dry_run=True)
    assert train_ensemble.evaluate_runs(asked, make_console()).exit_status == 0
    (tmp_path / "data" / packed.shards("validation")[0].name).unlink()
    with pytest.raises(PreflightError, match="missing, the manifest lists it"):
        train_ensemble.evaluate_runs(asked, make_console())


def test_the_data_of_a_run_may_have_tars_elsewhere_when_that_is_allowed(tmp_path: Path, runs: list[RunSpec]) -> None:
    made = tiny_shards.dataset(tmp_path / "tars")
    manifest.save(str(tmp_path / "data"), made.model_copy(update={"tars": str(tmp_path / "tars")}))
    places = runs[0].destination.model_copy(update={"data": str(tmp_path / "data")})
    spec = runs[0].model_copy(update={"destination": places, "dataset_digest": made.digest()})
    assert finished_runs.resolve_dataset([spec], Destination(allow_elsewhere=True)).data == str(tmp_path / "data")
    with pytest.raises(ConfigError, match="set --allow-elsewhere"):
        finished_runs.resolve_dataset([spec], Destination())
