import json
from pathlib import Path

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.models.config import ModelPlugin
from orchestrator.ray_backend import run_lookup
from orchestrator.ray_backend.run_lookup import RunEntry
from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.recipe import presets
from tests.support import drivers
from tests.support.damage import DAMAGED
from tests.support.launched import recipe, spec


def test_runs_and_ensembles_are_found_by_name_and_by_url(tmp_path: Path) -> None:
    storage = str(tmp_path)
    members = [spec(recipe(f"net-m{number}"), storage) for number in (1, 2)]
    alone = spec(recipe("alone"), storage)
    drivers.begun(members[0])
    drivers.begun(alone)
    folder = drivers.ensemble(storage, "net-x2", members)
    whole = RunEntry(folder, tuple(one.folder for one in members))
    assert run_lookup.find_runs(["net-x2", f"file://{alone.folder}", alone.folder + "/", members[0].name], storage) == [
        whole,
        RunEntry(f"{alone.folder}"),
        RunEntry(members[0].folder),
    ]
    assert run_lookup.find_runs([folder], "") == [whole]
    assert whole.members == tuple(one.folder for one in members)
    # Members are listed with their ensemble, not a second time.
    assert run_lookup.list_all_runs(storage) == [whole, RunEntry(alone.folder)]


def test_an_unknown_run_is_rejected_with_near_misses(tmp_path: Path) -> None:
    one = spec(recipe("googlenet"), str(tmp_path))
    drivers.begun(one)
    with pytest.raises(ConfigError, match=f"no such run, ensemble or sweep in {tmp_path}; did you mean {one.name}"):
        run_lookup.find_runs([one.name[:-1]], str(tmp_path))
    with pytest.raises(ConfigError, match=f"did you mean {one.name}"):
        run_lookup.find_runs([one.folder[:-1]], "")
    with pytest.raises(ConfigError, match="there are none"):
        run_lookup.find_runs(["x"], str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="relative path"):
        run_lookup.find_runs(["runs/models/x"], "")


@pytest.mark.parametrize(
    "record", [*DAMAGED, b'{"members": null}', b'{"members": ["../x"]}', b'{"members": [".."]}', b'{"members": [1]}']
)
def test_a_damaged_ensemble_is_named_with_its_file(tmp_path: Path, record: bytes) -> None:
    folder = Path(drivers.ensemble(str(tmp_path), "net-x2", []))
    (folder / "ensemble.json").write_bytes(record)
    (found,) = run_lookup.list_all_runs(str(tmp_path))
    assert (found.folder, found.members) == (str(folder), ())
    assert found.error.startswith(f"{folder}/ensemble.json: cannot be read: ")
    with pytest.raises(ConfigError, match=r"ensemble\.json: cannot be read"):
        run_lookup.load_member_folders(str(folder))


@pytest.mark.parametrize(
    "place", ["/other/models/net-m1", "s3://bucket/runs/models/net-m1", "/s/sweeps/w/models/net-m1"]
)
def test_a_member_may_lie_in_another_storage(tmp_path: Path, place: str) -> None:
    folder = Path(drivers.ensemble(str(tmp_path), "net-x2", []))
    record = {"members": ["net-m1", "net-m2"], "elsewhere": {"net-m1": place}}
    (folder / "ensemble.json").write_text(json.dumps(record))
    assert run_lookup.load_member_folders(str(folder)) == [place, f"{tmp_path}/models/net-m2"]


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"net-m1": "/etc"},
        {"net-m1": "/other/models/net-m2"},
        {"net-m1": "models/net-m1"},
        {"net-m1": "/other/../etc/models/net-m1"},
        {"net-m1": "http://169.254.169.254/models/net-m1"},
        {"net-m1": "s3://KEY:SECRET@bucket/models/net-m1"},
        {"..": "/other/models/.."},
        {"net-m1": 1},
    ],
)
def test_a_record_of_an_ensemble_leads_to_no_folder_but_a_runs(tmp_path: Path, elsewhere: dict[str, object]) -> None:
    folder = Path(drivers.ensemble(str(tmp_path), "net-x2", []))
    (folder / "ensemble.json").write_text(json.dumps({"members": ["net-m1"], "elsewhere": elsewhere}))
    with pytest.raises(ConfigError, match=r"cannot be read: elsewhere must be folders of runs by name") as caught:
        run_lookup.load_member_folders(str(folder))
    assert "SECRET" not in str(caught.value)


# ------------------------------------------------------------------ code of plug-ins
def spec_of_code(storage: Path, digest: str, **changes: object) -> RunSpec:
    model = ModelPlugin(kind="own:Net", image_size=32)
    recipe = presets.googlenet_tiny().model_copy(update={"model": model, "code": {"own:Net": digest}} | changes)
    destination = Destination(data="digits", storage=str(storage), tracking="none").resolve()
    return RunSpec(recipe=recipe, placement=Placement(), destination=destination, dataset_digest="d" * 16)


def test_changed_code_is_reported_and_is_another_run_unless_asked_otherwise(tmp_path: Path) -> None:
    began, now, said = spec_of_code(tmp_path, "a"), spec_of_code(tmp_path, "b"), list[str]()
    assert run_lookup.match_code([began], False, said.append) == [began]
    began.save()
    assert run_lookup.match_code([began], False, said.append) == [began]
    assert not said
    assert run_lookup.match_code([now], False, said.append) == [now]
    assert said == [
        f"{now.name}: the code of own:Net has changed since {began.name} began, so this is another one; "
        "--same-code-anyway resumes that one"
    ]
    (resumed,) = run_lookup.match_code([now], True, said.append)
    assert resumed.name == began.name
    assert said[1] == f"{began.name}: resumed, though the code of own:Net has changed since it began"
    now.save()
    assert run_lookup.match_code([now], True, said.append) == [now], "a run of this code is there already"


def test_runs_that_differ_in_more_than_code_are_no_match(tmp_path: Path) -> None:
    spec_of_code(tmp_path, "a", epochs=9).save()
    said = list[str]()
    spec = spec_of_code(tmp_path, "b")
    assert run_lookup.match_code([spec], True, said.append) == [spec]
    assert not said


def test_several_runs_of_other_code_cannot_be_told_apart(tmp_path: Path) -> None:
    for digest in ("a", "b"):
        spec_of_code(tmp_path, digest).save()
    with pytest.raises(ConfigError, match="differ in their code only; remove all but one"):
        run_lookup.match_code([spec_of_code(tmp_path, "c")], True, print)
