"""The audit of runs that trained: clean whatever interrupted them, and not clean when the record is another one."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.cli import audit
from orchestrator.cli.config import AuditConfig
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.storage import commit, file_io
from orchestrator.training.config import TrainJob
from orchestrator.training.run_dir import get_checkpoints_dir, get_final_weights_dir, get_journal_dir
from tests.support import ensembles, launched, runs, tiny_shards
from tests.support.launched import write_journal
from tests.support.runs import RecordingContext


def test_an_ensemble_is_no_run(tmp_path: Path) -> None:
    ensembles.members(tmp_path)
    ensembles.ensemble(tmp_path)
    with pytest.raises(ConfigError, match=r"runs: 'tiny-x3': must be a run, not an ensemble or a sweep; give its runs"):
        audit.run_audit(AuditConfig(runs=("tiny-x3",), storage=str(tmp_path)), Console(file=io.StringIO()))


def placed(storage: Path, data: Path, **cadence: Any) -> TrainJob:
    """A run of two epochs where a launcher would put it, with its spec."""
    of = runs.recipe(epochs=2)
    spec = RunSpec(
        recipe=of,
        placement=Placement(),
        destination=Destination(data=str(data), storage=str(storage), tracking="sqlite:////nowhere/x.db"),
        dataset_digest=manifest.load(str(data)).digest(),
    )
    file_io.write_bytes(file_io.join(spec.folder, "spec.json"), spec.to_json().encode())
    return runs.job(data, Path(spec.folder), of, **cadence)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training samples, one of them broken: 6 batches of 8 an epoch, two samples left out."""
    folder = tmp_path_factory.mktemp("data")
    splits = {
        "train": [*tiny_shards.samples(49), RawSample("broken", b"no image", 0)],
        "validation": tiny_shards.samples(5, 500),
    }
    write_dataset(str(folder), "x", tiny_shards.CLASSES, splits, 6)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    done = placed(tmp_path_factory.mktemp("runs"), data)
    runs.first_optimizer_step()
    assert runs.train(done).status == "finished"
    return done


@pytest.fixture
def one(trained: TrainJob, tmp_path: Path) -> TrainJob:
    """The trained run, to be harmed."""
    folder = tmp_path / "models" / Path(trained.folder).name
    shutil.copytree(trained.folder, folder)
    return trained.model_copy(update={"folder": str(folder)})


def audit_run(of: TrainJob, **options: str) -> tuple[int, str]:
    """Exit status and what was printed, spaces as single ones."""
    out = io.StringIO()
    status = audit.run_audit(AuditConfig(runs=(of.folder,), data=options.get("data", "")), Console(width=200, file=out))
    return status, re.sub(r"[ \u2500-\u257f]+", " ", out.getvalue())


# ------------------------------------------------------------------ clean
def test_a_finished_run_is_as_planned(trained: TrainJob) -> None:
    status, text = audit_run(trained)
    assert status == 0
    assert f"{Path(trained.folder).name}: final weights" in text
    for epoch, record in enumerate(runs.delivered(trained).epochs):
        assert f" {epoch + 1} 48 48 48 2 {len(record.bad)} as planned" in text
    assert "bad: broken at byte " in text
    assert "attempts: 1, incidents: 0\n" in text


def test_a_run_is_found_by_name_and_by_url(trained: TrainJob) -> None:
    storage, name = Path(trained.folder).parent.parent, Path(trained.folder).name
    quiet = Console(quiet=True)
    assert audit.run_audit(AuditConfig(runs=(name,), storage=str(storage)), quiet) == 0
    assert (
        audit.run_audit(
            AuditConfig(runs=(name, f"file://{trained.folder}"), storage=str(storage), data=trained.data), quiet
        )
        == 0
    )


def test_a_run_that_is_not_done_is_audited_by_its_newest_checkpoint(data: Path, tmp_path: Path) -> None:
    one = placed(tmp_path, data, pulse_steps=8)
    runs.ask_to_stop(one)
    assert [runs.train(one).samples for _ in range(2)] == [48, 64], "at an epoch's end, then at a pulse"
    status, text = audit_run(one)
    assert status == 0
    assert "checkpoint at 64 samples" in text
    assert " 1 48 48 48 2 " in text
    assert re.search(r" 2 16 16 16 34 \d as planned", text)


def test_a_run_that_failed_and_resumed_is_clean_with_its_replay(data: Path, tmp_path: Path) -> None:
    one = placed(tmp_path, data, pulse_steps=4)
    runs.ask_to_stop(one)
    assert runs.train(one).samples == 32
    runs.stop_asking(one)
    with pytest.raises(RuntimeError, match="gone"):
        runs.train(one, context=RecordingContext(RuntimeError("gone")))
    assert runs.train(one).status == "finished"
    status, text = audit_run(one)
    assert status == 0
    assert "attempts: 3, incidents: 1; at least 16 samples were delivered, rolled back and delivered again" in text


def test_a_damaged_journal_does_not_prevent_an_audit(one: TrainJob) -> None:
    write_journal(one.folder, 2, [("incident", 8, {"samples_replayed": 5})])
    (segment, *_) = file_io.list_names(get_journal_dir(one.folder))
    file_io.write_bytes(file_io.join(get_journal_dir(one.folder), segment), b"{}\n")
    status, text = audit_run(one)
    assert status == 0
    assert "incidents: 1; at least 5 samples" in text


