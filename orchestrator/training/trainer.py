"""The training loop, top to bottom."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import weights
from orchestrator.checkpoint.checkpoint import CheckpointError, NonFiniteError
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.config.redaction import redact
from orchestrator.data import manifest as manifests
from orchestrator.data import sample_audit, sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import Batch, BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.sampler import EpochOrder
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training import train_state as states
from orchestrator.training.attempts import Attempt, Goodput
from orchestrator.training.callbacks.best_checkpoint import BestCheckpoint
from orchestrator.training.callbacks.checkpointer import PRODUCTIVE_SECONDS_KEY, Checkpointer
from orchestrator.training.callbacks.journal_logger import JournalLogger
from orchestrator.training.callbacks.profiler import Profiler, get_trace_path
from orchestrator.training.callbacks.stop_monitor import StopMonitor
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import (
    LauncherContext,
    Outcome,
    TrainJob,
    get_attempts_dir,
    get_checkpoints_dir,
    get_final_weights_dir,
    get_outcome_path,
)
from orchestrator.training.delivered_samples import SampleTracker, gather_first_error
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.epoch_meter import EpochMeter
from orchestrator.training.evaluator import compute_read_metrics, compute_train_metrics, end_epoch
from orchestrator.training.rank_sync import RankSyncResult, sync_ranks
from orchestrator.training.run_context import RunContext
from orchestrator.training.run_dir import load_finished_outcome
from orchestrator.training.train_state import TrainState
from orchestrator.training.train_step import TrainStep, compute_max_rank_batch
from orchestrator.training.warm_start import load_pretrained


def train_epochs(parts: RunContext) -> Outcome:
    """Train to the last epoch, or until asked to stop or diverged. Every rank returns the same status.

    Raises DataError, on every rank alike, when a rank cannot read its data or too many samples are broken.
    """
    job, state = parts.job, parts.state
    metrics: dict[str, float] = {}
    if state.progress.samples > 0 and state.progress.step_in_epoch == 0:
        # Resumed from between an epoch's last step and its validation.
        metrics = end_epoch(parts, {})
    while state.progress.epoch < job.recipe.epochs:
        meter, epoch, traffic = (
            EpochMeter(parts.world.device),
            state.progress.epoch,
            parts.train_loader.get_read_stats(),
        )
        ended = _run_epoch(parts, epoch, meter)
        if ended is not None:
            return ended
        last = sync_ranks(parts, epoch, meter)
        trained = compute_train_metrics(parts, meter, last.loss_sum, last.num_samples)
        ended = _apply_sync_result(parts, last)
        if ended is not None:
            return ended
        metrics = end_epoch(parts, trained | compute_read_metrics(parts, traffic))
        if state.progress.epoch < job.recipe.epochs and not parts.launcher.should_continue():
            return _stop_between_epochs(parts)
    return _finish_training(parts, metrics)


def _run_epoch(parts: RunContext, epoch: int, meter: EpochMeter) -> Outcome | None:
    """The rest of an epoch; an Outcome when the run must end before it does."""
    job, world, state = parts.job, parts.world, parts.state
    recipe, cadence = job.recipe, job.cadence
    order = EpochOrder(parts.train_shard_samples, recipe.seeds.order, epoch, recipe.order.lanes, recipe.order.window)
    steps = range(state.progress.step_in_epoch, state.progress.steps_per_epoch)
    batches = parts.train_loader.iter_training(
        order, recipe.augmentation, recipe.seeds.augmentation, recipe.batch_size, steps, world.rank, world.workers
    )
    for batch in meter.time_batches(parts.sample_tracker.guard_batches(batches, len(steps))):
        before = state.progress
        meter.record_step(parts.train_step(batch), float(batch.weights.sum()))
        parts.sample_tracker.record_batch(before, batch)
        parts.watchdog.record_step()
        # At the epoch's last step the pulse is its end's.
        if state.progress.step % cadence.pulse_steps == 0 and state.progress.epoch == epoch:
            found = sync_ranks(parts, epoch, meter)
            ended = _apply_sync_result(parts, found)
            if ended is not None:
                return ended
            if state.progress.step % cadence.log_steps < cadence.pulse_steps:  # a point was due since the last pulse
                parts.journal_logger.log_step_metrics(
                    state.progress,
                    meter.compute_mean_since_last(found.loss_sum, found.num_samples),
                    parts.learning_rate,
                )
    return None


def _apply_sync_result(parts: RunContext, found: RankSyncResult) -> Outcome | None:
    """Do what a pulse asks for; an Outcome when it asks for the end. Only here the state may be saved."""
    samples = parts.state.progress.samples
    if not math.isfinite(found.loss_sum):
        return Outcome(status="diverged", message=_describe_divergence(parts), samples=samples)
    if found.is_superseded:
        return Outcome(status="stopped", message="a later attempt, or another driver, took this run over")
    parts.journal_logger.log_recovery(parts.state.progress)
    if found.should_stop:
        parts.watchdog.acknowledge_stop()
        if found.should_save and parts.world.is_rank_zero:
            parts.checkpointer.save(parts.state)
            parts.checkpointer.wait()
        return Outcome(status="stopped", message="asked to stop", samples=samples)
    if parts.world.is_rank_zero and (found.is_preempted or parts.checkpointer.is_due(samples)):
        parts.checkpointer.save(parts.state)
    if found.is_preempted:
        parts.journal_logger.log_event("preempted", parts.state.progress)
    return None


def _stop_between_epochs(parts: RunContext) -> Outcome:
    """The end between two epochs, from where the run could go on."""
    if parts.world.is_rank_zero:
        parts.checkpointer.save(parts.state)
        parts.checkpointer.wait()
    return Outcome(status="stopped", message="no more of it is wanted", samples=parts.state.progress.samples)


def _finish_training(parts: RunContext, metrics: dict[str, float]) -> Outcome:
    parts.checkpointer.wait()
    if not has_finite_weights(parts.state.model):  # the last update's doing, equal on all ranks: no loss has shown it
        return Outcome(status="diverged", message=_describe_divergence(parts), samples=parts.state.progress.samples)
    return Outcome(status="finished", samples=parts.state.progress.samples, metrics=metrics)


def has_finite_weights(model: nn.Module) -> bool:
    """Whether no weight and no buffer is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def _describe_divergence(parts: RunContext) -> str:
    progress = parts.state.progress
    return (
        f"the loss, or a weight, is not finite after {progress.samples} samples at learning rate "
        f"{parts.learning_rate:g}: "
        "lower schedule.base_rate or lengthen schedule.warmup_epochs"
    )


