"""One process trains a run: outcomes, exact resume, what it leaves in the run's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.checkpoint import checkpoint
from orchestrator.checkpoint.checkpoint import STATE_FILE
from orchestrator.config.overrides import apply_overrides
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.recipe import presets
from orchestrator.storage import commit, file_io
from orchestrator.training import trainer
from orchestrator.training.config import TrainJob
from orchestrator.training.run_dir import get_checkpoints_dir, get_final_weights_dir
from tests.support import runs, tiny_shards
from tests.support.runs import RecordingContext, ask_to_stop, events, final, identical, job, recipe, stop_asking, train

# Of the fixture `whole`: 18 steps, without the three that end epochs.
FIXED_LOSSES = [
    1.81536,
    1.86748,
    1.81657,
    1.69474,
    2.09482,
    1.66137,
    1.77347,
    1.99906,
    1.72226,
    1.81389,
    1.74033,
    1.84462,
    1.77948,
    1.81197,
    1.77786,
]


# ------------------------------------------------------------------ the digits
def test_the_digits_preset_trains_and_validates_every_sample(digits: Path, tmp_path: Path) -> None:
    one = job(digits, tmp_path, apply_overrides(presets.googlenet_tiny(), {"epochs": 1}), log_steps=10, pulse_steps=10)
    context = RecordingContext()
    outcome = train(one, context=context)
    assert (outcome.status, outcome.attempt) == ("finished", 1)
    assert outcome.samples == 1437 // 64 * 64
    assert outcome == runs.outcome(one)
    # Counts of 360, the raw weights' and the average's (which begins within the epoch).
    for name in ("raw_top1", "raw_top5", "averaged_top1", "averaged_top5"):
        wrong = outcome.metrics[f"validation/{name}_error"] * 360 / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-9)
        assert 0 < round(wrong) <= 360
    assert outcome.metrics["validation/raw_top5_error"] <= outcome.metrics["validation/raw_top1_error"]
    assert context.reports == [{"epoch": 1, "samples": outcome.samples, **outcome.metrics}]
    assert [event.kind for event in events(one)] == ["started", "metrics", "metrics", "epoch", "finished"]
    found = final(one)
    assert found.recipe == one.recipe.to_dict()
    assert len(found.classes) == 10
    assert not any(name.startswith("heads.") for name in found.raw)
    assert checkpoint.compute_digest(found.averaged) != checkpoint.compute_digest(found.raw)
    assert runs.saved_at(one) == [], "a finished run needs no checkpoints"


def test_a_loss_of_steps_and_one_of_an_epoch_have_names_of_their_own(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe(epochs=1), log_steps=2, pulse_steps=2)  # six steps
    assert train(one).status == "finished"
    (epoch,), points = events(one, "epoch"), events(one, "metrics")
    assert [sorted(point.values) for point in points] == [["train/rate", "train/step_loss"]] * 2
    assert "train/step_loss" not in epoch.values
    each = job(small, tmp_path / "each", recipe(epochs=1), log_steps=1, pulse_steps=1)
    assert train(each).status == "finished"
    single = [float(point.values["train/step_loss"]) for point in events(each, "metrics")]  # type: ignore[arg-type]
    means = [float(point.values["train/step_loss"]) for point in points]  # type: ignore[arg-type]
    assert means == pytest.approx([(single[0] + single[1]) / 2, (single[2] + single[3]) / 2], rel=1e-5)


def test_fixed_seeds_give_the_losses_that_they_always_gave(whole: TrainJob) -> None:
    """A change of order, crops, masks, schedule or update shows here; another CPU differs in the last digits only."""
    losses = [event.values["train/step_loss"] for event in events(whole, "metrics")]
    assert losses == pytest.approx(FIXED_LOSSES, rel=1e-3)


# ------------------------------------------------------------------ exact resume
@pytest.mark.parametrize(("pulse_steps", "stops"), [(4, (4, 6, 8)), (5, (5, 6, 10))])
def test_stopped_and_resumed_equals_never_stopped(
    small: Path, tmp_path: Path, whole: TrainJob, pulse_steps: int, stops: tuple[int, ...]
) -> None:
    """The second stop is at an epoch's end, before its validation; the last one is within the averaging."""
    one = job(small, tmp_path, recipe(), pulse_steps=pulse_steps)
    ask_to_stop(one)
    for number, step in enumerate(stops, 1):
        outcome = train(one)
        assert (outcome.status, outcome.attempt, outcome.samples) == ("stopped", number, step * 8)
        assert runs.saved_at(one)[0] == outcome.samples
    stop_asking(one)
    outcome = train(one)
    assert (outcome.status, outcome.attempt) == ("finished", 4)
    assert identical(final(one), final(whole))
    assert validation(outcome.metrics) == validation(runs.outcome(whole).metrics)
    started = [event.values["resumed"] for event in events(one, "started")]
    assert started == [False, True, True, True]
    assert events(one, "incident") == [], "to be asked to stop is no incident"
    assert [event.samples for event in events(one, "epoch")] == [48, 96, 144], "no epoch's end is lost"


def validation(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("validation/")}


