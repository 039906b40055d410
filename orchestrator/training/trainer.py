"""The trainer: one rank's attempt at a run, from its start to its outcome."""

from __future__ import annotations

import logging
import math
import traceback
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.checkpoint import CheckpointError, LoadedCheckpoint, NonFiniteError
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import check_source_digests
from orchestrator.data import manifest as manifests
from orchestrator.data import sample_audit, sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.sampler import EpochOrder
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.recipe.metrics import create_metrics
from orchestrator.storage import file_io
from orchestrator.training import attempts, run_dir
from orchestrator.training.attempts import Attempt, Goodput
from orchestrator.training.callbacks.callback import Callback, CallbackError, call_hook, create_user_callbacks
from orchestrator.training.callbacks.checkpointer import PRODUCTIVE_SECONDS_KEY, BestCheckpoint, Checkpointer
from orchestrator.training.callbacks.journal_logger import JournalLogger, Profiler
from orchestrator.training.callbacks.watchdog import StopMonitor, Watchdog
from orchestrator.training.config import LauncherContext, Outcome, OutcomeStatus, TrainJob
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.evaluator import Evaluator, list_class_results
from orchestrator.training.rank_sync import EpochMeter, SampleTracker, SyncReport, SyncResult, compute_read_metrics
from orchestrator.training.train_state import TrainState, create_initial_state, wrap_in_ddp
from orchestrator.training.train_step import TrainStep, compute_max_rank_batch, make_blank_batch
from orchestrator.training.warm_start import LoadedWeights, load_pretrained

_log = logging.getLogger(__name__)

TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"


class _RunStopped(Exception):
    """The run ends before its last epoch, because it was asked to."""


# Ends that a retry would only repeat; they are the same on every rank.
_OUTCOMES: dict[type[Exception], OutcomeStatus] = {
    _RunStopped: "stopped",
    DataError: "bad-data",
    CheckpointError: "bad-checkpoint",
    NonFiniteError: "diverged",
    ConfigError: "refused",  # what this device, or this machine, cannot do
}


def run_training(job: TrainJob, world: DistributedContext, launcher: LauncherContext) -> Outcome:
    """Train `job` as rank `world.rank`; return the outcome, which rank 0 also writes to the run's folder.

    Causes that would only repeat (bad data, a bad checkpoint, divergence, a stop request) are outcomes. Any other
    exception is written as a traceback to the run's folder and raised, so that the launcher retries.
    """
    torch.set_num_threads(job.threads)
    done = run_dir.load_finished_outcome(job.folder)
    if world.is_any(world.is_rank_zero and done is not None):  # rank 0's view, so that all ranks do the same
        if done is None:
            raise RuntimeError(
                f"rank {world.rank} does not see {redaction.redact(run_dir.get_outcome_path(job.folder))}; mount the "
                "same storage on every worker"
            )
        return done
    if world.is_any(bool(world.is_rank_zero and job.successor and file_io.exists(job.successor))):
        return Outcome(status="stopped", message="another driver took this run over")
    return Trainer(job, world, launcher, start_attempt(job, world)).run()


def start_attempt(job: TrainJob, world: DistributedContext) -> Attempt:
    """Create an attempt, whose number rank 0 takes for all; every rank must call it."""
    created = attempts.create_attempt(job.folder, world.workers) if world.is_rank_zero else None
    # Only rank 0 contributes, so the sums are its values on every rank.
    number, start = world.all_reduce_sums((created.number, created.start_time) if created else (0, 0.0))
    return created or Attempt(run_dir.get_attempts_dir(job.folder), int(number), start)


