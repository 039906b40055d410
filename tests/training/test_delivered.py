"""Broken images and the record of what was delivered, in a run of one process."""

from pathlib import Path

import pytest

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.storage import file_io
from orchestrator.training.run_dir import get_checkpoints_dir, get_final_weights_dir
from tests.support import runs, tiny_shards
from tests.support.runs import RecordingContext, ask_to_stop, events, job, recipe, stop_asking, train


# ------------------------------------------------------------------ broken images
def broken(first: int) -> RawSample:
    return RawSample(f"broken-{first}", tiny_shards.jpeg(first)[:200], 1)


def test_broken_images_are_counted_and_not_fatal(tmp_path: Path) -> None:
    data = tmp_path / "data"
    splits = {
        "train": [*tiny_shards.samples(14), broken(90), broken(91)],
        "validation": [*tiny_shards.samples(6, 500), broken(92)],
    }
    write_dataset(str(data), "x", tiny_shards.CLASSES, splits, 4)
    one = job(data, tmp_path / "run", recipe(epochs=1))
    outcome = train(one)
    assert outcome.status == "finished"
    assert outcome.metrics["train/bad_samples"] == 2
    wrong = outcome.metrics["validation/raw_top1_error"] * 6 / 100
    assert wrong == pytest.approx(round(wrong), abs=1e-9), "a share of the six whole images"


def with_broken(folder: Path, bad: int) -> None:
    splits = {
        "train": [*tiny_shards.samples(48 - bad), *(broken(90 + n) for n in range(bad))],
        "validation": tiny_shards.samples(5, 500),
    }
    write_dataset(str(folder), "x", tiny_shards.CLASSES, splits, 6)


def test_bad_samples_are_those_of_the_epoch_and_survive_a_resume(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with_broken(data, bad=4)
    one = job(data, tmp_path / "run", recipe(), pulse_steps=3)
    ask_to_stop(one)
    for _ in range(5):
        assert train(one).status == "stopped"
    stop_asking(one)
    assert train(one).status == "finished"
    assert [event.values["train/bad_samples"] for event in events(one, "epoch")] == [4, 4, 4]
    logged = [event.values for event in events(one, "bad-sample")]
    assert {values["key"] for values in logged} == {f"broken-{90 + n}" for n in range(4)}
    assert len(logged) == 4, "nothing is logged again after a resume"
    for values in logged:
        assert "/data/train/train-0000" in str(values["source"])
        assert values["reason"]
    record = runs.delivered(one)
    assert [len(epoch.bad) for epoch in record.epochs] == [4, 4, 4]
    assert [entry.to_dict() for entry in record.bad] == logged


def test_bad_samples_since_the_checkpoint_are_rolled_back(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with_broken(data, bad=4)
    one = job(data, tmp_path / "run", recipe(epochs=1))
    with pytest.raises(RuntimeError, match="gone"):
        train(one, context=RecordingContext(RuntimeError("gone")))
    assert len(events(one, "bad-sample")) == 4
    assert runs.saved_at(one) == [], "or nothing is rolled back"
    assert train(one).metrics["train/bad_samples"] == 4
    assert len(runs.delivered(one).bad) == 4
    assert runs.as_planned(one)


def test_too_many_bad_samples_are_bad_data_within_a_pulse(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with_broken(data, bad=40)
    one = job(data, tmp_path / "run", recipe(), pulse_steps=4)
    outcome = train(one)
    assert outcome.status == "bad-data"
    assert outcome.samples == 4 * 8
    assert "of the 48 images of epoch 1 cannot be read, more than the 10 that max_bad_share 0.001 allows" in (
        outcome.message
    )
    assert "the first: 'broken-" in outcome.message
    assert not file_io.exists(get_final_weights_dir(one.folder))
    assert train(job(data, tmp_path / "patient", recipe(epochs=1, max_bad_share=0.9))).status == "finished"


# ------------------------------------------------------------------ what was delivered
@pytest.mark.parametrize("pulse_steps", [1, 4, 1000])
def test_the_final_weights_hold_what_they_were_trained_on(small: Path, tmp_path: Path, pulse_steps: int) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=pulse_steps)
    assert train(one).status == "finished"
    assert runs.as_planned(one)
    assert [epoch.samples for epoch in runs.delivered(one).epochs] == [48] * 3


def test_a_checkpoint_without_a_record_is_rejected(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=4)
    ask_to_stop(one)
    train(one)
    (place,) = checkpoint_dir.list_checkpoints(get_checkpoints_dir(one.folder))
    state = checkpoint_format.load(place.url)
    del state["audit"]
    checkpoint_format.save(get_checkpoints_dir(one.folder), state, place.samples, place.attempt)
    outcome = train(one)
    assert outcome.status == "bad-checkpoint"
    assert place.url in outcome.message


def test_points_come_when_they_are_due_though_pulses_do_not_fall_on_them(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=4, log_steps=6)
    assert train(one).status == "finished"
    # Due at steps 6, 12 and 18, which end epochs; the first is logged at the sync after it.
    assert [event.samples for event in events(one, "metrics")] == [8 * 8]
