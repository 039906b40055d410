"""Fine-tuning: tensors that are loaded or initialised anew, and weights that cannot be used."""

from pathlib import Path

import pytest
import torch
from safetensors import torch as safe
from torch import Tensor

from orchestrator.checkpoint import checkpoint, checkpoint_dir
from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import apply_overrides
from orchestrator.models.network import Network
from orchestrator.models.registry import create_model
from orchestrator.training.warm_start import (
    LoadedWeights,
    load_pretrained,
    resolve_initial_weights,
)
from tests.support.runs import ask_to_stop, events, final, job, recipe, stop_asking, train


def network(classes: int = 3, seed: int = 1, changes: dict[str, object] | None = None) -> Network:
    return create_model(apply_overrides(recipe(), changes or {}).model, classes, seed)


def compute_weights_digest(url: str) -> str:
    return resolve_initial_weights(recipe(), url).initial_weights


def exported(given: Network) -> dict[str, Tensor]:
    names = given.get_auxiliary_names()
    return {name: tensor for name, tensor in given.state_dict().items() if name not in names}


@pytest.fixture(params=["folder", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Weights of seed 9 for three classes, as a final folder and as its safetensors file."""
    url = tmp_path / "final"
    checkpoint.save_final_weights(
        str(url), exported(network(seed=9)), exported(network(seed=8)), recipe().to_dict(), ("a", "b", "c")
    )
    return str(url / checkpoint_dir.EXPORT_FILE if request.param == "file" else url)


def test_the_same_network_takes_all_but_the_auxiliary_heads(place: str) -> None:
    model, before, given = network(), network().state_dict(), network(seed=9).state_dict()
    kept = load_pretrained(model, place, compute_weights_digest(place)).initialized_names
    assert set(kept) == model.get_auxiliary_names() != frozenset()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in kept else given[name])


def test_the_identity_is_the_content_wherever_it_lies(place: str) -> None:
    assert compute_weights_digest(place) == checkpoint.compute_digest(exported(network(seed=9)))


def test_for_other_classes_the_layers_of_scores_are_built_anew(place: str) -> None:
    model, before = network(classes=5), network(classes=5).state_dict()
    kept = load_pretrained(model, place, compute_weights_digest(place)).initialized_names
    assert set(kept) == model.get_auxiliary_names() | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)
    taken = "stages.conv1.conv.weight"
    assert torch.equal(model.state_dict()[taken], network(seed=9).state_dict()[taken])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.width": 0.2},
            r"'stages\.conv1\.conv\.weight' has shape \(6, 3, 7, 7\), the recipe's network has \(13, 3",
        ),
        ({"model.module": "naive"}, "another network"),
    ],
)
def test_another_network_is_rejected_and_left_as_it_is(place: str, changes: dict[str, object], message: str) -> None:
    one, before = network(changes=changes), network(changes=changes).state_dict()
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(one, place, compute_weights_digest(place))
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


def test_other_weights_than_the_run_was_started_from_are_rejected(place: str) -> None:
    with pytest.raises(CheckpointError, match=r"the run was started from 0{16}: .*--new"):
        load_pretrained(network(), place, "0" * 16)


def test_the_recipe_names_the_weights_by_their_content(place: str) -> None:
    assert resolve_initial_weights(recipe(), "") == recipe()
    found = resolve_initial_weights(recipe(), place)
    assert found.initial_weights == compute_weights_digest(place)
    assert resolve_initial_weights(found, place) == found


@pytest.mark.parametrize(
    ("named", "url", "message"),
    [
        ("", "/nowhere/final", "weights: must be a finished run's final folder .* got /nowhere/final"),
        ("", "final", "weights"),
        ("0" * 16, "", "set --weights"),
    ],
)
def test_weights_that_cannot_be_used_are_rejected_before_anything_starts(named: str, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_initial_weights(recipe(initial_weights=named), url)


def test_a_run_starts_from_given_weights_once(small: Path, tmp_path: Path, place: str) -> None:
    """A rate of next to nothing: what comes out is what went in. The resumed attempt needs the weights no more."""
    of = apply_overrides(resolve_initial_weights(recipe(epochs=1), place), {"schedule.base_rate": 1e-9})
    one = job(small, tmp_path / "run", of, pulse_steps=2).model_copy(update={"weights": place})
    ask_to_stop(one)
    assert train(one).status == "stopped"
    stop_asking(one)
    assert train(one.model_copy(update={"weights": "/nowhere"})).status == "finished"
    raw, start = final(one).raw, exported(network(seed=9))
    assert max(float((raw[name] - start[name]).abs().max()) for name in raw) < 1e-6


def test_a_run_whose_weights_changed_does_not_start(small: Path, tmp_path: Path, place: str) -> None:
    one = job(small, tmp_path / "run", recipe(initial_weights="0" * 16)).model_copy(update={"weights": place})
    outcome = train(one)
    assert outcome.status == "bad-checkpoint"
    assert "the run was started from 0000" in outcome.message
    moved = train(one.model_copy(update={"weights": "/nowhere"}))
    assert (moved.status, "got /nowhere; " in moved.message) == ("bad-checkpoint", True)


def test_other_content_is_rejected(tmp_path: Path) -> None:
    for name in ("nowhere", "nowhere.safetensors"):
        with pytest.raises(ConfigError, match="must be a finished run's final folder"):
            compute_weights_digest(str(tmp_path / name))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match=r"bad\.safetensors: no safetensors file"):
        compute_weights_digest(str(bad))
    bad.write_bytes(safe.save({"one": torch.tensor([float("nan")])}))
    with pytest.raises(ConfigError, match="one has NaN"):
        compute_weights_digest(str(bad))


# ------------------------------------------------------------------ weights as others save them
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_no_part_of_a_name(prefix: str, tmp_path: Path) -> None:
    plain, path = exported(network(seed=9)), tmp_path / "wrapped.safetensors"
    path.write_bytes(safe.save({f"{prefix}{name}": tensor for name, tensor in plain.items()}))
    assert compute_weights_digest(str(path)) == checkpoint.compute_digest(plain)
    model = network()
    load_pretrained(model, str(path), compute_weights_digest(str(path)))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())


def test_a_part_may_be_compiled_by_itself(tmp_path: Path) -> None:
    plain, path = exported(network(seed=9)), tmp_path / "part.safetensors"
    path.write_bytes(safe.save({name.replace("stages.", "stages._orig_mod."): one for name, one in plain.items()}))
    assert compute_weights_digest(str(path)) == checkpoint.compute_digest(plain)


def test_a_layer_may_be_called_module(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(safe.save({"module.weight": torch.ones(1), "other.weight": torch.ones(2)}))
    assert compute_weights_digest(str(path)) == checkpoint.compute_digest(
        {"module.weight": torch.ones(1), "other.weight": torch.ones(2)}
    )


def test_a_tensor_with_and_without_a_prefix_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "twice.safetensors"
    path.write_bytes(safe.save({"weight": torch.ones(1), "_orig_mod.weight": torch.ones(1)}))
    with pytest.raises(ConfigError, match="holds a tensor twice"):
        compute_weights_digest(str(path))


def test_what_was_loaded_and_what_was_not_is_reported(place: str) -> None:
    loaded = load_pretrained(model := network(), place, compute_weights_digest(place))
    heads = len(model.get_auxiliary_names())
    assert loaded.classes == ("a", "b", "c")
    text = loaded.describe(place, ("a", "b", "c"))
    assert f"{loaded.num_loaded} of {loaded.num_loaded + heads} tensors loaded; initialised anew: heads." in text
    assert "classes" not in text
    assert loaded.describe(place, ("a", "c", "b")).endswith("; their 3 classes differ from the 3 of the dataset")
    other = load_pretrained(network(classes=5), place, compute_weights_digest(place))
    assert "classifier" in LoadedWeights(1, other.initialized_names[-2:]).describe(place, ())
    assert other.describe(place, tuple("abcde")).endswith("; their 3 classes differ from the 5 of the dataset")


def test_a_run_records_what_it_was_started_from(small: Path, tmp_path: Path, place: str) -> None:
    one = job(small, tmp_path / "run", resolve_initial_weights(recipe(epochs=1), place)).model_copy(
        update={"weights": place}
    )
    assert train(one).status == "finished"
    (event,) = events(one, "weights")
    assert f"weights of {place}: " in str(event.values["loaded"])


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "folder", "folder.safetensors"])
def test_another_kind_of_file_is_named_with_the_way_out(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    else:
        torch.save(exported(network()), path)
    with pytest.raises(ConfigError, match=rf"must be a finished run's final folder .* got {path}; convert"):
        resolve_initial_weights(recipe(), str(path))