def test_a_stop_after_the_last_step_still_ends_with_a_validation(small: Path, tmp_path: Path, whole: TrainJob) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=18)

    class AsksLate(RecordingContext):
        def report(self, metrics: dict[str, float]) -> None:
            if metrics["epoch"] == 2:
                ask_to_stop(one)

    outcome = train(one, context=AsksLate())
    assert (outcome.status, outcome.samples) == ("stopped", 18 * 8)
    stop_asking(one)
    context = RecordingContext()
    outcome = train(one, context=context)
    assert outcome.status == "finished"
    assert validation(outcome.metrics) == validation(runs.outcome(whole).metrics)
    assert len(context.reports) == 1
    assert identical(final(one), final(whole))


_KILLED = """
import os, signal, sys
from orchestrator.training import trainer
from orchestrator.training.config import TrainJob
from tests.support.runs import ALONE

class Context:
    def report(self, metrics):
        if metrics["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def has_preemption_notice(self):
        return False

    def should_continue(self):
        return True

trainer.run_training(TrainJob.from_dict(__import__("json").load(sys.stdin)), ALONE, Context())
"""


@pytest.mark.process
def test_killed_and_resumed_equals_never_killed(small: Path, tmp_path: Path, whole: TrainJob) -> None:
    """SIGKILL while checkpoints are written as fast as they can be."""
    one = job(small, tmp_path, recipe(), checkpoint_seconds=0.001)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED], input=one.to_json(), text=True, check=False, cwd=os.getcwd(), timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    assert not file_io.exists(get_final_weights_dir(one.folder))
    assert train(one).status == "finished"
    assert identical(final(one), final(whole))
    assert runs.delivered(one) == runs.delivered(whole)
    resumed = events(one, "started")[-1]
    assert resumed.values["resumed"]
    assert (resumed.samples or 0) > 0


def test_a_checkpoint_by_the_clock_does_not_change_the_result(small: Path, tmp_path: Path, whole: TrainJob) -> None:
    one = job(small, tmp_path, recipe(), checkpoint_seconds=0.001, validate_epochs=2, pulse_steps=5, log_steps=5)
    assert train(one).status == "finished"
    assert identical(final(one), final(whole))
    validated = [any(name.startswith("validation/") for name in event.values) for event in events(one, "epoch")]
    assert validated == [False, True, True], "every second epoch and the last"


def test_a_finished_run_is_not_trained_again(small: Path, tmp_path: Path) -> None:
    """A worker may die after the end; Ray then restarts the whole group."""
    one = job(small, tmp_path, recipe(epochs=1))
    first = train(one)
    before = (file_io.list_names(get_final_weights_dir(one.folder)), len(events(one)))
    context = RecordingContext()
    assert train(one, context=context) == first
    assert context.reports == []
    assert before == (file_io.list_names(get_final_weights_dir(one.folder)), len(events(one)))


