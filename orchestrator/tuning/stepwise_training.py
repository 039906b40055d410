"""Training that goes on only as far as it is asked to: an epoch at a time, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from orchestrator.training.config import LauncherContext, Outcome

# Nobody asks for another epoch for so long: the training saves and ends, to go on from there when somebody does. Less
# than a watchdog allows between two steps.
IDLE_TIMEOUT_SECONDS = 120.0

StepResult = Mapping[str, float] | Outcome


class StepwiseTraining:
    """A training that waits after each epoch until it is asked to go on."""

    def __init__(
        self, train: Callable[[LauncherContext], Outcome], patience_seconds: float = IDLE_TIMEOUT_SECONDS
    ) -> None:
        """train: trains the run, or what is left of it, under that context."""
        self._train, self._idle_timeout = train, patience_seconds
        self._thread: _TrainingThread | None = None

    def next_epoch(self) -> StepResult:
        """The metrics of the next epoch, or how the training ended. Raises what the training raised."""
        if self._thread is None:
            self._thread = _TrainingThread(self._train, self._idle_timeout)
        else:
            self._thread.resume()
        told = self._thread.results.get()
        if isinstance(told, BaseException):
            self._thread = None
            raise told
        if isinstance(told, Outcome):
            lapsed, self._thread = self._thread.timed_out, None
            if told.status == "stopped" and lapsed:
                return self.next_epoch()
        return told

    def close(self) -> Outcome | None:
        """Have the training save and end; its outcome, None when none was under way. Raises nothing of the training."""
        if self._thread is None:
            return None
        turns, self._thread = self._thread, None
        turns.request_stop()
        told = turns.results.get()
        while not isinstance(told, Outcome | BaseException):  # an epoch ended meanwhile
            told = turns.results.get()
        return told if isinstance(told, Outcome) else None


class _TrainingThread(LauncherContext):
    """One thread of training, and the context that it reports to."""

    def __init__(self, train: Callable[[LauncherContext], Outcome], patience: float) -> None:
        self.results: queue.Queue[StepResult | BaseException] = queue.Queue()
        self.timed_out = False
        self._idle_timeout = patience
        self._wanted = True
        self._resumed = threading.Semaphore(0)
        threading.Thread(target=self._run, args=(train,), name="training", daemon=True).start()

    def resume(self) -> None:
        self._resumed.release()

    def request_stop(self) -> None:
        self._wanted = False
        self._resumed.release()

    # ------------------------------------------------------------------ called by the training
    def report(self, metrics: dict[str, float]) -> None:
        self.results.put(dict(metrics))
        if self._wanted and not self._resumed.acquire(timeout=self._idle_timeout):
            self.timed_out, self._wanted = True, False

    def has_preemption_notice(self) -> bool:
        return False

    def should_continue(self) -> bool:
        return self._wanted

    def _run(self, train: Callable[[LauncherContext], Outcome]) -> None:
        try:
            told: StepResult | BaseException = train(self)
        except BaseException as error:  # raised again by whoever asks
            told = error
        self.results.put(told)
