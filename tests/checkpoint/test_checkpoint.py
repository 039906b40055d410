"""Checkpoints: saved, verified, the newest good one found, few kept, nothing unpickled."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from orchestrator.checkpoint import checkpoint as checkpoints
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.checkpoint import STATE_FILE, CheckpointError, FormatVersionError, NonFiniteError
from orchestrator.storage import commit, file_io, urls
from tests.support.tiny_shards import flip_byte


def state(number: int = 0) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((2, 3), float(number)), "none": torch.zeros(0)},
        "optimizer": {"state": {0: {"momentum_buffer": None}}, "groups": [{"lr": 0.5, "params": [0, 1]}]},
        "samples": number,
        "name": "text",
    }


def saved(folder: Path, *places: tuple[int, int]) -> list[str]:
    return [checkpoints.save(str(folder), state(samples), samples, attempt) for samples, attempt in places]


def names(folder: Path) -> list[tuple[int, int]]:
    return [(place.samples, place.attempt) for place in checkpoint_dir.list_checkpoints(str(folder))]


class _Trap:
    """Unpickling this would make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


# ------------------------------------------------------------------ save and load
def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    strided = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    url = checkpoints.save(str(tmp_path), state(7) | {"strided": strided}, 7, 1)
    found = checkpoints.load(url)
    assert found["optimizer"] == state(7)["optimizer"]
    assert (found["samples"], found["name"]) == (7, "text")
    assert torch.equal(found["model"]["weight"], torch.full((2, 3), 7.0))
    assert torch.equal(found["strided"], strided)
    assert found["strided"].stride() == strided.stride(), "memory format decides in which order sums are made"


def test_other_storage_will_do() -> None:
    url = checkpoints.save("memory://checkpoints-test", state(3), 3, 2)
    assert checkpoints.load(url)["samples"] == 3
    newest = checkpoints.load_newest("memory://checkpoints-test")
    assert newest.checkpoint == checkpoint_dir.CheckpointFolder(url, 3, 2)
    file_io.remove("memory://checkpoints-test")


def test_objects_are_rejected_and_never_made(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    url = checkpoints.save(str(tmp_path / "run"), state() | {"trap": _Trap(str(trap))}, 1, 1)
    with pytest.raises(CheckpointError, match=url):
        checkpoints.load(url)
    assert not trap.exists()


def test_what_is_no_state_is_rejected(tmp_path: Path) -> None:
    url = str(tmp_path / "one")
    commit.write_folder(url, {"other.pt": b"1"}, {"format_version": checkpoints.FORMAT_VERSION})
    with pytest.raises(CheckpointError, match=checkpoints.STATE_FILE):
        checkpoints.load(url)
    list_file = tmp_path / "list.pt"
    torch.save([1], list_file)
    commit.write_folder(
        url, {checkpoints.STATE_FILE: list_file.read_bytes()}, {"format_version": checkpoints.FORMAT_VERSION}
    )
    with pytest.raises(CheckpointError, match="list"):
        checkpoints.load(url)


@pytest.mark.parametrize("version", [0, 1, None, "2"])
def test_another_format_version_is_rejected(tmp_path: Path, version: object) -> None:
    url = str(tmp_path / "one")
    about = {} if version is None else {"format_version": version}
    commit.write_folder(url, {checkpoints.STATE_FILE: checkpoints.serialize_state(state())}, about)
    with pytest.raises(CheckpointError, match=f"format {version!r}"):
        checkpoints.load(url)


def test_damage_is_a_checkpoint_error_and_absence_is_not(tmp_path: Path) -> None:
    (url,) = saved(tmp_path, (1, 1))
    flip_byte(Path(url) / checkpoints.STATE_FILE, 500)
    with pytest.raises(CheckpointError, match=r"state\.pt: damaged"):
        checkpoints.load(url)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_any_flipped_bit_of_done_is_found_or_harmless(tmp_path: Path, bit: int) -> None:
    (url,) = saved(tmp_path, (1, 1))
    done = Path(url) / commit.DONE
    whole = done.read_bytes()
    for where in range(len(whole)):
        done.write_bytes(whole[:where] + bytes([whole[where] ^ bit]) + whole[where + 1 :])
        try:
            newest = checkpoints.load_newest(str(tmp_path))
        except FormatVersionError:
            assert b'"format_version": 2' not in done.read_bytes()
            continue
        assert (newest.checkpoint is None) == bool(newest.skipped)
        if newest.checkpoint is not None:
            assert torch.equal(newest.state["model"]["weight"], torch.ones(2, 3))


# ------------------------------------------------------------------ the newest
def test_names_sort_by_progress_and_attempt(tmp_path: Path) -> None:
    saved(tmp_path, (9, 1), (10, 1), (100_000_000_000, 3), (10, 12), (10, 2))
    found = names(tmp_path)
    assert found == [(100_000_000_000, 3), (10, 12), (10, 2), (10, 1), (9, 1)]
    assert sorted(file_io.list_names(str(tmp_path)), reverse=True) == [
        urls.get_basename(place.url) for place in checkpoint_dir.list_checkpoints(str(tmp_path))
    ]


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, (1, 1))
    for name in ("samples-1-attempt-1", "notes.txt", "samples-000000000000002-attempt-000001.old"):
        file_io.write_bytes(str(tmp_path / name / "x"), b"")
    assert names(tmp_path) == [(1, 1)]


