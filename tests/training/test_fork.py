"""A run that goes on from another one's checkpoint ends with the very weights that it would have by itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import checkpoint as checkpoints
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import PlainSchedule, PolynomialDecay, Segment, Segments, StepDecay
from orchestrator.storage import commit, file_io
from orchestrator.training import attempts, fork
from orchestrator.training.callbacks.checkpointer import PRODUCTIVE_SECONDS_KEY
from orchestrator.training.config import TrainJob
from orchestrator.training.run_dir import get_checkpoints_dir
from tests.support import runs
from tests.support.runs import RecordingContext, events, final, identical, job, train

EPOCH = 48  # samples: 6 batches of 8

FIRST = PolynomialDecay(base_rate=0.02, power=0.5)
FLAT = StepDecay(base_rate=0.05, decay_factor=1.0)


def recipe(*schedules: PlainSchedule, **changes: Any) -> Recipe:
    """The tiny recipe whose schedule changes after each epoch; it averages from the first epoch's end on."""
    parts = tuple(Segment(from_epoch=float(start), schedule=one) for start, one in enumerate(schedules))
    return runs.recipe(schedule=Segments(segments=parts) if len(parts) > 1 else schedules[0], **changes)


ONE, OTHER = recipe(FIRST), recipe(FIRST, FLAT)