class Trainer:
    """One rank's attempt at a run; callbacks may read its attributes and must not change them."""

    classes: tuple[str, ...]  # names, by label
    state: TrainState  # weights, optimizer, average, progress and audit record
    train_step: TrainStep
    train_loader: BatchLoader
    evaluator: Evaluator
    meter: EpochMeter  # sums of the epoch in progress
    checkpointer: Checkpointer
    goodput: Goodput
    best_checkpoint: BestCheckpoint | None = None  # rank 0's
    initial_weights: LoadedWeights | None = None  # that a fresh run started from
    skipped_checkpoints: list[str]  # newer ones that could not be used, and why

    def __init__(self, job: TrainJob, world: DistributedContext, launcher: LauncherContext, attempt: Attempt) -> None:
        self.job, self.world, self.launcher, self.attempt = job, world, launcher, attempt
        self.watchdog = Watchdog(job.cadence.limits, self._record_stall, job.cadence.pulse_steps)
        self.stop_monitor: StopMonitor | None = None
        self.journal_logger: JournalLogger | None = None
        self.callbacks: list[Callback] = [self.watchdog]
        if world.is_rank_zero:
            self.journal_logger = JournalLogger(job, attempt)
            self.stop_monitor = StopMonitor(attempt, job.stop_flag, job.successor, self.watchdog.expect_stop)
            self.callbacks += [self.stop_monitor, self.journal_logger]
        self._loaders = ExitStack()
        self._had_preemption_notice = False  # a rank had one at the last sync; the same on all ranks

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        recipe, progress = self.job.recipe, self.state.progress
        return compute_lr(recipe.schedule, progress.samples, progress.samples_per_epoch, recipe.epochs)

    def notify(self, hook: str, *arguments: object) -> None:
        """Call a hook of all callbacks in their order (see callbacks.callback)."""
        for callback in self.callbacks:
            call_hook(callback, hook, self, *arguments)

    def run(self) -> Outcome:
        """Train to the run's end, or as far as this attempt comes; return the outcome."""
        ended: Outcome | None = None
        try:
            outcome = self._train_to_outcome().model_copy(update={"attempt": self.attempt.number})
            if self.journal_logger is not None:
                self.journal_logger.log_outcome(outcome)
                if not self.attempt.is_superseded():
                    self._write_outcome(outcome)
            ended = outcome
            return outcome
        except Exception as error:
            if self.journal_logger is not None:
                self.journal_logger.log_crash(error)
            self._write_traceback("", traceback.format_exc())
            raise
        finally:
            for callback in reversed(self.callbacks):
                try:
                    call_hook(callback, "on_end", self, ended)
                except CallbackError as error:  # the outcome is written, or another error is on its way
                    _log.warning("%s", error)
            self._loaders.close()

    # ------------------------------------------------------------------ start
    def _train_to_outcome(self) -> Outcome:
        try:
            self._build()
            self.notify("on_start")
            metrics = self._train_epochs()
            self.checkpointer.writer.wait()
            if self.best_checkpoint is not None:
                self.best_checkpoint.writer.wait()
            # After the last update, which no loss has shown yet; equal on all ranks.
            self._check_finite(all(bool(tensor.isfinite().all()) for tensor in self.state.model.state_dict().values()))
            if self.world.is_rank_zero and not self.attempt.is_superseded():
                self._save_final_weights()
            return Outcome(status="finished", samples=self.state.progress.samples, metrics=metrics)
        except tuple(_OUTCOMES) as error:
            samples = self.state.progress.samples if hasattr(self, "state") else 0
            status = next(status for kind, status in _OUTCOMES.items() if isinstance(error, kind))
            return Outcome(status=status, message=str(error), samples=samples)

    def _build(self) -> None:
        """Build what the loop works with, and resume. Raises DataError, CheckpointError or ConfigError on all ranks."""
        job, world, recipe = self.job, self.world, self.job.recipe
        if job.code:
            world.check_on_all_ranks(lambda: check_source_digests(job.code))
        manifest = world.check_on_all_ranks(self._load_manifest)
        self.classes = manifest.classes
        self._shard_samples = _count_shard_samples(manifest, TRAIN_SPLIT)
        self._train_labels = world.check_on_all_ranks(
            lambda: sampler.load_balance_labels(job.data, manifest, TRAIN_SPLIT, recipe.order)
        )
        steps = sampler.count_steps(sum(self._shard_samples), recipe.batch_size)
        self.state = create_initial_state(recipe, len(self.classes), steps, world.device)
        self.sample_tracker = SampleTracker(world, make_blank_batch(2, recipe.model.image_size))
        self.train_step = self._build_train_step()
        user_callbacks = world.check_on_all_ranks(lambda: create_user_callbacks(job.execution.callbacks))
        metrics = world.check_on_all_ranks(lambda: create_metrics(job.execution.metrics, len(self.classes)))
        self.train_loader, val_loader = world.check_on_all_ranks(lambda: self._build_loaders(manifest))
        loaders = (self.train_loader, val_loader)
        self.watchdog.describe_slow_work = lambda: [text for each in loaders for text in each.describe_decoding()]
        counts, classes = _count_shard_samples(manifest, VALIDATION_SPLIT), len(self.classes)
        model, normalize = self.state.model, self.train_step.normalize
        self.evaluator = Evaluator(model, classes, val_loader, counts, normalize, world, recipe.max_bad_share, metrics)
        productive_seconds = self._resume()
        if recipe.initial_weights and self.state.progress.samples == 0:
            self.initial_weights = world.check_on_all_ranks(
                lambda: load_pretrained(self.state.model, job.weights, recipe.initial_weights)
            )
        if world.is_rank_zero:
            self.attempt.record_resume(self.state.progress.samples)
        self.goodput = Goodput(self.attempt, productive_seconds)
        self.checkpointer = Checkpointer(job, self.attempt, self.goodput, self.watchdog)
        # In the order that callbacks.callback documents; the journal logger is there and stays the last.
        last = [] if self.journal_logger is None else [self.callbacks.pop()]
        if world.is_rank_zero and job.execution.profile is not None:
            self.callbacks.append(Profiler(job.execution.profile, self.attempt, job, world.device))
        self.callbacks.append(self.checkpointer)
        if world.is_rank_zero:
            self.best_checkpoint = BestCheckpoint(job, self.classes, self.attempt, self.watchdog)
            self.callbacks.append(self.best_checkpoint)
        self.callbacks += [*user_callbacks, *last]

    def _load_manifest(self) -> Manifest:
        job = self.job
        manifest = manifests.load(job.data, allow_elsewhere=job.allow_elsewhere)
        if manifest.digest() != job.dataset_digest:
            raise DataError(
                f"data: {redaction.redact(job.data)}: its digest is {manifest.digest()}, the run was started on "
                f"{job.dataset_digest}: the dataset changed; give the old one, or start anew with --new"
            )
        counts = _count_shard_samples(manifest, TRAIN_SPLIT)
        sampler.check_workers(counts, job.recipe.order.lanes, job.recipe.batch_size, self.world.workers)
        if manifest.count_samples(VALIDATION_SPLIT) == 0:
            raise DataError(
                f"data: {redaction.redact(job.data)}: its {VALIDATION_SPLIT} split is empty; pack the dataset with "
                "validation images"
            )
        return manifest

    def _build_loaders(self, manifest: Manifest) -> list[BatchLoader]:
        job, loaders, pin = self.job, [], self.world.device.type == "cuda"
        for split in (TRAIN_SPLIT, VALIDATION_SPLIT):
            reader = SampleReader(job.data, manifest, split, job.reading)
            loaders.append(BatchLoader(reader, job.recipe.model.image_size, job.threads, pin=pin))
            self._loaders.callback(loaders[-1].close)
        loaders[0].check_config(job.recipe.order, job.recipe.augmentation, self.world.workers)
        return loaders

    def _build_train_step(self) -> TrainStep:
        """Build the step of a state that is not restored yet; settle the micro-batch and DDP's buckets."""
        job, world, recipe = self.job, self.world, self.job.recipe
        network = wrap_in_ddp(self.state.model, world.workers)
        train_step = world.check_on_all_ranks(lambda: TrainStep(recipe, self.state, network, world, job.execution))
        if world.device.type == "cuda":
            train_step.find_micro_batch(compute_max_rank_batch(recipe.batch_size, recipe.order.lanes, world.workers))
        if world.workers > 1:
            train_step.warm_up_ddp()
        return train_step

    def _resume(self) -> float:
        """Restore the newest valid checkpoint, which rank 0 picks for all, if any; return its productive seconds."""
        world, device, folder = self.world, str(self.world.device), run_dir.get_checkpoints_dir(self.job.folder)

        def load() -> LoadedCheckpoint:
            if not world.is_rank_zero:
                return LoadedCheckpoint(None, {}, [])
            return checkpoint_format.load_newest(folder, device, attempts.load_stale_checkpoint_check(self.job.folder))

        newest = world.check_on_all_ranks(load)
        self.skipped_checkpoints, place = newest.skipped, newest.checkpoint
        exists, samples, number = world.all_reduce_sums((1, place.samples, place.attempt) if place else (0, 0, 0))
        if not exists:
            return 0.0
        url = checkpoint_dir.make_checkpoint_url(folder, int(samples), int(number))
        shown = redaction.redact(url)

        def restore() -> float:
            saved = newest.state or checkpoint_format.load(url, device)
            if saved.get("recipe") != self.job.recipe.to_dict():
                raise CheckpointError(f"{shown}: is of another recipe; start anew with --new")
            self.state.restore(saved, shown)
            return float(saved.get(PRODUCTIVE_SECONDS_KEY, 0.0))

        # A rank that does not see it must crash: to start at the beginning would train on other weights.
        return world.check_on_all_ranks(restore)

    # ------------------------------------------------------------------ loop
    def _train_epochs(self) -> dict[str, float]:
        """Train to the last epoch and return its metrics. An end before raises the same error on every rank."""
        recipe, state = self.job.recipe, self.state
        metrics: dict[str, float] = {}
        if state.progress.samples > 0 and state.progress.step_in_epoch == 0:
            # Resumed between an epoch's last step and its validation.
            metrics = self._end_epoch({})
        while state.progress.epoch < recipe.epochs:
            self.meter, epoch = EpochMeter(self.world.device), state.progress.epoch
            read_before = self.train_loader.reader.get_read_stats()
            self._train_steps(epoch)
            sync = replace(self._sync_ranks(epoch), is_epoch_end=True)
            sums = sync.sums
            trained = self.meter.compute_metrics(sums.loss, sums.samples, sums.correct, self.learning_rate)
            self._apply_sync(sync)
            read = compute_read_metrics(self.world, read_before, self.train_loader.reader.get_read_stats())
            metrics = self._end_epoch(trained | read)
            if state.progress.epoch < recipe.epochs and not self.launcher.should_continue():
                self.checkpointer.save_and_wait(self)
                raise _RunStopped("the launcher needs no more epochs")
        return metrics

    def _train_steps(self, epoch: int) -> None:
        world, state, recipe = self.world, self.state, self.job.recipe
        order = EpochOrder(
            self._shard_samples, recipe.seeds.order, epoch, recipe.order.lanes, recipe.order.window, self._train_labels
        )
        steps = range(state.progress.step_in_epoch, state.progress.steps_per_epoch)
        batches = self.train_loader.iter_training(
            order, recipe.augmentation, recipe.seeds.augmentation, recipe.batch_size, steps, world.rank, world.workers
        )
        for batch in self.meter.time_batches(self.sample_tracker.guard_batches(batches, len(steps))):
            before = state.progress
            self.meter.record_step(self.train_step(batch), float(batch.weights.sum()))
            self.sample_tracker.record_batch(before, batch)
            self.notify("on_step_end")
            # The sync of the epoch's last step is the one at its end.
            if state.progress.step % self.job.cadence.pulse_steps == 0 and state.progress.epoch == epoch:
                self._apply_sync(self._sync_ranks(epoch))

    def _sync_ranks(self, epoch: int) -> SyncResult:
        """Agree with the other ranks on what happened since the last sync; every rank must call it.

        Only here the audit record covers all ranks, so only after it the state may be saved.
        """
        request = "go-on" if self.stop_monitor is None else self.stop_monitor.request
        loss, correct = self.meter.read_sums()
        report = SyncReport(
            loss=loss,
            samples=self.meter.weight,
            correct=correct,
            should_stop=request in ("stop", "save-and-stop"),
            should_save=request == "save-and-stop",
            is_superseded=request == "superseded",
            has_preemption_notice=self.launcher.has_preemption_notice(),
        )
        sync = self.sample_tracker.sync_ranks(self.state.audit_record, epoch, report)
        self.state.audit_record = sync.record
        has_notice = sync.sums.has_preemption_notice > 0
        is_preempted, self._had_preemption_notice = has_notice and not self._had_preemption_notice, has_notice
        return replace(sync, is_preempted=is_preempted, error=self._find_bad_sample_error(epoch))

    def _find_bad_sample_error(self, epoch: int) -> DataError | None:
        job, record = self.job, self.state.audit_record
        bad, samples = record.get_epoch(epoch).bad, self.state.progress.samples_per_epoch
        limit = sample_audit.compute_bad_limit(job.recipe.max_bad_share, samples)
        if len(bad) <= limit:
            return None
        first = next(sample for sample in record.bad if sample.id == bad[0])
        return DataError(
            f"data: {redaction.redact(job.data)}: {len(bad)} of the {samples} images of epoch {epoch + 1} cannot be "
            f"read, more than the {limit} that max_bad_share {job.recipe.max_bad_share:g} allows; the first: "
            f"{first.key!r} at byte {first.offset} of {first.source}: {first.reason}"
        )

    def _apply_sync(self, sync: SyncResult) -> None:
        self.notify("on_sync", sync)
        if sync.error is not None:
            raise sync.error
        self._check_finite(math.isfinite(sync.sums.loss))
        if sync.sums.is_superseded:
            raise _RunStopped("a later attempt, or another driver, took this run over")
        if sync.sums.should_stop:
            raise _RunStopped("asked to stop")

    def _end_epoch(self, trained: dict[str, float]) -> dict[str, float]:
        """Validate if it is due, record and report; return the epoch's metrics. Every rank must call it."""
        progress, cadence = self.state.progress, self.job.cadence
        bad = self.state.audit_record.get_epoch(progress.epoch - 1).bad
        metrics = {"train/epoch": float(progress.epoch), "train/bad_samples": float(len(bad))} | trained
        if progress.epoch == self.job.recipe.epochs or progress.epoch % cadence.validate_epochs == 0:
            with self.watchdog.watch_phase("evaluation", cadence.limits.evaluation_seconds):
                metrics |= self._validate()
        metrics["train/goodput"] = self.goodput.productive_share
        self.notify("on_epoch_end", metrics)
        self.launcher.report({"epoch": progress.epoch, "samples": progress.samples, **metrics})
        return metrics

    def _validate(self) -> dict[str, float]:
        mean = self.state.average.mean
        sets, num_bad = self.evaluator.evaluate({"raw": {}} | ({"averaged": mean} if mean else {}))
        if self.world.is_rank_zero and self.state.progress.epoch == self.job.recipe.epochs:
            name, samples = "averaged" if "averaged" in sets else "raw", self.state.progress.samples
            classes = list_class_results(sets[name], self.classes)
            result = run_dir.ValidationResult(weights=name, samples=samples, classes=classes)
            url = file_io.join(self.job.folder, run_dir.VALIDATION_FILE)
            file_io.write_bytes(url, result.to_json().encode())
        return {"validation/bad_samples": float(num_bad), **self.evaluator.compute_metrics(sets)}

    # ------------------------------------------------------------------ end
    def _check_finite(self, is_finite: bool) -> None:
        if not is_finite:
            raise NonFiniteError(
                f"the loss, or a weight, is not finite after {self.state.progress.samples} samples at learning rate "
                f"{self.learning_rate:g}: lower schedule.base_rate or lengthen schedule.warmup_epochs"
            )

    def _save_final_weights(self) -> None:
        url, recipe = run_dir.get_final_weights_dir(self.job.folder), self.job.recipe.to_dict()
        with self.watchdog.watch_phase("save", self.job.cadence.limits.save_seconds):
            averaged, raw = self.state.copy_final_weights()
            audit = self.state.audit_record.to_dict()
            checkpoint_format.save_final_weights(url, averaged, raw, recipe, self.classes, audit)

    def _write_outcome(self, outcome: Outcome) -> None:
        file_io.write_bytes(run_dir.get_outcome_path(self.job.folder), outcome.to_json().encode())
        if outcome.status == "finished":
            # A restart needs checkpoints until the outcome is written. What cannot be removed costs only space.
            with suppress(OSError):
                file_io.remove(run_dir.get_checkpoints_dir(self.job.folder))

    def _record_stall(self, cause: str, stacks: str) -> None:
        with suppress(OSError):
            self.attempt.record_stall(self.world.rank, f"rank {self.world.rank}: {cause}")
        self._write_traceback("-stacks", stacks)

    def _write_traceback(self, suffix: str, text: str) -> None:
        name = f"attempt-{self.attempt.number:06d}-rank-{self.world.rank:05d}{suffix}.txt"
        with suppress(OSError):  # the cause matters more than its record
            file_io.write_bytes(file_io.join(self.job.folder, "tracebacks", name), redaction.redact(text).encode())


def _count_shard_samples(manifest: Manifest, split: str) -> tuple[int, ...]:
    return tuple(shard.samples for shard in manifest.shards(split))
