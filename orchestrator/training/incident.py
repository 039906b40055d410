"""What a failure cost: cause, seconds to notice it, to start again and to replay; and the time that counted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from orchestrator.training.attempts import Attempt, Before, Failure

LOST = "the attempt before ended without an outcome: worker or node lost, or driver gone"
UNUSABLE = "a checkpoint could not be used"
# What ranks say whose peer is gone; the cause is told by another.
_ECHOES = (
    "connection closed by peer",
    "connection reset by peer",
    "socket closed",
    "timed out waiting",
    "nccl communicator was aborted",
)


@dataclass(frozen=True)
class Incident:
    """One failure and the start after it."""

    cause: str
    attempt: int  # the one that starts
    seconds_to_detect: float | None  # from the last sign of life until the launcher noticed; None: nobody did
    seconds_to_restart: float  # from then (or from the last sign of life) until it is ready to step
    samples_replayed: int
    checkpoints_passed_over: list[str]


def incident(attempt: Attempt, samples: int, passed_over: list[str]) -> Incident | None:
    """What happened before this attempt, which begins its steps now at `samples`; None when nothing did."""
    before = attempt.before
    if before is None or (before.orderly and not passed_over):
        # A first attempt may find a checkpoint that it cannot use: of a run whose records are gone.
        return Incident(UNUSABLE, attempt.number, None, 0.0, 0, passed_over) if passed_over else None
    noticed = None if before.orderly or before.failure is None else max(before.failure.time, before.ended)
    since = attempt.began if before.orderly else noticed or before.ended
    return Incident(
        UNUSABLE if before.orderly else cause(before),
        attempt.number,
        None if noticed is None else round(noticed - before.ended, 3),
        round(max(0.0, time.time() - since), 3),
        max(0, before.samples - samples),
        passed_over,
    )


def cause(before: Before) -> str:
    """Why an attempt ended without an outcome, from the best witness there is."""
    if before.stalled:
        return before.stalled[0]
    if before.failure is not None and (told := _root(before.failure)) is not None:
        return told
    if before.last is not None and before.last.kind == "crashed":
        return f"the attempt before crashed: {before.last.values.get('cause', 'no cause is recorded')}"
    return LOST


def _root(failure: Failure) -> str | None:
    """The cause that is no echo of another rank's."""
    for rank, text in sorted(failure.causes.items()):
        if text and not any(echo in text.lower() for echo in _ECHOES):
            return f"rank {rank}: {text}" if rank.isdigit() else text
    return None


@dataclass
class Goodput:
    """Seconds that a run was under way, and those of them whose work is part of the result.

    What was trained after the checkpoint that a restart went back to was for nothing, as are the seconds until it was
    noticed and until the next attempt's first step.
    """

    attempt: Attempt
    productive_before: float = 0.0  # as the checkpoint has it
    _began: float = field(default_factory=time.monotonic)

    @property
    def productive(self) -> float:
        """Seconds of steps and validations on the way to the present state."""
        return self.productive_before + time.monotonic() - self._began

    @property
    def share(self) -> float:
        """Productive seconds of all since the first worker's first start; pauses that were asked for left out."""
        return min(1.0, self.productive / max(1e-9, self.attempt.elapsed + time.time() - self.attempt.began))
