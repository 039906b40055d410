"""The trainer: one rank's attempt at a run, from its start to its outcome."""

from __future__ import annotations

import logging
import math
import traceback
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch
from torch import nn

from orchestrator.checkpoint import weights
from orchestrator.checkpoint.checkpoint import CheckpointError, NonFiniteError
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import check_source_digests
from orchestrator.data import sample_audit, sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.sampler import EpochOrder
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.recipe.metrics import create_metrics
from orchestrator.storage import file_io
from orchestrator.training import attempt_setup
from orchestrator.training import train_state as states
from orchestrator.training.attempts import Attempt, Goodput
from orchestrator.training.callbacks.best_checkpoint import BestCheckpoint
from orchestrator.training.callbacks.callback import Callback, CallbackError, call_hook, create_user_callbacks
from orchestrator.training.callbacks.checkpointer import Checkpointer
from orchestrator.training.callbacks.journal_logger import JournalLogger
from orchestrator.training.callbacks.profiler import Profiler
from orchestrator.training.callbacks.stop_monitor import StopMonitor
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import LauncherContext, Outcome, OutcomeStatus, TrainJob
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.epoch_meter import EpochMeter, compute_read_metrics
from orchestrator.training.evaluator import Evaluator
from orchestrator.training.rank_sync import SampleTracker, SyncReport, SyncResult
from orchestrator.training.run_dir import (
    ValidationResult,
    get_checkpoints_dir,
    get_final_weights_dir,
    get_outcome_path,
    get_trace_path,
    get_validation_path,
    load_finished_outcome,
)
from orchestrator.training.train_state import TrainState
from orchestrator.training.train_step import TrainStep, compute_max_rank_batch, make_blank_batch
from orchestrator.training.warm_start import LoadedWeights, load_pretrained

_log = logging.getLogger(__name__)


def run_training(job: TrainJob, world: DistributedContext, launcher: LauncherContext) -> Outcome:
    """Train `job` as rank `world.rank`; return the outcome, which rank 0 also writes to the run's folder.

    Causes that would only repeat (bad data, a bad checkpoint, divergence, a stop request) are outcomes. Any other
    exception is written as a traceback to the run's folder and raised, so that the launcher retries.
    """
    torch.set_num_threads(job.threads)
    done = load_finished_outcome(job.folder)
    if world.broadcast_flag(done is not None):  # rank 0's view, so that all ranks do the same
        if done is None:
            raise RuntimeError(
                f"rank {world.rank} does not see {redaction.redact(get_outcome_path(job.folder))}; mount the same "
                "storage on every worker"
            )
        return done
    if world.broadcast_flag(bool(world.is_rank_zero and job.successor and file_io.exists(job.successor))):
        return Outcome(status="stopped", message="another driver took this run over")
    return Trainer(job, world, launcher, attempt_setup.start_attempt(job, world)).run()