# ------------------------------------------------------------------ not clean
def other_hash(record: Any) -> None:
    record["epochs"][1]["hash"] = "0" * 16


def other_samples(record: Any) -> None:
    record["epochs"][0]["samples"] += 1


def no_epoch(record: Any) -> None:
    del record["epochs"][1]


def twice_an_epoch(record: Any) -> None:
    record["epochs"].append(record["epochs"][0])


def no_name(record: Any) -> None:
    record["bad"] = []


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (other_hash, "MISMATCH: epoch 2: other samples were delivered than planned"),
        (other_samples, "MISMATCH: epoch 1: 1 samples were delivered too often"),
        (no_epoch, "MISMATCH: the weights say that 2 epochs have begun, the record has: 1"),
        (twice_an_epoch, "the record has: 1, 2, 1"),
        (no_name, "MISMATCH: 1 samples are counted as bad, 0 are named"),
        (lambda record: record.clear() or record.update({"epochs": 3}), "no record of what was delivered"),
    ],
)
def test_another_record_is_a_mismatch(one: TrainJob, tamper: Callable[[Any], None], expected: str) -> None:
    rewrite(one, tamper)
    status, text = audit_run(one)
    assert status == 1
    assert expected in text


def rewrite(one: TrainJob, tamper: Callable[[Any], None]) -> None:
    """Another record beside the final weights, committed as if nothing was wrong."""
    final = get_final_weights_dir(one.folder)
    payload, about = commit.read_folder(final), commit.read_metadata(final)
    record = json.loads(payload[checkpoint_format.AUDIT_FILE])
    tamper(record)
    commit.write_folder(final, payload | {checkpoint_format.AUDIT_FILE: json.dumps(record).encode()}, about)


def test_a_record_that_was_changed_in_place_is_reported(one: TrainJob) -> None:
    tiny_shards.flip_byte(Path(get_final_weights_dir(one.folder), checkpoint_format.AUDIT_FILE), 60)
    status, text = audit_run(one)
    assert status == 1
    assert checkpoint_format.AUDIT_FILE in text


def test_the_checkpoint_of_other_samples_is_a_mismatch(data: Path, tmp_path: Path) -> None:
    one = placed(tmp_path, data, pulse_steps=4)
    runs.ask_to_stop(one)
    runs.train(one)
    (place,) = checkpoint_dir.list_checkpoints(get_checkpoints_dir(one.folder))
    state = checkpoint_format.load(place.url)
    checkpoint_format.save(get_checkpoints_dir(one.folder), {**state, "samples": 40}, place.samples, place.attempt)
    status, text = audit_run(one)
    assert status == 1
    assert "8 samples were never delivered" in text


def test_one_run_that_failed_hides_no_other(
    trained: TrainJob, one: TrainJob, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(one, other_hash)
    assert audit.run_audit(AuditConfig(runs=(one.folder, trained.folder)), Console(width=200)) == 1
    assert capsys.readouterr().out.count("final weights") == 2


# ------------------------------------------------------------------ nothing to audit
@pytest.mark.parametrize("names", [[], ["some-run"], ["relative/run"]])
def test_an_unknown_run_is_an_error(trained: TrainJob, names: list[str]) -> None:
    storage = str(Path(trained.folder).parent.parent)
    with pytest.raises(ConfigError, match=r"^runs: ") as raised:
        audit.run_audit(AuditConfig(runs=tuple(names), storage=storage), Console(quiet=True))
    if names == ["some-run"]:
        assert Path(trained.folder).name in str(raised.value), "what there is"


def test_another_dataset_is_an_error(one: TrainJob, tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"^data: .*other: its digest is .* was trained on"):
        audit_run(one, data=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="--data"):
        audit_run(one, data=str(tmp_path / "nothing"))


def test_a_run_without_weights_is_an_error(one: TrainJob) -> None:
    file_io.remove(get_final_weights_dir(one.folder))
    with pytest.raises(ConfigError, match="no checkpoint to audit"):
        audit_run(one)


def test_a_damaged_spec_is_an_error(one: TrainJob) -> None:
    file_io.write_bytes(file_io.join(one.folder, "spec.json"), b"{")
    with pytest.raises(ConfigError, match=r"spec\.json: cannot be used"):
        audit_run(one)


# ------------------------------------------------------------------ the job
@pytest.mark.process
def test_the_job(trained: TrainJob, one: TrainJob) -> None:
    storage, name = Path(trained.folder).parent.parent, Path(trained.folder).name
    clean = launched.job("audit.py", name, runs=storage)
    assert (clean.status, clean.err) == (0, "")
    assert "as planned" in clean.out
    rewrite(one, other_hash)
    assert launched.job("audit.py", one.folder, runs=storage).status == 1
    refused = launched.job("audit.py", "some-run", runs=storage)
    assert refused.status == 2
    assert refused.complaints[0].startswith("audit.py: error: runs: 'some-run': no such run")
    assert len(refused.complaints) == 1