_log = logging.getLogger(__name__)


def run_training(job: TrainJob, world: DistributedContext, context: LauncherContext) -> Outcome:
    """Train `job` as rank `world.rank`; the outcome, which rank 0 also writes to the run's folder.

    Causes that would only repeat (bad data, bad checkpoint, divergence, a wish to stop) are outcomes; whatever
    else raises is kept as a traceback in the run's folder and raised on, so that the launcher tries again.
    """
    torch.set_num_threads(job.threads)
    done = load_finished_outcome(job.folder)
    if world.broadcast_flag(done is not None):  # rank 0's view, so that all ranks do the same
        if done is None:
            raise RuntimeError(
                f"rank {world.rank} does not see {redaction.redact(get_outcome_path(job.folder))}: is its "
                "storage another one?"
            )
        return done
    if world.broadcast_flag(bool(world.is_rank_zero and job.successor and file_io.exists(job.successor))):
        return Outcome(status="stopped", message="another driver took this run over")
    attempt = _start_attempt(job, world)
    recorder = JournalLogger(job, world, attempt)
    dog = Watchdog(job.cadence.limits, partial(_record_stall, job, world, attempt), job.cadence.pulse_steps)
    watch = StopMonitor(attempt, job.stop_flag, job.successor, dog.expect_stop) if world.is_rank_zero else None
    try:
        outcome = _run_to_outcome(job, world, context, attempt, recorder, dog, watch)
        recorder.log_outcome(outcome)
        if world.is_rank_zero and not attempt.is_superseded():
            _write_outcome(job, outcome)
        return outcome
    except Exception as error:
        recorder.log_crash(error)
        _write_traceback(job, world, attempt, "", traceback.format_exc())
        raise
    finally:
        dog.close()
        if watch is not None:
            watch.close()
        recorder.close()