def test_seeds_and_recipe_change_the_result(small: Path, tmp_path: Path) -> None:
    found = []
    changes: list[dict[str, object]] = [
        {}, {"seeds.weights": 1}, {"seeds.order": 1}, {"seeds.augmentation": 1}, {"seeds.dropout": 1},
        {"precision": "bfloat16"}, {},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        one = job(small, tmp_path / str(number), apply_overrides(recipe(epochs=1), change))
        assert train(one).status == "finished"
        found.append(final(one).digest)
    assert found[0] == found[-1]
    assert len(set(found)) == len(changes) - 1


# ------------------------------------------------------------------ what would only repeat is an outcome
def test_another_dataset_is_bad_data(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe()).model_copy(update={"dataset_digest": "0" * 16})
    outcome = train(one)
    assert outcome.status == "bad-data"
    assert str(small) in outcome.message
    assert "0" * 16 in outcome.message
    assert runs.outcome(one) == outcome
    (failed,) = events(one, "failed")
    assert failed.values["status"] == "bad-data"


@pytest.mark.parametrize(
    ("changes", "message"), [({"batch_size": 51}, "batch_size"), ({"order.lanes": 1, "order.window": 1}, "")]
)
def test_what_the_data_cannot_give_is_bad_data(
    small: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    outcome = train(job(small, tmp_path, apply_overrides(recipe(epochs=1), changes)))
    assert (outcome.status == "bad-data") == bool(message)
    assert message in outcome.message


def test_a_missing_shard_is_bad_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tiny_shards.dataset(data, train=16)
    (data / "train" / "train-000001.tar").unlink()
    outcome = train(job(data, tmp_path / "run", recipe()))
    assert outcome.status == "bad-data"
    assert "train-000001.tar" in outcome.message


@pytest.mark.parametrize(("broken", "status"), [(3, "finished"), (11, "bad-data")])
def test_broken_validation_images_are_counted_and_too_many_end_the_run(
    tmp_path: Path, broken: int, status: str
) -> None:
    validation = [*tiny_shards.samples(9, 500), *(RawSample(f"broken-{n:02d}", b"no image", 0) for n in range(broken))]
    splits = {"train": tiny_shards.samples(16), "validation": validation}
    write_dataset(str(tmp_path / "data"), "x", tiny_shards.CLASSES, splits, 6)
    outcome = train(job(tmp_path / "data", tmp_path / "run", recipe(epochs=1)))
    assert outcome.status == status
    if status == "finished":
        assert outcome.metrics["validation/bad_samples"] == broken
    else:
        assert f"{broken} of the {9 + broken} images of the validation split cannot be read" in outcome.message
        assert "the first: 'broken-00' at byte" in outcome.message


@pytest.mark.parametrize("left", [[], [RawSample("broken", b"", 0)]], ids=["empty", "broken"])
def test_a_validation_split_without_a_whole_image_is_bad_data(tmp_path: Path, left: list[RawSample]) -> None:
    data = tmp_path / "data"
    write_dataset(str(data), "x", tiny_shards.CLASSES, {"train": tiny_shards.samples(8), "validation": left}, 4)
    outcome = train(job(data, tmp_path / "run", recipe()))
    assert outcome.status == "bad-data"
    assert "validation" in outcome.message


@pytest.mark.parametrize("pulse_steps", [1, 1000], ids=["between epochs", "at an epoch's end"])
def test_a_rate_that_diverges(small: Path, tmp_path: Path, pulse_steps: int) -> None:
    one = job(small, tmp_path, apply_overrides(recipe(), {"schedule.base_rate": 100.0}), pulse_steps=pulse_steps)
    outcome = train(one)
    assert outcome.status == "diverged"
    assert "schedule.base_rate" in outcome.message
    assert not file_io.exists(get_final_weights_dir(one.folder))


def test_the_checkpoint_of_another_recipe_is_rejected(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe())
    ask_to_stop(one)
    train(one)
    other = one.model_copy(update={"recipe": recipe(epochs=4)})
    outcome = train(other)
    assert outcome.status == "bad-checkpoint"
    assert get_checkpoints_dir(one.folder) in outcome.message


def test_a_damaged_checkpoint_is_passed_over_and_noted(small: Path, tmp_path: Path, whole: TrainJob) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=4)
    ask_to_stop(one)
    for _ in range(2):
        train(one)
    stop_asking(one)
    newest = Path(get_checkpoints_dir(one.folder), file_io.list_names(get_checkpoints_dir(one.folder))[-1])
    tiny_shards.flip_byte(newest / STATE_FILE, 5000)
    assert train(one).status == "finished"
    assert events(one, "started")[-1].samples == 4 * 8
    (incident,) = events(one, "incident")
    assert [str(newest) in str(message) for message in incident.values["checkpoints_passed_over"]] == [True]  # type: ignore[attr-defined]
    assert incident.values["samples_replayed"] == 2 * 8, "from the epoch's end, where the second one stopped"
    assert identical(final(one), final(whole))


def test_when_every_checkpoint_is_damaged_the_run_begins_anew_and_says_so(
    small: Path, tmp_path: Path, whole: TrainJob
) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=4)
    ask_to_stop(one)
    train(one)
    stop_asking(one)
    (only,) = Path(get_checkpoints_dir(one.folder)).iterdir()
    (only / commit.DONE).write_bytes(b"{}")
    assert train(one).status == "finished"
    assert len(events(one, "incident")) == 1
    assert identical(final(one), final(whole))


# ------------------------------------------------------------------ crashes
def test_a_crash_is_raised_and_leaves_its_traceback(small: Path, tmp_path: Path, whole: TrainJob) -> None:
    one = job(small, tmp_path, recipe(), checkpoint_seconds=0.001)
    with pytest.raises(RuntimeError, match="the launcher is gone"):
        train(one, context=RecordingContext(RuntimeError("the launcher is gone")))
    (name,) = file_io.list_names(file_io.join(one.folder, "tracebacks"))
    assert name == "attempt-000001-rank-00000.txt"
    text = file_io.read_bytes(file_io.join(one.folder, "tracebacks", name)).decode()
    assert "RuntimeError: the launcher is gone" in text
    assert "in _end_epoch" in text
    assert not file_io.exists(file_io.join(one.folder, "outcome.json"))
    assert train(one).status == "finished"
    (incident,) = events(one, "incident")
    assert "RuntimeError: the launcher is gone" in str(incident.values["cause"])
    assert incident.values["attempt"] == 2
    assert identical(final(one), final(whole))


def test_a_traceback_that_cannot_be_written_hides_no_cause(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe(epochs=1))
    (tmp_path / "tracebacks").write_bytes(b"a file where the folder should be")
    with pytest.raises(RuntimeError, match="the launcher is gone"):
        train(one, context=RecordingContext(RuntimeError("the launcher is gone")))


def test_attempts_are_numbered_through(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe(epochs=1))
    # As another starter left it: a gap, and a number that is taken.
    file_io.write_bytes(str(tmp_path / "attempts" / "000002.json"), b"{}")
    assert train(one).attempt == 3
    records = [name for name in file_io.list_names(str(tmp_path / "attempts")) if name.endswith(".json")]
    assert records == ["000002.json", "000003.json"]
    assert trainer.start_attempt(one, runs.ALONE).number == 4