def test_nothing_there_is_the_beginning(tmp_path: Path) -> None:
    assert checkpoints.load_newest(str(tmp_path / "nowhere")) == checkpoints.LoadedCheckpoint(None, {}, [])


def test_the_newest_good_one_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    _, good, damaged, uncommitted = saved(tmp_path, (1, 1), (2, 1), (3, 1), (4, 2))
    flip_byte(Path(damaged) / checkpoints.STATE_FILE, 500)
    file_io.remove(file_io.join(uncommitted, commit.DONE))
    newest = checkpoints.load_newest(str(tmp_path))
    assert newest.checkpoint == checkpoint_dir.CheckpointFolder(good, 2, 1)
    assert newest.state["samples"] == 2
    first, second = newest.skipped
    assert uncommitted in first
    assert "not committed" in first
    assert damaged in second
    assert "damaged" in second


def test_when_all_are_damaged_that_is_said(tmp_path: Path) -> None:
    (url,) = saved(tmp_path, (1, 1))
    flip_byte(Path(url) / checkpoints.STATE_FILE, 500)
    newest = checkpoints.load_newest(str(tmp_path))
    assert newest.checkpoint is None
    assert [url in text for text in newest.skipped] == [True]


def test_a_good_older_one_is_used_beside_one_of_another_version(tmp_path: Path) -> None:
    good, newer = saved(tmp_path, (1, 1), (2, 1))
    commit.write_folder(newer, {checkpoints.STATE_FILE: checkpoints.serialize_state(state())}, {"format_version": 1})
    assert checkpoints.load_newest(str(tmp_path)).checkpoint == checkpoint_dir.CheckpointFolder(good, 1, 1)


def test_when_all_are_of_another_version_training_does_not_begin_anew(tmp_path: Path) -> None:
    (url,) = saved(tmp_path, (1, 1))
    commit.write_folder(url, {checkpoints.STATE_FILE: checkpoints.serialize_state(state())}, {"format_version": 1})
    with pytest.raises(FormatVersionError, match=r"format 1; this code reads 2: .*--new"):
        checkpoints.load_newest(str(tmp_path))


# ------------------------------------------------------------------ numbers that are none
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_neither_saved_nor_loaded(tmp_path: Path, value: float) -> None:
    spoilt = state()
    spoilt["model"]["weight"][1, 2] = value
    with pytest.raises(NonFiniteError, match=r"model\.weight holds NaN or infinite"):
        checkpoints.save(str(tmp_path), spoilt, 2, 1)
    assert names(tmp_path) == [], "nothing is written"
    (good,) = saved(tmp_path, (1, 1))
    url = checkpoint_dir.make_checkpoint_url(str(tmp_path), 3, 1)
    commit.write_folder(
        url,
        {checkpoints.STATE_FILE: checkpoints.serialize_state(spoilt)},
        {"format_version": checkpoints.FORMAT_VERSION},
    )
    with pytest.raises(CheckpointError, match=r"model\.weight holds NaN or infinite"):
        checkpoints.load(url)
    found = checkpoints.load_newest(str(tmp_path))
    assert found.checkpoint == checkpoint_dir.CheckpointFolder(good, 1, 1)
    assert "model.weight" in found.skipped[0]