def _run_to_outcome(
    job: TrainJob,
    world: DistributedContext,
    context: LauncherContext,
    attempt: Attempt,
    recorder: JournalLogger,
    dog: Watchdog,
    watch: StopMonitor | None,
) -> Outcome:
    try:
        outcome = _run_attempt(job, world, context, attempt, recorder, dog, watch)
    except DataError as error:
        outcome = Outcome(status="bad-data", message=str(error))
    except CheckpointError as error:
        outcome = Outcome(status="bad-checkpoint", message=str(error))
    except NonFiniteError as error:  # in the average alone; weights themselves have been looked at
        outcome = Outcome(status="diverged", message=str(error))
    except ConfigError as error:  # what this device, or this machine, cannot do
        outcome = Outcome(status="refused", message=str(error))
    return outcome.model_copy(update={"attempt": attempt.number})


def _run_attempt(
    job: TrainJob,
    world: DistributedContext,
    context: LauncherContext,
    attempt: Attempt,
    recorder: JournalLogger,
    dog: Watchdog,
    watch: StopMonitor | None,
) -> Outcome:
    manifest = check_on_all_ranks(world, lambda: load_dataset_manifest(job, world))
    counts = count_shard_samples(manifest, TRAIN_SPLIT)
    steps = sampler.count_steps(sum(counts), job.recipe.batch_size)
    state = states.create_initial_state(job.recipe, len(manifest.classes), steps, world.device)
    blank = make_blank_batch(job)
    stepper, micro_batch = _build_train_step(job, world, attempt, state, blank)
    training, validation = check_on_all_ranks(world, lambda: build_dataloaders(job, manifest, world))
    dog.set_slow_work_source(lambda: training.describe_decoding() + validation.describe_decoding())
    resumed = resume_from_checkpoint(job, world, attempt, state)
    loaded = None
    if job.recipe.initial_weights and state.progress.samples == 0:
        loaded = check_on_all_ranks(
            world, lambda: load_pretrained(state.model, job.weights, job.recipe.initial_weights)
        )
    if world.is_rank_zero:
        attempt.record_resume(state.progress.samples)
    goodput = Goodput(attempt, resumed.productive_seconds)
    best = BestCheckpoint(job, manifest.classes, attempt, dog) if world.is_rank_zero else None
    parts = RunContext(
        job,
        world,
        context,
        state,
        stepper,
        training,
        validation,
        counts,
        count_shard_samples(manifest, VALIDATION_SPLIT),
        SampleTracker(world, blank),
        recorder,
        Checkpointer(job, attempt, goodput, dog),
        dog,
        goodput,
        watch,
        best,
    )
    parts.checkpointer.mark_saved(state.progress.samples)
    recorder.log_start(state.progress, world, resumed.skipped_checkpoints)
    if loaded is not None:
        recorder.log_event("weights", state.progress, loaded=loaded.describe(job.weights, manifest.classes))
    if micro_batch != job.execution.micro_batch:
        recorder.log_event("micro-batch", state.progress, images=float(micro_batch or 0))
    try:
        outcome = train_epochs(parts)
    except DataError as error:  # the same on every rank
        return Outcome(status="bad-data", message=str(error), samples=state.progress.samples)
    finally:
        stepper.close()
        _wait_for_checkpoint(parts.checkpointer)
        if best is not None:
            best.wait()
        training.close()
        validation.close()
    if outcome.status == "finished" and world.is_rank_zero and not attempt.is_superseded():
        with dog.watch_phase("save", job.cadence.limits.save_seconds):
            _save_final_weights(job, state, manifest.classes)
    return outcome


