"""The training of a trial, in its actor: here torch is imported, and with several workers Ray Train is asked."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from orchestrator.ray_backend import ray_trainer
from orchestrator.storage import file_io
from orchestrator.training import distributed, run_dir, trainer
from orchestrator.training.config import LauncherContext, Outcome
from orchestrator.tuning import trial_history
from orchestrator.tuning.trial_run import TrialTask

JOURNAL_POLL_SECONDS = 0.5  # between looks into the journal of a run whose workers are other processes


def train_trial(task: TrialTask, context: LauncherContext) -> Outcome:
    """Train a trial's run, or what is left of it: in this process where it has one worker, else by Ray Train."""
    spec = task.spec
    if spec.placement.workers > 1:
        return _train_with_workers(task, context)
    device = torch.device("cuda", 0) if task.gpus > 0 else torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return trainer.run_training(
        spec.build_train_job(task.stop_flag, task.successor), distributed.get_context(device), context
    )


@dataclass(frozen=True)
class _StopFlags:
    """What of a lease the workers of a trial look at: its own stop flag, and who takes the sweep over."""

    stop_flag: str
    successor: str


def _train_with_workers(task: TrialTask, context: LauncherContext) -> Outcome:
    """Ray Train's workers train; their epochs are read from the journal, and a flag of the trial's own stops them.

    They wait for nobody between epochs, so a trial that is not wanted any more may be an epoch ahead.
    """
    spec = task.spec
    # A name of this launch alone: a flag that an earlier one left behind must not stop it.
    flag = file_io.join(spec.folder, f"enough-{uuid.uuid4().hex}.stop")
    done = threading.Event()
    with _relay_epochs(task, context, flag, done):
        try:
            return ray_trainer.launch_run(spec, _StopFlags(flag, task.successor), task.gpus)
        finally:
            done.set()


@contextmanager
def _relay_epochs(task: TrialTask, context: LauncherContext, flag: str, done: threading.Event) -> Iterator[None]:
    """Report epochs as the journal gets them, and pass on wishes to stop, until `done`."""
    teller = threading.Thread(target=_poll_journal, args=(task, context, flag, done), name="trial-epochs", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _poll_journal(task: TrialTask, context: LauncherContext, flag: str, done: threading.Event) -> None:
    told = {epoch.epoch for epoch in trial_history.read_epochs(task.spec.folder)}
    ending = False
    while not ending:
        ending = done.wait(JOURNAL_POLL_SECONDS)  # once more after the end: the last epoch was written just before it
        try:
            epochs = trial_history.read_epochs(task.spec.folder)
            stop = file_io.exists(task.stop_flag)
        except OSError:
            continue  # not to know is not to stop
        for epoch in epochs:
            if epoch.epoch not in told and context.should_continue():
                told.add(epoch.epoch)
                context.report({"epoch": epoch.epoch, "samples": epoch.samples, **epoch.values})
        if (
            (stop or not context.should_continue())
            and not ending
            and run_dir.load_finished_outcome(task.spec.folder) is None
        ):
            file_io.write_bytes(flag, b"")