class Trainer:
    """One rank's attempt at a run; callbacks may read its attributes and must not change them.

    Attributes:
        job, world, launcher, attempt: the run, this rank, its launcher, the number of the attempt.
        classes: names of the classes, by label.
        state: weights, optimizer, average, progress and audit record.
        train_step, train_loader, evaluator: the parts of the loop.
        meter: sums of the epoch in progress.
        learning_rate: of the next step.
        initial_weights: the weights that a fresh run started from, if any.
        skipped_checkpoints: newer checkpoints that could not be used, and why.
    """

    classes: tuple[str, ...]
    state: TrainState
    train_step: TrainStep
    train_loader: BatchLoader
    train_shard_samples: tuple[int, ...]
    evaluator: Evaluator
    meter: EpochMeter
    sample_tracker: SampleTracker
    checkpointer: Checkpointer
    goodput: Goodput
    best_checkpoint: BestCheckpoint | None = None  # rank 0's
    initial_weights: LoadedWeights | None = None
    skipped_checkpoints: list[str]

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
            if self.world.is_rank_zero and not self.attempt.is_superseded():
                _write_outcome(self.job, outcome)
            ended = outcome
            return outcome
        except Exception as error:
            if self.journal_logger is not None:
                self.journal_logger.log_crash(error)
            self._write_traceback("", traceback.format_exc())
            raise
        finally:
            self._end(ended)

    def _end(self, outcome: Outcome | None) -> None:
        for callback in reversed(self.callbacks):
            try:
                call_hook(callback, "on_end", self, outcome)
            except CallbackError as error:  # the outcome is written, or another error is on its way
                _log.warning("%s", error)
        self._loaders.close()

    # ------------------------------------------------------------------ start
    def _train_to_outcome(self) -> Outcome:
        try:
            self._build()
            self.notify("on_start")
            try:
                outcome = self._train_epochs()
            except DataError as error:  # the same on every rank
                return Outcome(status="bad-data", message=str(error), samples=self.state.progress.samples)
            if outcome.status == "finished" and self.world.is_rank_zero and not self.attempt.is_superseded():
                with self.watchdog.watch_phase("save", self.job.cadence.limits.save_seconds):
                    self._save_final_weights()
            return outcome
        except DataError as error:
            return Outcome(status="bad-data", message=str(error))
        except CheckpointError as error:
            return Outcome(status="bad-checkpoint", message=str(error))
        except NonFiniteError as error:  # in the average alone; the weights themselves were checked
            return Outcome(status="diverged", message=str(error))
        except ConfigError as error:  # what this device, or this machine, cannot do
            return Outcome(status="refused", message=str(error))

    def _build(self) -> None:
        """Build what the loop works with, and resume. Raises DataError, CheckpointError or ConfigError on all ranks."""
        job, world, recipe = self.job, self.world, self.job.recipe
        if job.code:
            world.check_on_all_ranks(lambda: check_source_digests(job.code))
        manifest = world.check_on_all_ranks(lambda: attempt_setup.load_manifest(job, world.workers))
        self.classes = manifest.classes
        self.train_shard_samples = attempt_setup.count_shard_samples(manifest, attempt_setup.TRAIN_SPLIT)
        self._train_labels = world.check_on_all_ranks(
            lambda: sampler.load_balance_labels(job.data, manifest, attempt_setup.TRAIN_SPLIT, recipe.order)
        )
        steps = sampler.count_steps(sum(self.train_shard_samples), recipe.batch_size)
        self.state = states.create_initial_state(recipe, len(manifest.classes), steps, world.device)
        self.sample_tracker = SampleTracker(world, make_blank_batch(2, recipe.model.image_size))
        self.train_step = self._build_train_step()
        user_callbacks = world.check_on_all_ranks(lambda: create_user_callbacks(job.execution.callbacks))
        metrics = world.check_on_all_ranks(lambda: create_metrics(job.execution.metrics, len(manifest.classes)))
        pin = world.device.type == "cuda"
        self.train_loader, val_loader = world.check_on_all_ranks(
            lambda: attempt_setup.build_dataloaders(job, manifest, world.workers, pin=pin)
        )
        for loader in (self.train_loader, val_loader):
            self._loaders.callback(loader.close)
        self.watchdog.set_slow_work_source(
            lambda: self.train_loader.describe_decoding() + val_loader.describe_decoding()
        )
        self.evaluator = Evaluator(
            self.state.model,
            len(manifest.classes),
            val_loader,
            attempt_setup.count_shard_samples(manifest, attempt_setup.VALIDATION_SPLIT),
            self.train_step.normalize,
            world,
            recipe.max_bad_share,
            metrics,
        )
        resumed = attempt_setup.resume_from_checkpoint(job, world, self.state)
        self.skipped_checkpoints = resumed.skipped_checkpoints
        if recipe.initial_weights and self.state.progress.samples == 0:
            self.initial_weights = world.check_on_all_ranks(
                lambda: load_pretrained(self.state.model, job.weights, recipe.initial_weights)
            )
        if world.is_rank_zero:
            self.attempt.record_resume(self.state.progress.samples)
        self._add_callbacks(resumed.productive_seconds, user_callbacks)

    def _add_callbacks(self, productive_seconds: float, user_callbacks: list[Callback]) -> None:
        """Complete the callbacks, in the order that callbacks.callback documents."""
        job, world, attempt = self.job, self.world, self.attempt
        self.goodput = Goodput(attempt, productive_seconds)
        self.checkpointer = Checkpointer(job, attempt, self.goodput, self.watchdog)
        if self.stop_monitor is None or self.journal_logger is None:
            self.callbacks = [self.watchdog, self.checkpointer, *user_callbacks]
            return
        profilers = []
        if job.execution.profile is not None:
            url = get_trace_path(job.folder, attempt.number, world.rank)
            profilers.append(Profiler(job.execution.profile, url, world.device))
        self.best_checkpoint = BestCheckpoint(job, self.classes, attempt, self.watchdog)
        self.callbacks = [
            self.watchdog,
            self.stop_monitor,
            *profilers,
            self.checkpointer,
            self.best_checkpoint,
            *user_callbacks,
            self.journal_logger,
        ]

    def _build_train_step(self) -> TrainStep:
        """Build the step of a state that is not restored yet; settle the micro-batch and DDP's buckets."""
        job, world, recipe = self.job, self.world, self.job.recipe
        network = states.wrap_in_ddp(self.state.model, world.workers)
        train_step = world.check_on_all_ranks(lambda: TrainStep(recipe, self.state, network, world, job.execution))
        if world.device.type == "cuda":
            train_step.find_micro_batch(compute_max_rank_batch(recipe.batch_size, recipe.order.lanes, world.workers))
        if world.workers > 1:
            train_step.warm_up_ddp()
        return train_step

    # ------------------------------------------------------------------ loop
    def _train_epochs(self) -> Outcome:
        """Train to the last epoch, or until stopped or diverged. Every rank returns the same status.

        Raises DataError, on every rank alike, when a rank cannot read its data or too many samples are broken.
        """
        recipe, state = self.job.recipe, self.state
        metrics: dict[str, float] = {}
        if state.progress.samples > 0 and state.progress.step_in_epoch == 0:
            # Resumed between an epoch's last step and its validation.
            metrics = self._end_epoch({})
        while state.progress.epoch < recipe.epochs:
            self.meter, epoch = EpochMeter(self.world.device), state.progress.epoch
            read_before = self.train_loader.reader.get_read_stats()
            if (outcome := self._train_steps(epoch)) is not None:
                return outcome
            sync = replace(self._sync_ranks(epoch), is_epoch_end=True)
            sums = sync.sums
            trained = self.meter.compute_metrics(sums.loss, sums.samples, sums.correct, self.learning_rate)
            if (outcome := self._apply_sync(sync)) is not None:
                return outcome
            read = compute_read_metrics(self.world, read_before, self.train_loader.reader.get_read_stats())
            metrics = self._end_epoch(trained | read)
            if state.progress.epoch < recipe.epochs and not self.launcher.should_continue():
                self.checkpointer.save_and_wait(self)
                return self._make_outcome("stopped", "the launcher needs no more epochs")
        return self._finish(metrics)

    def _train_steps(self, epoch: int) -> Outcome | None:
        """Make the remaining steps of an epoch; return an outcome when the run must end before the epoch does."""
        job, world, state = self.job, self.world, self.state
        recipe = job.recipe
        order = EpochOrder(
            self.train_shard_samples,
            recipe.seeds.order,
            epoch,
            recipe.order.lanes,
            recipe.order.window,
            self._train_labels,
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
            if state.progress.step % job.cadence.pulse_steps == 0 and state.progress.epoch == epoch:
                outcome = self._apply_sync(self._sync_ranks(epoch))
                if outcome is not None:
                    return outcome
        return None

    def _sync_ranks(self, epoch: int) -> SyncResult:
        """Agree with the other ranks on what happened since the last sync; every rank must call it.

        Only here the audit record covers all ranks, so only after it the state may be saved. Raises DataError, on
        every rank alike, when a rank cannot read its data.
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
        bad, samples = record.get_epoch(epoch).bad, self.state.progress.steps_per_epoch * job.recipe.batch_size
        limit = sample_audit.compute_bad_limit(job.recipe.max_bad_share, samples)
        if len(bad) <= limit:
            return None
        first = next(sample for sample in record.bad if sample.id == bad[0])
        return DataError(
            f"data: {redaction.redact(job.data)}: {len(bad)} of the {samples} images of epoch {epoch + 1} cannot be "
            f"read, more than the {limit} that max_bad_share {job.recipe.max_bad_share:g} allows; the first: "
            f"{first.key!r} at byte {first.offset} of {first.source}: {first.reason}"
        )

    def _apply_sync(self, sync: SyncResult) -> Outcome | None:
        """Call the callbacks; return an outcome when the sync asks for the end. Raises the sync's DataError."""
        self.notify("on_sync", sync)
        if sync.error is not None:
            raise sync.error
        if not math.isfinite(sync.sums.loss):
            return self._make_outcome("diverged", self._describe_divergence())
        if sync.sums.is_superseded:
            return Outcome(status="stopped", message="a later attempt, or another driver, took this run over")
        if sync.sums.should_stop:
            return self._make_outcome("stopped", "asked to stop")
        return None

    def _end_epoch(self, trained: dict[str, float]) -> dict[str, float]:
        """Validate if it is due, record and report; return the epoch's metrics. Every rank must call it."""
        progress, cadence = self.state.progress, self.job.cadence
        is_last = progress.epoch == self.job.recipe.epochs
        bad = self.state.audit_record.get_epoch(progress.epoch - 1).bad
        metrics = {"train/epoch": float(progress.epoch), "train/bad_samples": float(len(bad))} | trained
        if is_last or progress.epoch % cadence.validate_epochs == 0:
            with self.watchdog.watch_phase("evaluation", cadence.limits.evaluation_seconds):
                metrics |= self._validate()
        metrics["train/goodput"] = self.goodput.productive_share
        self.notify("on_epoch_end", metrics)
        self.launcher.report({"epoch": progress.epoch, "samples": progress.samples, **metrics})
        return metrics

    def _validate(self) -> dict[str, float]:
        mean = self.state.average.mean
        sets = self.evaluator.evaluate({"raw": {}} | ({"averaged": mean} if mean else {}))
        total = sum(self.evaluator.shard_samples)
        metrics = {"validation/bad_samples": float(total - max(sums.num_samples for sums in sets.values()))}
        metrics |= self.evaluator.compute_metrics(sets)
        if self.world.is_rank_zero and self.state.progress.epoch == self.job.recipe.epochs:
            name = "averaged" if "averaged" in sets else "raw"
            result = ValidationResult(
                weights=name, samples=self.state.progress.samples, classes=sets[name].get_class_results(self.classes)
            )
            file_io.write_bytes(get_validation_path(self.job.folder), result.to_json().encode())
        return metrics

    # ------------------------------------------------------------------ end
    def _finish(self, metrics: dict[str, float]) -> Outcome:
        self.checkpointer.wait()
        if self.best_checkpoint is not None:
            self.best_checkpoint.wait()
        if not has_finite_weights(self.state.model):  # after the last update, equal on all ranks; no loss has shown it
            return self._make_outcome("diverged", self._describe_divergence())
        return self._make_outcome("finished").model_copy(update={"metrics": metrics})

    def _make_outcome(self, status: OutcomeStatus, message: str = "") -> Outcome:
        return Outcome(status=status, message=message, samples=self.state.progress.samples)

    def _describe_divergence(self) -> str:
        progress = self.state.progress
        return (
            f"the loss, or a weight, is not finite after {progress.samples} samples at learning rate "
            f"{self.learning_rate:g}: lower schedule.base_rate or lengthen schedule.warmup_epochs"
        )

    def _save_final_weights(self) -> None:
        averaged, raw = self.state.copy_final_weights()
        url, recipe = get_final_weights_dir(self.job.folder), self.job.recipe.to_dict()
        weights.save(url, averaged, raw, recipe, self.classes, self.state.audit_record.to_dict())

    def _record_stall(self, cause: str, stacks: str) -> None:
        """Record why this rank ends itself, for the next attempt."""
        with suppress(OSError):
            self.attempt.record_stall(self.world.rank, f"rank {self.world.rank}: {cause}")
        self._write_traceback("-stacks", stacks)

    def _write_traceback(self, suffix: str, text: str) -> None:
        name = f"attempt-{self.attempt.number:06d}-rank-{self.world.rank:05d}{suffix}.txt"
        with suppress(OSError):  # the cause matters more than its record
            file_io.write_bytes(file_io.join(self.job.folder, "tracebacks", name), redaction.redact(text).encode())


def has_finite_weights(model: nn.Module) -> bool:
    """Return whether no weight and no buffer is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def _write_outcome(job: TrainJob, outcome: Outcome) -> None:
    file_io.write_bytes(get_outcome_path(job.folder), outcome.to_json().encode())
    if outcome.status == "finished":
        # A restart needs checkpoints until the outcome is written. What cannot be removed costs only space.
        with suppress(OSError):
            file_io.remove(get_checkpoints_dir(job.folder))
