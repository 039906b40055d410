"""Final weights and the hash that identifies them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from orchestrator.checkpoint import checkpoint, checkpoint_dir
from orchestrator.checkpoint.checkpoint import STATE_FILE, CheckpointError, NonFiniteError
from orchestrator.storage import commit
from tests.support.tiny_shards import flip_byte


def some(value: float = 1.0) -> dict[str, Tensor]:
    return {"b": torch.full((2, 2), value), "a": torch.arange(24.0).reshape(1, 2, 3, 4)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    url = str(tmp_path / "final")
    digest = checkpoint.save_final_weights(url, some(1.0), some(2.0), {"name": "x", "epochs": 3}, ("ant", "bee"))
    found = checkpoint.load_final_weights(url)
    assert found.digest == digest == checkpoint_dir.read_weights_digest(url)
    assert (found.recipe, found.classes) == ({"name": "x", "epochs": 3}, ("ant", "bee"))
    assert torch.equal(found.averaged["b"], some(1.0)["b"])
    assert torch.equal(found.raw["b"], some(2.0)["b"])


def test_averaged_weights_are_there_for_anything_that_reads_safetensors(tmp_path: Path) -> None:
    averaged = some(1.0) | {"c": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)}
    digest = checkpoint.save_final_weights(str(tmp_path / "final"), averaged, some(2.0), {"name": "x"}, ("ant", "bee"))
    with safe_open(tmp_path / "final" / "averaged.safetensors", framework="np") as found:
        assert set(found.keys()) == {"a", "b", "c"}
        assert found.get_tensor("c").tolist() == averaged["c"].tolist()
        about = found.metadata()
    assert (json.loads(about["recipe"]), json.loads(about["classes"])) == ({"name": "x"}, ["ant", "bee"])
    assert (about["weights"], about["format_version"]) == (digest, "2")


def test_a_damaged_export_is_found(tmp_path: Path) -> None:
    checkpoint.save_final_weights(str(tmp_path / "final"), some(), some(), {}, ())
    flip_byte(tmp_path / "final" / checkpoint_dir.EXPORT_FILE, -1)
    with pytest.raises(CheckpointError, match=r"averaged\.safetensors: damaged"):
        checkpoint.load_final_weights(str(tmp_path / "final"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"raw\.b"):
        checkpoint.save_final_weights(str(tmp_path / "final"), some(), some(float("inf")), {}, ())
    assert not (tmp_path / "final").exists()


def test_the_digest_never_changes() -> None:
    """Score stores are keyed by it: another digest for old weights would score everything again."""
    assert checkpoint.compute_digest(some()) == "cfee9f47a3cd6367"


def test_the_digest_is_of_names_and_values_alone() -> None:
    plain = checkpoint.compute_digest(some())
    assert checkpoint.compute_digest(dict(sorted(some().items()))) == plain, "not of the order"
    strided = some() | {"a": some()["a"].contiguous(memory_format=torch.channels_last)}
    assert checkpoint.compute_digest(strided) == plain, "not of the layout in memory"
    assert checkpoint.compute_digest({name: torch.nn.Parameter(tensor) for name, tensor in some().items()}) == plain


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.tensor([[1.0, 1.0], [1.0, 1.0000001]])},
        {"b": torch.ones(4)},
        {"b": torch.ones(2, 2, dtype=torch.float64)},
        {"c": torch.ones(1)},
    ],
    ids=["value", "shape", "type", "name"],
)
def test_changed_weights_have_another_digest(changed: dict[str, Tensor]) -> None:
    assert checkpoint.compute_digest(some() | changed) != checkpoint.compute_digest(some())


def test_absent_and_damaged(tmp_path: Path) -> None:
    url = tmp_path / "final"
    for call in (checkpoint.load_final_weights, checkpoint_dir.read_weights_digest):
        with pytest.raises(FileNotFoundError):
            call(str(url))
    checkpoint.save_final_weights(str(url), some(), some(), {}, ("ant", "bee"))
    flip_byte(url / STATE_FILE, 500)
    with pytest.raises(CheckpointError):
        checkpoint.load_final_weights(str(url))
    (url / commit.DONE).unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint.load_final_weights(str(url))
