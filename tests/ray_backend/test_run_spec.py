"""Specifications of runs and their command lines."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config.arg_parser import parse_args
from orchestrator.config.errors import ConfigError, format_command
from orchestrator.config.overrides import apply_overrides, flatten_config
from orchestrator.ensemble.config import TrainEnsembleConfig
from orchestrator.ray_backend import cluster
from orchestrator.ray_backend.cluster import ClusterCapacity, Node, wait_for_capacity
from orchestrator.ray_backend.launch_errors import ClusterError
from orchestrator.ray_backend.run_spec import (
    RUNS_VARIABLE,
    Destination,
    JobConfig,
    Placement,
    RunSpec,
    build_job_presets,
    make_preset_loader,
)
from orchestrator.recipe import presets
from orchestrator.recipe.recipe_file import Provenance, RecipeFile
from orchestrator.training.config import Cadence
from tests.support.launched import recipe, spec

OTHER: dict[str, Any] = {
    "name": "other",
    "model.kind": "alexnet",
    "model.module": "naive",
    "model.stem": "separable",
    "augmentation.interpolations": ("nearest",),
    "augmentation.area": (0.5, 0.9),
    "augmentation.aspect": (0.9, 1.1),
    "augmentation.decoding": "exact",
    "augmentation.stages": ("decode", "crop", "mine:stage"),
    "augmentation.batch_stages": ("mixup",),
    "order.balance": "class",
    "preprocessing.mean": (1.0, 2.0, 3.0),
    "precision": "bfloat16",
    "schedule.kind": "cosine",
    "optimizer.clip_norm": 1.0,
    "optimizer.kind": "adamw",
    "loss.class_weights": (1.0, 2.0),
    "code": {"mine:stage": "digest"},
    "averaging.kind": "exponential",
    "initial_weights": "0123456789abcdef",
}


# ------------------------------------------------------------------ destination
def test_defaults_come_from_the_runs_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    found = Destination(data="digits").resolve()
    assert found.storage == str(tmp_path)
    assert found.data == f"{tmp_path}/data/digits"
    assert found.tracking == f"sqlite:///{tmp_path}/mlflow.db"
    assert found.resolve() == found


def test_without_the_variable_runs_land_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUNS_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Destination(data="digits").resolve().storage == f"{tmp_path}/orchestrator-runs"


def test_what_is_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, "/elsewhere")
    asked = Destination(data="s3://bucket/data/", storage="s3://bucket/runs", tracking="http://mlflow:5000")
    assert asked.resolve() == asked.model_copy(update={"data": "s3://bucket/data", "experiment": "googlenet"})


@pytest.mark.parametrize("field", ["data", "storage"])
def test_relative_places_are_rejected_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: 'some/place' is a relative path"):
        Destination.from_dict({"data": "digits", "storage": "/runs", field: "some/place"}).resolve()


def test_a_relative_runs_variable_is_rejected_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, "runs")
    with pytest.raises(ConfigError, match=f"^{RUNS_VARIABLE}: 'runs'"):
        Destination(data="digits").resolve()


def test_mlflows_variables_stand_in_for_flags_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    found = Destination(data="digits", storage="s3://bucket/runs").resolve()
    assert (found.tracking, found.experiment) == ("http://mlflow:5000", "mine")
    given = Destination(data="digits", storage="/runs", tracking="http://other:1", experiment="theirs").resolve()
    assert (given.tracking, given.experiment) == ("http://other:1", "theirs")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "x" * 600)
    with pytest.raises(ConfigError, match=r"experiment: .* at most 250"):
        Destination(data="digits", storage="/runs").resolve()


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "file:///tmp/mlruns", "databricks"])
def test_a_variable_that_cannot_be_used_is_named(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI: .*--tracking"):
        Destination(data="digits", storage="/runs").resolve()
    assert Destination(data="digits", storage="/runs", tracking="http://m:1").resolve().tracking == "http://m:1"


def test_a_user_without_a_home_is_asked_for_a_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.delenv(RUNS_VARIABLE, raising=False)
    with pytest.raises(
        ConfigError,
        match=r"^storage: the user \(uid \d+\) has no home folder .*; set ORCHESTRATOR_RUNS \(or --storage, of",
    ):
        Destination(data="digits").resolve()
    with pytest.raises(ConfigError, match=r"^storage: '~/runs' begins with a home folder, and there is none"):
        Destination(data="digits", storage="~/runs").resolve()


def test_without_data_nothing_is_guessed() -> None:
    with pytest.raises(ConfigError, match=r"^data: needed: .* 'digits' for the embedded one"):
        Destination(storage="/runs").resolve()


def test_remote_storage_needs_a_tracking_uri_and_shows_no_secret() -> None:
    with pytest.raises(ConfigError, match=r"^tracking: needed when storage is s3://bucket/runs:") as raised:
        Destination(data="digits", storage="s3://bucket/runs?key=secret").resolve()
    assert "secret" not in str(raised.value)


def test_a_runs_variable_with_credentials_is_rejected_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, "s3://me:sec/ret@bucket/runs")
    with pytest.raises(ConfigError, match=f"^{RUNS_VARIABLE}: must be a URL without user name and password") as raised:
        Destination(data="digits").resolve()
    assert "ret" not in str(raised.value).replace("SECRET", "")


def test_what_is_kept_of_a_destination_has_no_secret() -> None:
    kept = Destination(
        data="https://me:secret@host/d?token=secret", storage="/runs", tracking="http://me:secret@mlflow:5000"
    ).redact()
    assert (kept.data, kept.storage, kept.tracking) == ("https://host/d", "/runs", "http://mlflow:5000")


def test_workers_are_not_told_the_tracker_s_password() -> None:
    place = Destination(data="https://host/d?token=needed", storage="/runs", tracking="http://me:secret@mlflow:5000")
    redacted = spec().model_copy(update={"destination": place}).redact_tracking().destination
    assert (redacted.data, redacted.storage, redacted.tracking) == (place.data, place.storage, "http://mlflow:5000")


# ------------------------------------------------------------------ identity
@pytest.mark.parametrize(
    "path", [path for path in flatten_config(recipe()) if path not in ("version", "schedule.kind")]
)
def test_every_field_of_the_recipe_changes_the_identity(path: str) -> None:
    base = recipe()
    value = flatten_config(base)[path]
    if path in OTHER:
        other = OTHER[path]
    elif isinstance(value, bool):
        other = not value
    else:
        other = value + 1 if isinstance(value, int) else value * 0.4 + 0.01
    changed = apply_overrides(base, {path: other})
    assert changed != base
    assert spec(changed).identity != spec(base).identity


def test_another_kind_of_schedule_is_another_run() -> None:
    base = recipe()
    assert spec(apply_overrides(base, {"schedule.kind": "cosine"})).identity != spec(base).identity


@pytest.mark.parametrize("change", [{"dataset_digest": "another"}, {"generation": 1}])
def test_dataset_and_generation_change_the_identity(change: dict[str, Any]) -> None:
    base = spec()
    assert base.model_copy(update=change).identity != base.identity


@pytest.mark.parametrize(
    "change",
    [
        {"placement": Placement(workers=2, cpus_per_worker=3, gpus_per_worker=0.5, max_restarts=9)},
        {"cadence": Cadence(checkpoint_seconds=1.0, validate_epochs=2)},
        {"destination": Destination(data="s3://b/d", storage="s3://b/runs", tracking="http://h:1", experiment="e")},
    ],
)
def test_places_hardware_and_cadence_do_not(change: dict[str, Any]) -> None:
    base = spec()
    assert base.model_copy(update=change).name == base.name


def test_name_and_folder_identify_the_run() -> None:
    run = spec(recipe("some-net"), "s3://bucket/runs")
    assert run.name == f"some-net-{run.identity}"
    assert run.folder == f"s3://bucket/runs/models/{run.name}"
    assert RunSpec.from_dict(run.to_dict()) == run


# ------------------------------------------------------------------ workers that would have no data
def test_more_workers_than_lanes_or_images_are_rejected_before_anything_starts() -> None:
    base = recipe()
    with pytest.raises(ValidationError, match=r"placement.workers must be at most order.lanes \(8\), got 9"):
        JobConfig(recipe=base, placement=Placement(workers=9))
    with pytest.raises(ConfigError, match=r"placement.workers must be at most batch_size \(4\), got 5"):
        JobConfig.from_dict({"recipe": {**base.to_dict(), "batch_size": 4}, "placement": {"workers": 5}})
    with pytest.raises(ValidationError, match=r"order\.lanes"):
        spec(base, workers=9)
    assert spec(base, workers=8).placement.workers == 8


# ------------------------------------------------------------------ recipes from files
FOUND = Provenance(sweep="tiny-pbt", trial="t003", dataset="digits", dataset_digest="0123456789abcdef", score=12.5)


@pytest.mark.parametrize(
    ("name", "provenance", "data"),
    [
        ("googlenet-tiny", None, "digits"),
        ("googlenet-digits-m3-wide", None, "digits"),
        ("lenet-5-digits-best", Provenance(sweep="s"), "digits"),
        ("googlenet-digitsy", None, ""),
        ("googlenet-imagenet", None, ""),
        ("mine", FOUND, "digits"),
        ("googlenet-tiny", FOUND.model_copy(update={"dataset": "flowers"}), ""),
    ],
)
def test_a_recipe_from_a_file_is_for_the_embedded_data_where_that_is_known(
    tmp_path: Path, name: str, provenance: Provenance | None, data: str
) -> None:
    place = tmp_path / "recipe.json"
    place.write_text(RecipeFile(recipe=recipe(name), provenance=provenance).to_json())
    found = make_preset_loader(JobConfig)(str(place)).value
    assert (found.recipe, found.provenance, found.destination) == (recipe(name), provenance, Destination(data=data))


def test_a_run_from_a_file_is_the_run_of_that_recipe_and_knows_where_it_comes_from() -> None:
    asked = JobConfig(recipe=recipe(), provenance=FOUND)
    run = asked.build_run_spec(recipe(), spec().destination, "0123456789abcdef")
    assert run.provenance == FOUND
    assert run.name == spec().name, "where a recipe comes from changes no result"
    assert RunSpec.from_dict(run.to_dict()) == run


def test_presets_come_from_nowhere() -> None:
    assert {preset.value.provenance for preset in build_job_presets(JobConfig).values()} == {None}


def test_a_spec_from_before_there_was_a_provenance_is_read() -> None:
    before = {name: value for name, value in spec().to_dict().items() if name != "provenance"}
    assert RunSpec.from_dict(before) == spec()


@pytest.mark.parametrize("folder", ["orchestrator-runs", "more runs/it's"])
@pytest.mark.parametrize(
    ("given", "default"),
    [
        ({"data": "digits"}, "digits"),
        ({"data": "digits"}, ""),
        ({"data": "/data/my flowers"}, "digits"),
        ({"data": "s3://bucket/data", "tracking": "http://host:5000", "experiment": "two words"}, ""),
        ({"data": "digits", "storage": "s3://bucket/runs", "tracking": "http://host:5000"}, "digits"),
    ],
)
def test_a_printed_command_leads_to_the_same_places(
    given: dict[str, str], default: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ORCHESTRATOR_RUNS", str(tmp_path / folder))
    places = Destination.from_dict(given).resolve()
    line = format_command("train-ensemble", ["file.json", *places.to_flags(default)])
    monkeypatch.delenv("ORCHESTRATOR_RUNS")  # the shell into which it is pasted
    words = shlex.split(line)
    assert words[:3] == ["orchestrator", "train-ensemble", "file.json"]
    presets = build_job_presets(TrainEnsembleConfig)
    preset = "googlenet-digits" if default else "googlenet-imagenet"
    parsed = parse_args("train_ensemble.py", "", presets, preset, [preset, *words[3:]])
    assert parsed.destination.resolve() == places


def test_batch_norm_on_single_images_is_rejected_before_anything_starts() -> None:
    base = presets.googlenet_bn_digits().model_copy(update={"batch_size": 3})
    with pytest.raises(ValidationError, match=r"batch_size must be at least 2 for each worker .* got 3 for 2 workers"):
        JobConfig(recipe=base, placement=Placement(workers=2))
    assert JobConfig(recipe=base).recipe.batch_size == 3


# ------------------------------------------------------------------ elastic runs
def test_a_run_has_a_fixed_number_of_workers_unless_it_names_a_least() -> None:
    fixed, changing, same = (
        Placement(workers=3),
        Placement(workers=3, min_workers=2),
        Placement(workers=3, min_workers=3),
    )
    assert [(one.fewest_workers, one.is_elastic) for one in (fixed, changing, same)] == [
        (3, False),
        (2, True),
        (3, False),
    ]


def test_a_least_above_the_most_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"min_workers must be at most workers \(3\), got 4"):
        Placement.from_dict({"workers": 3, "min_workers": 4})


def test_only_the_least_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ClusterCapacity((Node(1, 0), Node(1, 0)))
    monkeypatch.setattr(cluster, "get_capacity", lambda: two)
    assert wait_for_capacity(Placement(workers=3, min_workers=2), print) is two
    with pytest.raises(ClusterError, match="3 to 4 workers of 1 CPU"):
        wait_for_capacity(Placement(workers=4, min_workers=3), print)