def _build_train_step(
    job: TrainJob, world: DistributedContext, attempt: Attempt, state: TrainState, blank: Batch
) -> tuple[TrainStep, int | None]:
    """What makes the steps of a state that is not loaded yet, and the micro-batch that it came to."""
    network = states.wrap_in_ddp(state.model, world.workers)
    stepper = check_on_all_ranks(world, lambda: TrainStep(job.recipe, state, network, world, job.execution))
    micro_batch = job.execution.micro_batch
    if world.device.type == "cuda":
        micro_batch = stepper.find_micro_batch(
            blank, compute_max_rank_batch(job.recipe.batch_size, job.recipe.order.lanes, world.workers)
        )
    if world.workers > 1:
        stepper.warm_up_ddp(blank)
    if job.execution.profile is not None and world.is_rank_zero:
        url = get_trace_path(job.folder, attempt.number, world.rank)
        stepper.profiler = Profiler(job.execution.profile, url, world.device)
    return stepper, micro_batch


def _wait_for_checkpoint(saver: Checkpointer) -> None:
    """Until a checkpoint under way is written; its error is not what the attempt ends with."""
    try:
        saver.wait()
    except Exception as error:
        _log.warning("the last checkpoint was not written: %s: %s", type(error).__name__, error)


def _save_final_weights(job: TrainJob, state: TrainState, classes: tuple[str, ...]) -> None:
    averaged, raw = state.copy_final_weights()
    weights.save(
        get_final_weights_dir(job.folder), averaged, raw, job.recipe.to_dict(), classes, state.audit_record.to_dict()
    )


def _write_outcome(job: TrainJob, outcome: Outcome) -> None:
    file_io.write_bytes(get_outcome_path(job.folder), outcome.to_json().encode())
    if outcome.status == "finished":
        # Only now: until the outcome is there, a restart needs them. What cannot be removed costs only space.
        with suppress(OSError):
            file_io.remove(get_checkpoints_dir(job.folder))


def _record_stall(job: TrainJob, world: DistributedContext, attempt: Attempt, cause: str, stacks: str) -> None:
    """Keep why this rank ends itself, for the attempt after it."""
    with suppress(OSError):
        attempt.record_stall(world.rank, f"rank {world.rank}: {cause}")
    _write_traceback(job, world, attempt, "-stacks", stacks)


def _write_traceback(job: TrainJob, world: DistributedContext, attempt: Attempt, kind: str, text: str) -> None:
    name = f"attempt-{attempt.number:06d}-rank-{world.rank:05d}{kind}.txt"
    with suppress(OSError):  # the cause is worth more than its record
        file_io.write_bytes(file_io.join(job.folder, "tracebacks", name), redact(text).encode())


def _start_attempt(job: TrainJob, world: DistributedContext) -> Attempt:
    """This attempt, whose number rank 0 takes for all."""
    taken = attempts.create_attempt(job.folder, world.workers) if world.is_rank_zero else None
    numbers = world.all_reduce_values([float(taken.number), taken.start_time] if taken is not None else [0.0, 0.0])
    return taken or Attempt(get_attempts_dir(job.folder), int(numbers[0]), numbers[1])


T = TypeVar("T")

TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"


@dataclass(frozen=True)
class ResumeInfo:
    """Where an attempt goes on."""

    skipped_checkpoints: list[str]  # newer checkpoints that could not be used, and why
    productive_seconds: float = 0.0  # seconds that led there


def check_on_all_ranks(world: DistributedContext, check: Callable[[], T]) -> T:
    """The check's result when it passes on every rank; else its error on every rank, so that none waits for another.

    Raises what the check raised here, or as DataError what it raised on another rank.
    """
    error: DataError | CheckpointError | ConfigError | None = None
    try:
        result = check()
    except (DataError, CheckpointError, ConfigError) as raised:
        error = raised
    if world.all_reduce_values([float(error is not None)])[0]:
        told = gather_first_error(world, None if error is None else str(error))
        raise error or DataError(told)
    return result


