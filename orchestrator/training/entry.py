"""The entry of one training process: build, resume, train, write the outcome."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import weights
from orchestrator.checkpoint.format import CheckpointError
from orchestrator.data import audit, order
from orchestrator.data import manifest as manifests
from orchestrator.data.errors import DataError
from orchestrator.data.loader import Batch, Loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.reader import SampleReader
from orchestrator.storage import files, urls
from orchestrator.tracking import journal
from orchestrator.training import state as states
from orchestrator.training.delivery import Delivery, first_trouble
from orchestrator.training.job import Context, Outcome, TrainJob, checkpoints_of, final_of, outcome_of
from orchestrator.training.loop import Parts, train
from orchestrator.training.outcome import finished
from orchestrator.training.recorder import Recorder, last_event
from orchestrator.training.saver import Saver
from orchestrator.training.state import TrainState
from orchestrator.training.step import Stepper
from orchestrator.training.world import World

T = TypeVar("T")

TRAIN, VALIDATION = "train", "validation"


def run(job: TrainJob, world: World, context: Context) -> Outcome:
    """Train `job` as rank `world.rank`; the outcome, which rank 0 also writes to the run's folder.

    Causes that would only repeat (bad data, bad checkpoint, divergence, a wish to stop) are outcomes; whatever
    else raises is kept as a traceback in the run's folder and raised on, so that the launcher tries again.
    """
    torch.set_num_threads(job.threads)
    done = finished(job.folder)
    if world.agree(done is not None):  # rank 0's view, so that all ranks do the same
        if done is None:
            raise RuntimeError(
                f"rank {world.rank} does not see {urls.redact(outcome_of(job.folder))}: is its storage another one?"
            )
        return done
    attempt = _attempt(job, world)
    previous = last_event(job) if world.leads and attempt > 1 else None
    recorder = Recorder(job, world, attempt)
    try:
        try:
            outcome = _run(job, world, context, recorder, attempt, previous)
        except DataError as error:
            outcome = Outcome(status="bad-data", message=str(error))
        except CheckpointError as error:
            outcome = Outcome(status="bad-checkpoint", message=str(error))
        outcome = outcome.model_copy(update={"attempt": attempt})
        recorder.ended(outcome)
        if world.leads:
            files.write_bytes(outcome_of(job.folder), outcome.to_json().encode())
            if outcome.status == "finished":
                # Only now: until the outcome is there, a restart needs them. What cannot be removed costs only space.
                with suppress(OSError):
                    files.remove(checkpoints_of(job.folder))
        return outcome
    except Exception as error:
        recorder.crashed(error)
        name = f"attempt-{attempt:06d}-rank-{world.rank:05d}.txt"
        with suppress(OSError):  # the cause is worth more than its record
            files.write_bytes(files.join(job.folder, "tracebacks", name), traceback.format_exc().encode())
        raise
    finally:
        recorder.close()


def _run(
    job: TrainJob, world: World, context: Context, recorder: Recorder, attempt: int, previous: journal.Event | None
) -> Outcome:
    manifest = _unanimous(world, lambda: _dataset(job, world))
    counts = tuple(shard.samples for shard in manifest.shards(TRAIN))
    if manifest.samples(VALIDATION) == 0:
        raise DataError(
            f"data: {urls.redact(job.data)}: its {VALIDATION} split is empty, so no error could ever be told"
        )
    steps = order.steps_per_epoch(sum(counts), job.recipe.batch_size)
    state = states.fresh(job.recipe, len(manifest.classes), steps, world.device)
    stepper = Stepper(job.recipe, state, states.wrapped(state.model, world.workers), world)
    blank = _blank_batch(job)
    if world.workers > 1:
        stepper.settle(blank)
    training, validation = _unanimous(world, lambda: _loaders(job, manifest, world))
    passed_over = _resume(job, world, state)
    recorder.started(state.progress, world, previous, passed_over)
    parts = Parts(
        job,
        world,
        context,
        state,
        stepper,
        training,
        validation,
        training_counts=counts,
        validation_counts=tuple(shard.samples for shard in manifest.shards(VALIDATION)),
        delivery=Delivery(world, blank),
        recorder=recorder,
        saver=Saver(job, attempt),
    )
    try:
        outcome = train(parts)
    except DataError as error:  # the same on every rank
        return Outcome(status="bad-data", message=str(error), samples=state.progress.samples)
    finally:
        training.close()
        validation.close()
    if outcome.status == "finished" and world.leads:
        averaged, raw = state.final_weights()
        record = state.record.to_dict()
        weights.save(final_of(job.folder), averaged, raw, job.recipe.to_dict(), manifest.classes, record)
    return outcome


def _unanimous(world: World, check: Callable[[], T]) -> T:
    """The check's result when it passes on every rank; else its error on every rank, so that none waits for another.

    Raises what the check raised here, or as DataError what it raised on another rank.
    """
    error: DataError | CheckpointError | None = None
    try:
        result = check()
    except (DataError, CheckpointError) as raised:
        error = raised
    if world.sum([float(error is not None)])[0]:
        told = first_trouble(world, None if error is None else str(error))
        raise error or DataError(told)
    return result


def _dataset(job: TrainJob, world: World) -> Manifest:
    manifest = manifests.load(job.data)
    if manifest.digest() != job.dataset_digest:
        raise DataError(
            f"data: {urls.redact(job.data)}: its digest is {manifest.digest()}, the run was started on "
            f"{job.dataset_digest}: the dataset changed; give the old one, or start anew with --new"
        )
    counts = tuple(shard.samples for shard in manifest.shards(TRAIN))
    order.check(counts, job.recipe.order.lanes, job.recipe.batch_size, world.workers)
    return manifest


def _resume(job: TrainJob, world: World, state: TrainState) -> list[str]:
    """Load the newest complete checkpoint, which rank 0 picks for all; what was passed over and why."""
    folder = checkpoints_of(job.folder)
    saved: dict[str, Any] = {}
    passed_over: list[str] = []
    chosen = [0.0, 0.0, 0.0]
    if world.leads:
        found = checkpoint_format.newest(folder, str(world.device))
        saved, passed_over = found.state, found.passed_over
        if found.place is not None:
            chosen = [1.0, float(found.place.samples), float(found.place.attempt)]
    # Only rank 0 contributes, so the sum is its choice on every rank.
    resumed, samples, attempt = world.sum(chosen)
    if resumed:
        url = checkpoint_format.place_of(folder, int(samples), int(attempt))
        # A rank that does not see it must crash: to start at the beginning would train on other weights.
        state.restore(_unanimous(world, lambda: _checked(job, url, saved, str(world.device))))
    return passed_over


def _checked(job: TrainJob, url: str, loaded: dict[str, Any], device: str) -> dict[str, Any]:
    """The checkpoint at `url`, loaded already on rank 0, if it is of this recipe."""
    saved = loaded or checkpoint_format.load(url, device)
    if saved["recipe"] != job.recipe.to_dict():
        raise CheckpointError(f"{urls.redact(url)}: is of another recipe; start anew with --new")
    try:
        audit.record_of(saved.get("audit"), urls.redact(url))
    except DataError as error:
        raise CheckpointError(f"{error}; start anew with --new") from None
    return saved


def _attempt(job: TrainJob, world: World) -> int:
    """The number of this attempt, taken by rank 0 with a conditional create, the same on every rank."""
    number = 0
    if world.leads:
        folder = files.join(job.folder, "attempts")
        number = len(files.list_names(folder)) + 1
        about = json.dumps({"workers": world.workers, "time": time.time()}).encode()
        while not files.create_bytes(files.join(folder, f"{number:06d}.json"), about):
            number += 1
    return int(world.sum([float(number)])[0])


def _loaders(job: TrainJob, manifest: Manifest, world: World) -> tuple[Loader, Loader]:
    """For training and validation. Raises DataError when this process cannot use them."""
    training = _loader(job, manifest, TRAIN, world)
    training.check(job.recipe.order, job.recipe.augmentation, world.workers)
    return training, _loader(job, manifest, VALIDATION, world)


def _loader(job: TrainJob, manifest: Manifest, split: str, world: World) -> Loader:
    reader = SampleReader(job.data, manifest, split, job.reading)
    return Loader(reader, job.recipe.model.image_size, job.threads, pin=world.device.type == "cuda")


def _blank_batch(job: TrainJob) -> Batch:
    """One black image of weight 0."""
    size = job.recipe.model.image_size
    images = torch.zeros((1, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return Batch(images, torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
