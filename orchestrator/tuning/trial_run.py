"""A trial in its actor: it repeats the epochs that are known, then trains, one epoch at a time.

With several workers Ray Train trains it, else this process does.
"""

from __future__ import annotations

import math
import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping

import torch

from orchestrator.ray_backend import ray_trainer
from orchestrator.storage import file_io
from orchestrator.training import distributed, run_dir, trainer
from orchestrator.training.config import LauncherContext, Outcome, OutcomeStatus
from orchestrator.tuning import trial_store
from orchestrator.tuning.trial import EpochResult, State, TrialReport, TrialTask

# After so long without a request the training saves and ends; the next request resumes it. Less than a watchdog allows
# between two steps.
IDLE_TIMEOUT_SECONDS = 120.0
JOURNAL_POLL_SECONDS = 0.5  # between reads of the journal of a run whose workers are other processes

StepResult = Mapping[str, float] | Outcome

# Of other outcomes: failed.
_STATES: dict[OutcomeStatus, State] = {"finished": "finished", "stopped": "stopped", "diverged": "diverged"}


def train_trial(task: TrialTask, context: LauncherContext) -> Outcome:
    """Train a trial's run, or what is left of it: in this process if it has one worker, else by Ray Train."""
    if task.spec.placement.workers > 1:
        return _train_with_workers(task, context)
    device = torch.device("cuda", 0) if task.gpus > 0 else torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    job = task.spec.build_train_job(task.stop_flag, task.successor)
    return trainer.run_training(job, distributed.get_context(device), context)


class TrialRun:
    """One trial in this process."""

    def __init__(self, task: TrialTask, train: Callable[[TrialTask, LauncherContext], Outcome] = train_trial) -> None:
        """Prepare a trial; `train` trains its run, or what is left of it."""
        self._task = task
        known = trial_store.read_epochs(task.spec.folder)
        self._known_epochs = deque(known)
        self._last_epoch = known[-1] if known else EpochResult(0, {}, 0.0)
        task.spec.save()
        self._training = StepwiseTraining(lambda context: train(task, context))

    def step(self) -> TrialReport:
        """Return the next epoch, or the end, after which this is not called again. Raises what training raised."""
        if self._known_epochs:
            epoch = self._known_epochs.popleft()
            # Of a trial that ended, storage has the true state.
            is_end = self._task.ended and not self._known_epochs
            return self._make_report(epoch, "finished" if is_end else "running")
        while not isinstance(result := self._training.next_epoch(), Outcome):
            number = int(result["epoch"])
            if number <= self._last_epoch.epoch:
                continue  # trained again after a restart, and reported before
            values = {name: float(value) for name, value in result.items() if name not in ("epoch", "samples")}
            self._last_epoch = trial_store.build_next_epoch(self._last_epoch, number, values, int(result["samples"]))
            if number < self._task.spec.recipe.epochs:
                return self._make_report(self._last_epoch)
            # After the last one it writes its final weights.
        return self._make_report(self._last_epoch, _STATES.get(result.status, "failed"), result.message)

    def close(self) -> None:
        """Have the training save and end."""
        self._training.close()

    def _make_report(self, epoch: EpochResult, state: State = "running", reason: str = "") -> TrialReport:
        metric = self._task.metric
        score = metric.find_score(epoch.values)
        loss = None if score is None else metric.to_loss(score)
        if state in ("diverged", "failed") or (loss is not None and not math.isfinite(loss)):
            loss = metric.worst_loss  # schedulers compare numbers
        return TrialReport(
            number=self._task.number,
            epoch=epoch.epoch,
            values={name: value for name, value in epoch.values.items() if math.isfinite(value)},
            seconds=epoch.seconds,
            score=loss,
            state=state,
            reason=reason,
        )


class StepwiseTraining(LauncherContext):
    """A training in a thread of its own that waits after each epoch for a request; and the context that it sees."""

    def __init__(
        self, train: Callable[[LauncherContext], Outcome], timeout_seconds: float = IDLE_TIMEOUT_SECONDS
    ) -> None:
        """Prepare a training; `train` trains the run, or what is left of it, under the context that it is given."""
        self._train, self._idle_timeout = train, timeout_seconds
        self._results: queue.Queue[StepResult | BaseException] = queue.Queue()
        self._resumed = threading.Semaphore(0)
        self._is_running = self._continues = self._timed_out = False

    def next_epoch(self) -> StepResult:
        """Return the metrics of the next epoch, or how the training ended. Raises what the training raised."""
        if self._is_running:
            self._resumed.release()
        else:
            self._is_running, self._continues, self._timed_out = True, True, False
            self._resumed = threading.Semaphore(0)
            threading.Thread(target=self._run, name="training", daemon=True).start()
        result = self._results.get()
        if isinstance(result, Mapping):
            return result
        self._is_running = False
        if isinstance(result, BaseException):
            raise result
        return self.next_epoch() if result.status == "stopped" and self._timed_out else result

    def close(self) -> None:
        """Have the training save and end, if it is under way. Raises nothing that the training raises."""
        if not self._is_running:
            return
        self._continues = self._is_running = False
        self._resumed.release()
        while isinstance(self._results.get(), Mapping):
            pass  # an epoch that ended meanwhile

    def report(self, metrics: dict[str, float]) -> None:
        """Hand over an epoch, and wait for a request; called by the training."""
        self._results.put(dict(metrics))
        if self._continues and not self._resumed.acquire(timeout=self._idle_timeout):
            self._timed_out, self._continues = True, False

    def has_preemption_notice(self) -> bool:
        """Return False: the driver stops trials."""
        return False

    def should_continue(self) -> bool:
        """Return whether another epoch was requested; called by the training."""
        return self._continues

    def _run(self) -> None:
        try:
            self._results.put(self._train(self))
        except BaseException as error:  # raised again in the thread that requests epochs
            self._results.put(error)


def _train_with_workers(task: TrialTask, context: LauncherContext) -> Outcome:
    """Train with Ray Train: the journal reports its epochs, and a flag of the trial's own stops it.

    The workers do not wait between epochs, so a trial that is stopped may be an epoch ahead.
    """
    # The name is unique, so that a flag of an earlier launch does not stop this one.
    flag = file_io.join(task.spec.folder, f"enough-{uuid.uuid4().hex}.stop")
    done = threading.Event()
    relay = threading.Thread(target=_relay_epochs, args=(task, context, flag, done), name="trial-epochs", daemon=True)
    relay.start()
    try:
        return ray_trainer.launch_run(task.spec, flag, task.successor, task.gpus)
    finally:
        done.set()
        relay.join()


def _relay_epochs(task: TrialTask, context: LauncherContext, flag: str, done: threading.Event) -> None:
    """Report epochs as they appear in the journal, and pass on requests to stop, until `done`."""
    reported = {epoch.epoch for epoch in trial_store.read_epochs(task.spec.folder)}
    ending = False
    while not ending:
        ending = done.wait(JOURNAL_POLL_SECONDS)  # one more read after the end, for the last epoch
        try:
            epochs = trial_store.read_epochs(task.spec.folder)
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
