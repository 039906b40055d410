"""Training that goes on only as far as it is asked to: an epoch at a time, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from orchestrator.training.job import Context, Outcome

# Nobody asks for another epoch for so long: the training saves and ends, to go on from there when somebody does. Less
# than a watchdog allows between two steps.
PATIENCE_SECONDS = 120.0

Told = Mapping[str, float] | Outcome


class Steps:
    """A training that waits after each epoch until it is asked to go on."""

    def __init__(self, train: Callable[[Context], Outcome], patience_seconds: float = PATIENCE_SECONDS) -> None:
        """train: trains the run, or what is left of it, under that context."""
        self._train, self._patience = train, patience_seconds
        self._turns: _Turns | None = None

    def next(self) -> Told:
        """The metrics of the next epoch, or how the training ended. Raises what the training raised."""
        if self._turns is None:
            self._turns = _Turns(self._train, self._patience)
        else:
            self._turns.go_on()
        told = self._turns.told.get()
        if isinstance(told, BaseException):
            self._turns = None
            raise told
        if isinstance(told, Outcome):
            lapsed, self._turns = self._turns.lapsed, None
            if told.status == "stopped" and lapsed:
                return self.next()
        return told

    def close(self) -> Outcome | None:
        """Have the training save and end; its outcome, None when none was under way. Raises nothing of the training."""
        if self._turns is None:
            return None
        turns, self._turns = self._turns, None
        turns.enough()
        told = turns.told.get()
        while not isinstance(told, Outcome | BaseException):  # an epoch ended meanwhile
            told = turns.told.get()
        return told if isinstance(told, Outcome) else None


class _Turns(Context):
    """One thread of training, and the context that it reports to."""

    def __init__(self, train: Callable[[Context], Outcome], patience: float) -> None:
        self.told: queue.Queue[Told | BaseException] = queue.Queue()
        self.lapsed = False
        self._patience = patience
        self._wanted = True
        self._go = threading.Semaphore(0)
        threading.Thread(target=self._run, args=(train,), name="training", daemon=True).start()

    def go_on(self) -> None:
        self._go.release()

    def enough(self) -> None:
        self._wanted = False
        self._go.release()

    # ------------------------------------------------------------------ called by the training
    def report(self, metrics: dict[str, float]) -> None:
        self.told.put(dict(metrics))
        if self._wanted and not self._go.acquire(timeout=self._patience):
            self.lapsed, self._wanted = True, False

    def preempted(self) -> bool:
        return False

    def wanted(self) -> bool:
        return self._wanted

    def _run(self, train: Callable[[Context], Outcome]) -> None:
        try:
            told: Told | BaseException = train(self)
        except BaseException as error:  # raised again by whoever asks
            told = error
        self.told.put(told)