def test_large_numbers_are_finite_though_their_sum_is_not(tmp_path: Path) -> None:
    large = {"weight": torch.full((4,), 3e38), "half": torch.full((4,), 6e4, dtype=torch.float16)}
    assert checkpoints.load(checkpoints.save(str(tmp_path), large, 1, 1))["weight"][0] == torch.tensor(3e38)


def test_passwords_in_urls_are_not_shown(tmp_path: Path) -> None:
    url = "memory://user:secret@checkpoints-secret/one"
    with pytest.raises(NonFiniteError) as caught:
        checkpoints.save(url, {"weight": torch.full((1,), float("nan"))}, 1, 1)
    commit.write_folder(url, {checkpoints.STATE_FILE: b"no zip"}, {"format_version": checkpoints.FORMAT_VERSION})
    with pytest.raises(CheckpointError) as also:
        checkpoints.load(url)
    assert "checkpoints-secret" in str(caught.value)
    assert "secret@" not in f"{caught.value} {also.value}"
    file_io.remove(url)


# ------------------------------------------------------------------ few are kept
@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [4, 3]), (4, [4, 3, 2, 1]), (9, [4, 3, 2, 1])])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, kept: list[int]) -> None:
    urls = saved(tmp_path, (1, 1), (2, 1), (3, 1), (4, 1))
    checkpoints.remove_old_checkpoints(str(tmp_path), keep, urls[-1])
    assert [samples for samples, _ in names(tmp_path)] == kept
    assert all(checkpoints.load(place.url) for place in checkpoint_dir.list_checkpoints(str(tmp_path)))


def test_prune_keeps_the_only_complete_one_whatever_lies_around_it(tmp_path: Path) -> None:
    older, good, newer = saved(tmp_path, (1, 1), (2, 1), (3, 1))
    for url in (older, newer):
        file_io.remove(file_io.join(url, commit.DONE))
    checkpoints.remove_old_checkpoints(str(tmp_path), 2, good)
    assert names(tmp_path) == [(3, 1), (2, 1), (1, 1)]
    checkpoints.remove_old_checkpoints(str(tmp_path), 1, good)
    assert names(tmp_path) == [(3, 1), (2, 1)]
    assert checkpoints.load_newest(str(tmp_path)).state["samples"] == 2


def test_a_damaged_newer_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """An attempt that passed it over saves again: its own checkpoint must not go for the damaged one's sake."""
    _, damaged = saved(tmp_path, (1, 1), (9, 1))
    flip_byte(Path(damaged) / checkpoints.STATE_FILE, 500)
    (mine,) = saved(tmp_path, (2, 2))
    checkpoints.remove_old_checkpoints(str(tmp_path), 1, mine)
    assert names(tmp_path) == [(9, 1), (2, 2)]
    assert checkpoints.load_newest(str(tmp_path)).state["samples"] == 2


def test_prune_counts_attempts_at_the_same_progress_one_by_one(tmp_path: Path) -> None:
    urls = saved(tmp_path, (5, 1), (5, 2), (5, 3))
    checkpoints.remove_old_checkpoints(str(tmp_path), 2, urls[-1])
    assert names(tmp_path) == [(5, 3), (5, 2)]


# ------------------------------------------------------------------ bounds
def test_a_state_that_unpacks_to_more_than_it_is_said_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(checkpoints.serialize_state({"a": torch.zeros(2**20)}))) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in plain.namelist():
            deflated.writestr(name, plain.read(name))
    assert len(packed.getvalue()) < 2**15
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    url = str(tmp_path / "one")
    commit.write_folder(url, {"state.pt": packed.getvalue()}, {"format_version": checkpoints.FORMAT_VERSION})
    with pytest.raises(CheckpointError, match=r"state\.pt is not what torch\.save writes: its entry .* is compressed"):
        checkpoints.load(url)


