"""The entry of one training process: build, resume, train, write the outcome."""

from __future__ import annotations

import logging
import traceback
from contextlib import suppress
from functools import partial

import torch

from orchestrator.checkpoint import weights
from orchestrator.checkpoint.format import CheckpointError, NonFiniteError
from orchestrator.config.errors import ConfigError
from orchestrator.config.printable import redact
from orchestrator.data import order
from orchestrator.data.errors import DataError
from orchestrator.data.loader import Batch
from orchestrator.storage import files, urls
from orchestrator.training import attempts, start
from orchestrator.training import state as states
from orchestrator.training.attempts import Attempt
from orchestrator.training.best import Best
from orchestrator.training.delivery import Delivery
from orchestrator.training.incident import Goodput
from orchestrator.training.initial import load_into
from orchestrator.training.job import Context, Outcome, TrainJob, attempts_of, checkpoints_of, final_of, outcome_of
from orchestrator.training.loop import train
from orchestrator.training.outcome import finished
from orchestrator.training.parts import Parts
from orchestrator.training.profiler import Profiler, trace_of
from orchestrator.training.recorder import Recorder
from orchestrator.training.saver import Saver
from orchestrator.training.start import TRAIN, VALIDATION, unanimous
from orchestrator.training.state import TrainState
from orchestrator.training.step import Stepper, largest_part
from orchestrator.training.watch import Watch
from orchestrator.training.watchdog import Watchdog
from orchestrator.training.world import World

_log = logging.getLogger(__name__)


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
    if world.agree(bool(world.leads and job.successor and files.exists(job.successor))):
        return Outcome(status="stopped", message="another driver took this run over")
    attempt = _attempt(job, world)
    recorder = Recorder(job, world, attempt)
    dog = Watchdog(job.cadence.limits, partial(_tell, job, world, attempt), job.cadence.pulse_steps)
    watch = Watch(attempt, job.stop_flag, job.successor, dog.asked_to_stop) if world.leads else None
    try:
        outcome = _outcome(job, world, context, attempt, recorder, dog, watch)
        recorder.ended(outcome)
        if world.leads and not attempt.superseded():
            _keep(job, outcome)
        return outcome
    except Exception as error:
        recorder.crashed(error)
        _keep_traceback(job, world, attempt, "", traceback.format_exc())
        raise
    finally:
        dog.close()
        if watch is not None:
            watch.close()
        recorder.close()


def _outcome(
    job: TrainJob, world: World, context: Context, attempt: Attempt, recorder: Recorder, dog: Watchdog,
    watch: Watch | None,
) -> Outcome:  # fmt: skip
    try:
        outcome = _run(job, world, context, attempt, recorder, dog, watch)
    except DataError as error:
        outcome = Outcome(status="bad-data", message=str(error))
    except CheckpointError as error:
        outcome = Outcome(status="bad-checkpoint", message=str(error))
    except NonFiniteError as error:  # in the average alone; weights themselves have been looked at
        outcome = Outcome(status="diverged", message=str(error))
    except ConfigError as error:  # what this device, or this machine, cannot do
        outcome = Outcome(status="refused", message=str(error))
    return outcome.model_copy(update={"attempt": attempt.number})


