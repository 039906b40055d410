"""The training of a trial, in its actor; with several workers Ray Train runs them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.ray_backend import ray_trainer
from orchestrator.storage import file_io
from orchestrator.training import distributed, run_dir, trainer
from orchestrator.training.config import LauncherContext, Outcome
from orchestrator.tuning import trial_history
from orchestrator.tuning.trial_run import TrialTask

JOURNAL_POLL_SECONDS = 0.5  # between reads of the journal of a run whose workers are other processes


def train_trial(task: TrialTask, context: LauncherContext) -> Outcome:
    """Train a trial's run, or what is left of it: in this process if it has one worker, else by Ray Train."""
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


def _train_with_workers(task: TrialTask, context: LauncherContext) -> Outcome:
    """Train with Ray Train: the journal reports its epochs, and a flag of the trial's own stops it.

    The workers do not wait between epochs, so a trial that is stopped may be an epoch ahead.
    """
    spec = task.spec
    # The name is unique, so that a flag of an earlier launch does not stop this one.
    flag = file_io.join(spec.folder, f"enough-{uuid.uuid4().hex}.stop")
    done = threading.Event()
    with _relay_epochs(task, context, flag, done):
        try:
            return ray_trainer.launch_run(spec, flag, task.successor, task.gpus)
        finally:
            done.set()


@contextmanager
def _relay_epochs(task: TrialTask, context: LauncherContext, flag: str, done: threading.Event) -> Iterator[None]:
    """Report epochs as they appear in the journal, and pass on requests to stop, until `done`."""
    thread = threading.Thread(target=_poll_journal, args=(task, context, flag, done), name="trial-epochs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _poll_journal(task: TrialTask, context: LauncherContext, flag: str, done: threading.Event) -> None:
    reported = {epoch.epoch for epoch in trial_history.read_epochs(task.spec.folder)}
    ending = False
    while not ending:
        ending = done.wait(JOURNAL_POLL_SECONDS)  # one more read after the end, for the last epoch
        try:
            epochs = trial_history.read_epochs(task.spec.folder)
            stop = file_io.exists(task.stop_flag)
        except OSError:
            continue  # a failed poll is ignored
        for epoch in epochs:
            if epoch.epoch not in reported and context.should_continue():
                reported.add(epoch.epoch)
                context.report({"epoch": epoch.epoch, "samples": epoch.samples, **epoch.values})
        should_stop = (stop or not context.should_continue()) and not ending
        if should_stop and run_dir.load_finished_outcome(task.spec.folder) is None:
            file_io.write_bytes(flag, b"")
