"""The training of a trial, in its actor: here torch is imported, and with several workers Ray Train is asked."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from orchestrator.checkpoint import places
from orchestrator.launch import prestart, trainer
from orchestrator.launch.config import RunSpec
from orchestrator.storage import files
from orchestrator.training import entry, fork, outcome, world
from orchestrator.training.job import Context, Outcome, checkpoints_of
from orchestrator.tuning import history
from orchestrator.tuning.trial_run import TrialTask

LOOK_SECONDS = 0.5  # between looks into the journal of a run whose workers are other processes


def train(task: TrialTask, context: Context) -> Outcome:
    """Train a trial's run, or what is left of it: in this process where it has one worker, else by Ray Train."""
    spec = task.spec
    if task.fork is not None and not _begun(spec):
        # Where that checkpoint is gone, all is trained from the start: the recipe says it whole.
        fork.fork(task.fork.folder, spec.folder, spec.recipe, task.fork.samples)
    if spec.placement.workers > 1:
        return _by_workers(task, context)
    device = torch.device("cuda", 0) if task.gpus > 0 else torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return entry.run(spec.job(task.stop_flag, task.successor), world.current(device), context)


def _begun(spec: RunSpec) -> bool:
    """Whether the run has something to go on from, or is done."""
    return outcome.finished(spec.folder) is not None or any(places.committed(checkpoints_of(spec.folder)))


@dataclass(frozen=True)
class _Flags:
    """What of a lease the workers of a trial look at: its own stop flag, and who takes the sweep over."""

    stop_flag: str
    successor: str


def _by_workers(task: TrialTask, context: Context) -> Outcome:
    """Ray Train's workers train; their epochs are read from the journal, and a flag of the trial's own stops them.

    They wait for nobody between epochs, so a trial that is not wanted any more may be an epoch ahead.
    """
    spec = task.spec
    # A name of this launch alone: a flag that an earlier one left behind must not stop it.
    flag = files.join(spec.folder, f"enough-{uuid.uuid4().hex}.stop")
    done = threading.Event()
    with _told(task, context, flag, done):
        prestart.use(spec.placement.workers)
        try:
            return trainer.launch(spec, _Flags(flag, task.successor), task.gpus)
        finally:
            done.set()


@contextmanager
def _told(task: TrialTask, context: Context, flag: str, done: threading.Event) -> Iterator[None]:
    """Report epochs as the journal gets them, and pass on wishes to stop, until `done`."""
    teller = threading.Thread(target=_tell, args=(task, context, flag, done), name="trial-epochs", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _tell(task: TrialTask, context: Context, flag: str, done: threading.Event) -> None:
    told = {epoch.epoch for epoch in history.read(task.spec.folder)}
    ending = False
    while not ending:
        ending = done.wait(LOOK_SECONDS)  # once more after the end: the last epoch was written just before it
        try:
            epochs = history.read(task.spec.folder)
            stop = files.exists(task.stop_flag)
        except OSError:
            continue  # not to know is not to stop
        for epoch in epochs:
            if epoch.epoch not in told and context.wanted():
                told.add(epoch.epoch)
                context.report({"epoch": epoch.epoch, "samples": epoch.samples, **epoch.values})
        if (stop or not context.wanted()) and not ending and outcome.finished(task.spec.folder) is None:
            files.write_bytes(flag, b"")