def _run(
    job: TrainJob, world: World, context: Context, attempt: Attempt, recorder: Recorder, dog: Watchdog,
    watch: Watch | None,
) -> Outcome:  # fmt: skip
    manifest = unanimous(world, lambda: start.dataset(job, world))
    counts = start.counts(manifest, TRAIN)
    steps = order.steps_per_epoch(sum(counts), job.recipe.batch_size)
    state = states.fresh(job.recipe, len(manifest.classes), steps, world.device)
    blank = start.blank_batch(job)
    stepper, micro_batch = _stepper(job, world, attempt, state, blank)
    training, validation = unanimous(world, lambda: start.loaders(job, manifest, world))
    dog.explain_by(lambda: training.describe_decoding() + validation.describe_decoding())
    resumed = start.resume(job, world, attempt, state)
    loaded = None
    if job.recipe.initial_weights and state.progress.samples == 0:
        loaded = unanimous(world, lambda: load_into(state.model, job.weights, job.recipe.initial_weights))
    if world.leads:
        attempt.resumed(state.progress.samples)
    goodput = Goodput(attempt, resumed.productive)
    best = Best(job, manifest.classes, attempt, dog) if world.leads else None
    parts = Parts(
        job, world, context, state, stepper, training, validation, counts, start.counts(manifest, VALIDATION),
        Delivery(world, blank), recorder, Saver(job, attempt, goodput, dog), dog, goodput, watch, best,
    )  # fmt: skip
    parts.saver.resumed(state.progress.samples)
    recorder.started(state.progress, world, resumed.passed_over)
    if loaded is not None:
        recorder.noted("weights", state.progress, loaded=loaded.tell(job.weights, manifest.classes))
    if micro_batch != job.execution.micro_batch:
        recorder.noted("micro-batch", state.progress, images=float(micro_batch or 0))
    try:
        outcome = train(parts)
    except DataError as error:  # the same on every rank
        return Outcome(status="bad-data", message=str(error), samples=state.progress.samples)
    finally:
        stepper.close()
        _settle(parts.saver)
        if best is not None:
            best.wait()
        training.close()
        validation.close()
    if outcome.status == "finished" and world.leads and not attempt.superseded():
        with dog.phase("save", job.cadence.limits.save_seconds):
            _save_final(job, state, manifest.classes)
    return outcome


def _stepper(
    job: TrainJob, world: World, attempt: Attempt, state: TrainState, blank: Batch
) -> tuple[Stepper, int | None]:
    """What makes the steps of a state that is not loaded yet, and the micro-batch that it came to."""
    network = states.wrapped(state.model, world.workers)
    stepper = unanimous(world, lambda: Stepper(job.recipe, state, network, world, job.execution))
    micro_batch = job.execution.micro_batch
    if world.device.type == "cuda":
        micro_batch = stepper.fit(blank, largest_part(job.recipe.batch_size, job.recipe.order.lanes, world.workers))
    if world.workers > 1:
        stepper.settle(blank)
    if job.execution.profile is not None and world.leads:
        url = trace_of(job.folder, attempt.number, world.rank)
        stepper.profiler = Profiler(job.execution.profile, url, world.device)
    return stepper, micro_batch


def _settle(saver: Saver) -> None:
    """Until a checkpoint under way is written; its error is not what the attempt ends with."""
    try:
        saver.wait()
    except Exception as error:
        _log.warning("the last checkpoint was not written: %s: %s", type(error).__name__, error)


def _save_final(job: TrainJob, state: TrainState, classes: tuple[str, ...]) -> None:
    averaged, raw = state.final_weights()
    weights.save(final_of(job.folder), averaged, raw, job.recipe.to_dict(), classes, state.record.to_dict())


def _keep(job: TrainJob, outcome: Outcome) -> None:
    files.write_bytes(outcome_of(job.folder), outcome.to_json().encode())
    if outcome.status == "finished":
        # Only now: until the outcome is there, a restart needs them. What cannot be removed costs only space.
        with suppress(OSError):
            files.remove(checkpoints_of(job.folder))


def _tell(job: TrainJob, world: World, attempt: Attempt, cause: str, stacks: str) -> None:
    """Keep why this rank ends itself, for the attempt after it."""
    with suppress(OSError):
        attempt.stalled(world.rank, f"rank {world.rank}: {cause}")
    _keep_traceback(job, world, attempt, "-stacks", stacks)


def _keep_traceback(job: TrainJob, world: World, attempt: Attempt, kind: str, text: str) -> None:
    name = f"attempt-{attempt.number:06d}-rank-{world.rank:05d}{kind}.txt"
    with suppress(OSError):  # the cause is worth more than its record
        files.write_bytes(files.join(job.folder, "tracebacks", name), redact(text).encode())


def _attempt(job: TrainJob, world: World) -> Attempt:
    """This attempt, whose number rank 0 takes for all."""
    taken = attempts.take(job.folder, world.workers) if world.leads else None
    numbers = world.sum([float(taken.number), taken.began] if taken is not None else [0.0, 0.0])
    return taken or Attempt(attempts_of(job.folder), int(numbers[0]), numbers[1])