def test_a_tensor_of_more_numbers_than_are_stored(tmp_path: Path) -> None:
    url = str(tmp_path / "one")
    endless = {"model": {"weight": torch.zeros(1).expand(10**15)}}
    payload = {"state.pt": checkpoints.serialize_state(endless)}
    commit.write_folder(url, payload, {"format_version": checkpoints.FORMAT_VERSION})
    with pytest.raises(CheckpointError, match=r"model\.weight claims more numbers"):
        checkpoints.load(url)


# ------------------------------------------------------------------ final weights and the hash that identifies them
def some(value: float = 1.0) -> dict[str, Tensor]:
    return {"b": torch.full((2, 2), value), "a": torch.arange(24.0).reshape(1, 2, 3, 4)}


def test_final_weights_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    url = str(tmp_path / "final")
    digest = checkpoints.save_final_weights(url, some(1.0), some(2.0), {"name": "x", "epochs": 3}, ("ant", "bee"))
    found = checkpoints.load_final_weights(url)
    assert found.digest == digest == checkpoint_dir.read_weights_digest(url)
    assert (found.recipe, found.classes) == ({"name": "x", "epochs": 3}, ("ant", "bee"))
    assert torch.equal(found.averaged["b"], some(1.0)["b"])
    assert torch.equal(found.raw["b"], some(2.0)["b"])


def test_averaged_weights_are_there_for_anything_that_reads_safetensors(tmp_path: Path) -> None:
    averaged = some(1.0) | {"c": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)}
    digest = checkpoints.save_final_weights(str(tmp_path / "final"), averaged, some(2.0), {"name": "x"}, ("ant", "bee"))
    with safe_open(tmp_path / "final" / "averaged.safetensors", framework="np") as found:
        assert set(found.keys()) == {"a", "b", "c"}
        assert found.get_tensor("c").tolist() == averaged["c"].tolist()
        about = found.metadata()
    assert (json.loads(about["recipe"]), json.loads(about["classes"])) == ({"name": "x"}, ["ant", "bee"])
    assert (about["weights"], about["format_version"]) == (digest, "2")


def test_a_damaged_export_is_found(tmp_path: Path) -> None:
    checkpoints.save_final_weights(str(tmp_path / "final"), some(), some(), {}, ())
    flip_byte(tmp_path / "final" / checkpoint_dir.EXPORT_FILE, -1)
    with pytest.raises(CheckpointError, match=r"averaged\.safetensors: damaged"):
        checkpoints.load_final_weights(str(tmp_path / "final"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"raw\.b"):
        checkpoints.save_final_weights(str(tmp_path / "final"), some(), some(float("inf")), {}, ())
    assert not (tmp_path / "final").exists()


def test_the_digest_never_changes() -> None:
    """Score stores are keyed by it: another digest for old weights would score everything again."""
    assert checkpoints.compute_digest(some()) == "cfee9f47a3cd6367"


def test_the_digest_is_of_names_and_values_alone() -> None:
    plain = checkpoints.compute_digest(some())
    assert checkpoints.compute_digest(dict(sorted(some().items()))) == plain, "not of the order"
    strided = some() | {"a": some()["a"].contiguous(memory_format=torch.channels_last)}
    assert checkpoints.compute_digest(strided) == plain, "not of the layout in memory"
    assert checkpoints.compute_digest({name: torch.nn.Parameter(tensor) for name, tensor in some().items()}) == plain


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
    assert checkpoints.compute_digest(some() | changed) != checkpoints.compute_digest(some())


def test_absent_and_damaged(tmp_path: Path) -> None:
    url = tmp_path / "final"
    for call in (checkpoints.load_final_weights, checkpoint_dir.read_weights_digest):
        with pytest.raises(FileNotFoundError):
            call(str(url))
    checkpoints.save_final_weights(str(url), some(), some(), {}, ("ant", "bee"))
    flip_byte(url / STATE_FILE, 500)
    with pytest.raises(CheckpointError):
        checkpoints.load_final_weights(str(url))
    (url / commit.DONE).unlink()
    with pytest.raises(FileNotFoundError):
        checkpoints.load_final_weights(str(url))
