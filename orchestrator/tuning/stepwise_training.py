"""Training that pauses after each epoch until the next one is requested, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from orchestrator.training.config import LauncherContext, Outcome

# After so long without a request the training saves and ends; the next request resumes it. Less than a watchdog allows
# between two steps.
IDLE_TIMEOUT_SECONDS = 120.0

StepResult = Mapping[str, float] | Outcome


class StepwiseTraining:
    """A training that waits after each epoch for a request."""

    def __init__(
        self, train: Callable[[LauncherContext], Outcome], timeout_seconds: float = IDLE_TIMEOUT_SECONDS
    ) -> None:
        """Prepare a training; `train` trains the run, or what is left of it, under the context that it is given."""
        self._train, self._idle_timeout = train, timeout_seconds
        self._thread: _TrainingThread | None = None

    def next_epoch(self) -> StepResult:
        """Return the metrics of the next epoch, or how the training ended. Raises what the training raised."""
        if self._thread is None:
            self._thread = _TrainingThread(self._train, self._idle_timeout)
        else:
            self._thread.resume()
        result = self._thread.results.get()
        if isinstance(result, BaseException):
            self._thread = None
            raise result
        if isinstance(result, Outcome):
            timed_out, self._thread = self._thread.timed_out, None
            if result.status == "stopped" and timed_out:
                return self.next_epoch()
        return result

    def close(self) -> None:
        """Have the training save and end, if it is under way. Raises nothing that the training raises."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        thread.request_stop()
        while not isinstance(thread.results.get(), Outcome | BaseException):
            pass  # an epoch that ended meanwhile


class _TrainingThread(LauncherContext):
    """One thread of training, and the context that it reports to."""

    def __init__(self, train: Callable[[LauncherContext], Outcome], timeout: float) -> None:
        self.results: queue.Queue[StepResult | BaseException] = queue.Queue()
        self.timed_out = False
        self._idle_timeout = timeout
        self._continues = True
        self._resumed = threading.Semaphore(0)
        threading.Thread(target=self._run, args=(train,), name="training", daemon=True).start()

    def resume(self) -> None:
        self._resumed.release()

    def request_stop(self) -> None:
        self._continues = False
        self._resumed.release()

    # ------------------------------------------------------------------ called by the training
    def report(self, metrics: dict[str, float]) -> None:
        self.results.put(dict(metrics))
        if self._continues and not self._resumed.acquire(timeout=self._idle_timeout):
            self.timed_out, self._continues = True, False

    def has_preemption_notice(self) -> bool:
        return False

    def should_continue(self) -> bool:
        return self._continues

    def _run(self, train: Callable[[LauncherContext], Outcome]) -> None:
        try:
            result: StepResult | BaseException = train(self)
        except BaseException as error:  # raised again in the thread that requests epochs
            result = error
        self.results.put(result)