def load_dataset_manifest(job: TrainJob, world: DistributedContext) -> Manifest:
    """The manifest of the run's dataset. Raises DataError when it is another one, or cannot train this run."""
    manifest = manifests.load(job.data, allow_elsewhere=job.allow_elsewhere)
    if manifest.digest() != job.dataset_digest:
        raise DataError(
            f"data: {redaction.redact(job.data)}: its digest is {manifest.digest()}, the run was started on "
            f"{job.dataset_digest}: the dataset changed; give the old one, or start anew with --new"
        )
    sampler.check_workers(
        count_shard_samples(manifest, TRAIN_SPLIT), job.recipe.order.lanes, job.recipe.batch_size, world.workers
    )
    if manifest.count_samples(VALIDATION_SPLIT) == 0:
        raise DataError(
            f"data: {redaction.redact(job.data)}: its {VALIDATION_SPLIT} split is empty, so no error could ever be told"
        )
    return manifest


def count_shard_samples(manifest: Manifest, split: str) -> tuple[int, ...]:
    """Samples of each shard of a split."""
    return tuple(shard.samples for shard in manifest.shards(split))


def build_dataloaders(job: TrainJob, manifest: Manifest, world: DistributedContext) -> tuple[BatchLoader, BatchLoader]:
    """For training and validation. Raises DataError when this process cannot use them."""
    training = _build_dataloader(job, manifest, TRAIN_SPLIT, world)
    training.check_config(job.recipe.order, job.recipe.augmentation, world.workers)
    return training, _build_dataloader(job, manifest, VALIDATION_SPLIT, world)


def make_blank_batch(job: TrainJob) -> Batch:
    """Two black images of weight 0: batch norms over maps of 1 x 1 have nothing to go by with one."""
    size = job.recipe.model.image_size
    images = torch.zeros((2, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return Batch(images, torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def resume_from_checkpoint(job: TrainJob, world: DistributedContext, attempt: Attempt, state: TrainState) -> ResumeInfo:
    """Load the newest complete checkpoint that counts, which rank 0 picks for all."""
    folder, device = get_checkpoints_dir(job.folder), str(world.device)
    saved: dict[str, Any] = {}
    passed_over: list[str] = []
    chosen = [0.0, 0.0, 0.0]
    nothing = checkpoint_format.LoadedCheckpoint(None, {}, [])
    void = attempts.load_stale_checkpoint_check(job.folder)
    found = check_on_all_ranks(
        world, lambda: checkpoint_format.load_newest(folder, device, void) if world.is_rank_zero else nothing
    )
    if world.is_rank_zero:
        saved, passed_over = found.state, found.skipped
        if found.checkpoint is not None:
            chosen = [1.0, float(found.checkpoint.samples), float(found.checkpoint.attempt)]
    # Only rank 0 contributes, so the sum is its choice on every rank.
    resumed, samples, number = world.all_reduce_values(chosen)
    if not resumed:
        return ResumeInfo(passed_over)
    url = checkpoint_format.make_checkpoint_url(folder, int(samples), int(number))
    # A rank that does not see it must crash: to start at the beginning would train on other weights.
    content = check_on_all_ranks(world, lambda: _load_matching_checkpoint(job, url, saved, device))
    state.restore(content, redaction.redact(url))
    return ResumeInfo(passed_over, float(content.get(PRODUCTIVE_SECONDS_KEY, 0.0)))


def _load_matching_checkpoint(job: TrainJob, url: str, loaded: dict[str, Any], device: str) -> dict[str, Any]:
    """The checkpoint at `url`, loaded already on rank 0, if it is of this recipe."""
    saved = loaded or checkpoint_format.load(url, device)
    if saved.get("recipe") != job.recipe.to_dict():
        raise CheckpointError(f"{redaction.redact(url)}: is of another recipe; start anew with --new")
    try:
        sample_audit.parse_record(saved.get("audit"), redaction.redact(url))
    except DataError as error:
        raise CheckpointError(f"{error}; start anew with --new") from None
    return saved


def _build_dataloader(job: TrainJob, manifest: Manifest, split: str, world: DistributedContext) -> BatchLoader:
    reader = SampleReader(job.data, manifest, split, job.reading)
    return BatchLoader(reader, job.recipe.model.image_size, job.threads, pin=world.device.type == "cuda")