@pytest.fixture(scope="module")
def begun(small: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A run of ONE that was stopped after its second epoch; it has a checkpoint at the end of each."""
    one = job(small, tmp_path_factory.mktemp("begun"), ONE, checkpoint_samples=EPOCH)
    assert train(one, context=RecordingContext(enough=2)).samples == 2 * EPOCH
    assert runs.saved_at(one) == [2 * EPOCH, EPOCH]
    return one


@pytest.fixture(scope="module")
def alone(small: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A run of OTHER that trained by itself."""
    other = job(small, tmp_path_factory.mktemp("alone"), OTHER)
    assert train(other).status == "finished"
    return other


@pytest.fixture
def source(begun: TrainJob, tmp_path: Path) -> TrainJob:
    """The run that was stopped, to be harmed."""
    folder = tmp_path / "source"
    shutil.copytree(begun.folder, folder)
    return begun.model_copy(update={"folder": str(folder)})


# ------------------------------------------------------------------ the weights
def test_the_weights_are_those_of_training_from_scratch(
    small: Path, tmp_path: Path, begun: TrainJob, alone: TrainJob
) -> None:
    forked = job(small, tmp_path, OTHER)
    assert fork.fork_run(begun.folder, forked.folder, OTHER) == EPOCH
    context = RecordingContext()
    assert train(forked, context=context).status == "finished"
    (started,) = events(forked, "started")
    assert (started.samples, started.values["attempt"]) == (EPOCH, 1), "nothing is trained twice"
    assert [report["epoch"] for report in context.reports] == [1, 2, 3], "the epoch that it begins with is told, too"
    assert identical(final(forked), final(alone))
    assert events(forked, "incident") == []


def test_the_record_is_as_planned_with_the_epoch_that_the_other_run_trained(
    small: Path, tmp_path: Path, begun: TrainJob
) -> None:
    forked = job(small, tmp_path, OTHER)
    assert fork.fork_run(begun.folder, forked.folder, OTHER) == EPOCH
    assert train(forked).status == "finished"
    assert runs.as_planned(forked)


def test_without_a_shared_prefix_the_weights_would_be_others(
    small: Path, tmp_path: Path, begun: TrainJob, alone: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check keeps out shows: two epochs of the first schedule are not one of it and one of the second."""
    forked = job(small, tmp_path, OTHER)
    monkeypatch.setattr(fork, "count_shared_epochs", lambda *_: 3.0)
    assert fork.fork_run(begun.folder, forked.folder, OTHER) == 2 * EPOCH
    assert train(forked).status == "finished"
    assert not identical(final(forked), final(alone))


def test_a_fork_of_a_fork_is_right_too(small: Path, tmp_path: Path, begun: TrainJob) -> None:
    third = recipe(FIRST, FLAT, FIRST)
    second, last, scratch = (
        job(small, tmp_path / name, of, checkpoint_samples=EPOCH)
        for name, of in (("second", OTHER), ("last", third), ("scratch", third))
    )
    assert fork.fork_run(begun.folder, second.folder, OTHER) == EPOCH
    assert train(second, context=RecordingContext(enough=2)).samples == 2 * EPOCH
    assert fork.fork_run(second.folder, last.folder, third) == 2 * EPOCH
    assert {train(one).status for one in (last, scratch)} == {"finished"}
    assert identical(final(last), final(scratch))


# ------------------------------------------------------------------ what is committed
def test_all_but_recipe_and_clock_is_as_it_was(begun: TrainJob, tmp_path: Path) -> None:
    target = str(tmp_path / "target")
    assert fork.fork_run(begun.folder, target, OTHER, EPOCH) == EPOCH
    (made,) = checkpoint_dir.list_checkpoints(get_checkpoints_dir(target))
    (taken,) = (
        one for one in checkpoint_dir.list_checkpoints(get_checkpoints_dir(begun.folder)) if one.samples == EPOCH
    )
    before, after = checkpoints.load(taken.url), checkpoints.load(made.url)
    assert Recipe.from_dict(after.pop("recipe")) == OTHER
    assert (before.pop("recipe"), after.pop(PRODUCTIVE_SECONDS_KEY)) == (ONE.to_dict(), 0.0)
    assert before.pop(PRODUCTIVE_SECONDS_KEY) > 0
    assert checkpoints.serialize_state(before) == checkpoints.serialize_state(after)
    assert (made.samples, made.attempt) == (EPOCH, 0)
    about = commit.read_metadata(made.url)
    assert (about["samples"], about["attempt"], about["forked_from"]) == (EPOCH, 0, taken.url)


def test_given_twice_it_is_the_same(begun: TrainJob, tmp_path: Path) -> None:
    assert [fork.fork_run(begun.folder, str(tmp_path), OTHER) for _ in range(2)] == [EPOCH, EPOCH]
    assert len(checkpoint_dir.list_checkpoints(get_checkpoints_dir(str(tmp_path)))) == 1


def test_a_run_that_has_begun_is_left_as_it_is(begun: TrainJob, tmp_path: Path) -> None:
    attempts.create_attempt(str(tmp_path), 1)
    assert fork.fork_run(begun.folder, str(tmp_path), OTHER) is None
    assert checkpoint_dir.list_checkpoints(get_checkpoints_dir(str(tmp_path))) == []


def test_a_run_that_began_at_its_beginning_does_not_go_back_to_a_fork(begun: TrainJob, tmp_path: Path) -> None:
    assert fork.fork_run(begun.folder, str(tmp_path), OTHER) == EPOCH
    (made,) = checkpoint_dir.list_checkpoints(get_checkpoints_dir(str(tmp_path)))
    first = attempts.create_attempt(str(tmp_path), 1)
    first.record_resume(EPOCH)
    assert attempts.load_stale_checkpoint_check(str(tmp_path))(made) is None
    first.record_resume(0)
    assert attempts.load_stale_checkpoint_check(str(tmp_path))(made) == "void, since attempt 1 went on from 0 samples"


def test_a_forked_run_that_was_stopped_goes_on(small: Path, tmp_path: Path, begun: TrainJob, alone: TrainJob) -> None:
    forked = job(small, tmp_path, OTHER)
    assert fork.fork_run(begun.folder, forked.folder, OTHER) == EPOCH
    assert train(forked, context=RecordingContext(enough=2)).samples == 2 * EPOCH
    assert fork.fork_run(begun.folder, forked.folder, OTHER) is None, "it goes on from where it is itself"
    assert train(forked).status == "finished"
    assert identical(final(forked), final(alone))


# ------------------------------------------------------------------ which checkpoint
@pytest.mark.parametrize(
    ("of", "samples", "taken"),
    [
        (ONE, None, 2 * EPOCH),
        (ONE, EPOCH, EPOCH),
        (recipe(FIRST, FIRST, FLAT), None, 2 * EPOCH),
        (OTHER, None, EPOCH),
        (OTHER, 8, None),
        (recipe(FLAT), None, None),  # they part before the first sample
    ],
)
def test_the_newest_before_the_recipes_part_or_the_one_asked_for(
    begun: TrainJob, tmp_path: Path, of: Recipe, samples: int | None, taken: int | None
) -> None:
    assert fork.fork_run(begun.folder, str(tmp_path), of, samples) == taken
    assert [place.samples for place in checkpoint_dir.list_checkpoints(get_checkpoints_dir(str(tmp_path)))] == (
        [taken] if taken else []
    )


def test_inside_the_first_epoch_nobody_knows_how_long_it_is(small: Path, tmp_path: Path) -> None:
    """What parts within it may part before the checkpoint."""
    one = job(small, tmp_path / "one", ONE)
    runs.ask_to_stop(one)
    assert train(one).samples == 8
    soon = runs.recipe(
        schedule=Segments(
            segments=(Segment(from_epoch=0.0, schedule=FIRST), Segment(from_epoch=0.9, schedule=FLAT)),
        )
    )
    assert fork.fork_run(one.folder, str(tmp_path / "soon"), soon) is None
    assert fork.fork_run(one.folder, str(tmp_path / "other"), OTHER) == 8


@pytest.mark.parametrize("how", ["void", "not committed", "damaged"])
def test_what_does_not_count_is_passed_over(source: TrainJob, tmp_path: Path, how: str) -> None:
    newest = checkpoint_dir.list_checkpoints(get_checkpoints_dir(source.folder))[0]
    if how == "void":
        attempts.create_attempt(source.folder, 1).record_resume(EPOCH)
    elif how == "not committed":
        file_io.remove(file_io.join(newest.url, commit.DONE))
    else:
        Path(newest.url, checkpoints.STATE_FILE).write_bytes(b"no such thing")
    assert fork.fork_run(source.folder, str(tmp_path / "target"), ONE) == EPOCH
    assert fork.fork_run(source.folder, str(tmp_path / "another"), ONE, 2 * EPOCH) is None


def test_a_finished_run_keeps_no_checkpoint(alone: TrainJob, tmp_path: Path) -> None:
    assert fork.fork_run(alone.folder, str(tmp_path), OTHER) is None
    assert fork.fork_run(str(tmp_path / "nowhere"), str(tmp_path), OTHER) is None


# ------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("of", "samples", "told"),
    [
        (
            apply_overrides(OTHER, {"seeds.order": 1}),
            None,
            r"attempt-000001: is of a recipe that differs in seeds\.order: only",
        ),
        (
            apply_overrides(OTHER, {"optimizer.momentum": 0.5, "batch_size": 4}),
            EPOCH,
            r"differs in batch_size, optimizer\.momentum",
        ),
        (OTHER, 2 * EPOCH, r"its recipe says other learning rates before 96 samples"),
    ],
)
def test_a_recipe_that_could_not_be_in_that_state_is_refused(
    begun: TrainJob, tmp_path: Path, of: Recipe, samples: int | None, told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        fork.fork_run(begun.folder, str(tmp_path / "target"), of, samples)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("lacks", ["recipe", "audit"])
def test_what_is_no_state_of_a_run_is_refused(source: TrainJob, tmp_path: Path, lacks: str) -> None:
    place = checkpoint_dir.list_checkpoints(get_checkpoints_dir(source.folder))[0]
    state = {name: value for name, value in checkpoints.load(place.url).items() if name != lacks}
    checkpoints.save(get_checkpoints_dir(source.folder), state, place.samples, place.attempt)
    with pytest.raises(CheckpointError, match=rf"{place.samples}-attempt-000001: holds no state of a training run"):
        fork.fork_run(source.folder, str(tmp_path / "target"), OTHER)


def test_the_source_is_not_changed(begun: TrainJob, tmp_path: Path) -> None:
    before = {str(path): path.read_bytes() for path in Path(begun.folder).rglob("*") if path.is_file()}
    fork.fork_run(begun.folder, str(tmp_path), OTHER)
    assert {str(path): path.read_bytes() for path in Path(begun.folder).rglob("*") if path.is_file()} == before
