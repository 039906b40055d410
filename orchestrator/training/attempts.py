"""Attempts at a run, and incidents between them: each attempt is numbered and counts until a later one begins.

ATTEMPTS/000004.json is created conditionally, so that no two attempts share a number. `000004.beat` is its heartbeat,
`000004.resumed-SAMPLES` says where it began, `000004.stalled-rank-RRRRR.json` why a rank ended itself, and
`failed-MILLISECONDS.json` how the launcher saw a failure.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.checkpoint_dir import CheckpointFolder
from orchestrator.storage import commit, file_io
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.training.run_dir import get_attempts_dir, get_checkpoints_dir, get_journal_dir

_ATTEMPT_FILE = re.compile(r"^(\d{6})\.json$")
_RESUMED_FILE = re.compile(r"^(\d{6})\.resumed-(\d{15})$")
_STALLED_FILE = re.compile(r"^(\d{6})\.stalled-rank-\d{5}\.json$")
_FAILED_FILE = re.compile(r"^failed-(\d+)\.json$")

_MAX_FAILURE_RECORDS = 20  # newest records that are read

CLEAN_END_EVENTS = ("finished", "stopped", "failed")  # kinds of the event that ends an attempt in order


@dataclass(frozen=True)
class PreviousAttempt:
    """The records of the attempt before."""

    start_time: float  # unix seconds
    elapsed_seconds: float  # seconds that the run had taken when it began
    last_event: Event | None = None  # of the journal
    heartbeat: Event | None = None  # the newest of rank 0
    failure: Event | None = None  # as the launcher saw it; values: the error of each rank
    stall_causes: tuple[str, ...] = ()  # why ranks ended themselves

    @property
    def ended_cleanly(self) -> bool:
        """True when it ended with an outcome."""
        return self.last_event is not None and self.last_event.kind in CLEAN_END_EVENTS

    @property
    def last_seen(self) -> float:
        """Its last heartbeat or event, in unix seconds."""
        return max([self.start_time, *(sign.time for sign in (self.last_event, self.heartbeat) if sign)])

    @property
    def samples(self) -> int:
        """The largest number of samples that it is known to have trained."""
        return max((sign.samples or 0 for sign in (self.last_event, self.heartbeat) if sign), default=0)


@dataclass(frozen=True)
class Attempt:
    """This process's attempt."""

    folder: str  # URL of the run's attempts
    number: int
    start_time: float  # unix seconds
    elapsed_seconds: float = 0.0  # seconds that earlier attempts took, failures included
    previous: PreviousAttempt | None = None

    def is_superseded(self) -> bool:
        """Return whether a later attempt has begun: then nothing that this one writes counts."""
        return file_io.exists(file_io.join(self.folder, f"{self.number + 1:06d}.json"))

    def write_heartbeat(self, samples: int) -> None:
        """Overwrite the heartbeat."""
        self._write("beat", {"time": time.time(), "samples": samples})

    def record_resume(self, samples: int) -> None:
        """Record where this attempt begins: checkpoints of earlier ones beyond it are void from now on."""
        file_io.write_bytes(file_io.join(self.folder, f"{self.number:06d}.resumed-{samples:015d}"), b"")

    def record_stall(self, rank: int, cause: str) -> None:
        """Record why this rank ends itself."""
        self._write(f"stalled-rank-{rank:05d}.json", {"time": time.time(), "cause": cause})

    def _write(self, suffix: str, record: dict[str, object]) -> None:
        file_io.write_bytes(file_io.join(self.folder, f"{self.number:06d}.{suffix}"), json.dumps(record).encode())


def create_attempt(folder: str, workers: int) -> Attempt:
    """Create the next attempt at the run in `folder`, with the records of the one before."""
    attempts, number = get_attempts_dir(folder), find_latest_number(folder) + 1
    while True:
        before = _load_previous_attempt(folder, number - 1) if number > 1 else None
        began, elapsed = time.time(), 0.0
        if before is not None:
            elapsed = before.elapsed_seconds + (before.last_seen if before.ended_cleanly else began) - before.start_time
        record = json.dumps({"workers": workers, "time": began, "elapsed": elapsed})
        if file_io.create_bytes(file_io.join(attempts, f"{number:06d}.json"), record.encode()):
            return Attempt(attempts, number, began, elapsed, before)
        number += 1


def load_latest_attempt(folder: str) -> tuple[int, PreviousAttempt] | None:
    """Return the number of the newest attempt at the run in `folder` and its records; None when there is none."""
    number = find_latest_number(folder)
    return (number, _load_previous_attempt(folder, number)) if number else None


def load_stale_checkpoint_check(folder: str) -> Callable[[CheckpointFolder], str | None]:
    """Return a function that returns why a checkpoint of the run in `folder` is void, None when it is valid.

    It is void when a later attempt than its own began with fewer samples: its writer was cut off or suspended, and
    returned after another attempt had begun; or the checkpoint was damaged when that attempt began.
    """
    starts = [(int(match[1]), int(match[2])) for match in _match_names(_RESUMED_FILE, folder)]

    def find_reason(place: CheckpointFolder) -> str | None:
        for number, samples in starts:
            if number > place.attempt and samples < place.samples:
                return f"void, since attempt {number} resumed from {samples} samples"
        return None

    return find_reason


def list_valid_checkpoints(folder: str) -> list[CheckpointFolder]:
    """Return the committed checkpoints of the run in `folder` that are not void, newest first."""
    is_void = load_stale_checkpoint_check(folder)
    places = checkpoint_dir.iter_committed_checkpoints(get_checkpoints_dir(folder))
    return [place for place in places if is_void(place) is None]


def has_progressed(folder: str, before: Sequence[CheckpointFolder]) -> bool:
    """Return whether the run has a complete checkpoint with more samples than the valid ones of `before`."""
    is_void = load_stale_checkpoint_check(folder)
    reached = max((place.samples for place in before if is_void(place) is None), default=-1)
    for place in list_valid_checkpoints(folder):
        if place.samples > reached:
            with suppress(commit.CommitError, FileNotFoundError):
                commit.read_folder(place.url)
                return True
    return False


def _load_previous_attempt(folder: str, number: int) -> PreviousAttempt:
    def read(name: str) -> dict[str, Any]:
        return file_io.read_json_or_empty(file_io.join(get_attempts_dir(folder), name))

    record, beat = read(f"{number:06d}.json"), read(f"{number:06d}.beat")
    began = _to_float(record.get("time"))
    attempt, last = journal.read_last_event(get_journal_dir(folder)) or (0, None)
    heartbeat = (
        Event("heartbeat", _to_float(beat["time"]), int(_to_float(beat.get("samples")))) if "time" in beat else None
    )
    stalled = [match[0] for match in _match_names(_STALLED_FILE, folder) if int(match[1]) == number]
    failure = None
    for moment in sorted(int(match[1]) for match in _match_names(_FAILED_FILE, folder))[-_MAX_FAILURE_RECORDS:]:
        failed = read(f"failed-{moment}.json")
        # A record without a number must be later than the attempt's start.
        if failed.get("attempt") == number or ("attempt" not in failed and moment / 1000 >= began):
            causes = failed.get("causes")
            failure = Event("failure", moment / 1000, values=causes if isinstance(causes, dict) else {})
            break
    return PreviousAttempt(
        start_time=began,
        elapsed_seconds=_to_float(record.get("elapsed")),
        last_event=last if attempt == number else None,
        heartbeat=heartbeat,
        failure=failure,
        stall_causes=tuple(str(read(name).get("cause", "stalled")) for name in sorted(stalled)),
    )


def find_latest_number(folder: str) -> int:
    """Return the number of the newest attempt at the run in `folder`; 0 when there is none."""
    return max((int(match[1]) for match in _match_names(_ATTEMPT_FILE, folder)), default=0)


def _match_names(pattern: re.Pattern[str], folder: str) -> list[re.Match[str]]:
    return [match for name in file_io.list_names(get_attempts_dir(folder)) if (match := pattern.match(name))]


def _to_float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


WORKER_LOST_CAUSE = "the attempt before ended without an outcome: worker or node lost, or driver gone"
CHECKPOINT_UNUSABLE_CAUSE = "a checkpoint could not be used"
# Errors of ranks that lost their peer; another rank knows the cause.
_PEER_ERRORS = re.compile(
    "(?i)connection (closed|reset) by peer|socket closed|timed out waiting|communicator was abort"
)


@dataclass(frozen=True)
class Incident:
    """One failure and the start after it."""

    cause: str
    attempt: int  # the one that starts
    seconds_to_detect: float | None  # from the last sign of life until the launcher noticed; None: it did not
    seconds_to_restart: float  # from then (or from the last sign of life) until it is ready to step
    samples_replayed: int
    checkpoints_passed_over: list[str]


def build_incident(attempt: Attempt, samples: int, passed_over: list[str]) -> Incident | None:
    """Return the failure before this attempt, which begins its steps now at `samples`; None when there was none."""
    before = attempt.previous
    if before is None or (before.ended_cleanly and not passed_over):
        # A first attempt may find an unusable checkpoint of a run whose attempt records are lost.
        return Incident(CHECKPOINT_UNUSABLE_CAUSE, attempt.number, None, 0.0, 0, passed_over) if passed_over else None
    noticed = None if before.ended_cleanly or before.failure is None else max(before.failure.time, before.last_seen)
    since = attempt.start_time if before.ended_cleanly else noticed or before.last_seen
    return Incident(
        CHECKPOINT_UNUSABLE_CAUSE if before.ended_cleanly else find_failure_cause(before),
        attempt.number,
        None if noticed is None else round(noticed - before.last_seen, 3),
        round(max(0.0, time.time() - since), 3),
        max(0, before.samples - samples),
        passed_over,
    )


def find_failure_cause(before: PreviousAttempt) -> str:
    """Return why an attempt ended without an outcome, from the most reliable record there is."""
    if before.stall_causes:
        return before.stall_causes[0]
    for rank, cause in sorted(before.failure.values.items()) if before.failure is not None else ():
        if (text := str(cause)) and not _PEER_ERRORS.search(text):
            return f"rank {rank}: {text}" if rank.isdigit() else text
    if before.last_event is not None and before.last_event.kind == "crashed":
        return f"the attempt before crashed: {before.last_event.values.get('cause', 'no cause is recorded')}"
    return WORKER_LOST_CAUSE


@dataclass
class Goodput:
    """Seconds that a run took, and those whose work is part of the result: neither replayed nor spent on failures."""

    attempt: Attempt
    productive_seconds_before: float = 0.0  # as the checkpoint has it
    _began: float = field(default_factory=time.monotonic)

    @property
    def productive_seconds(self) -> float:
        """Seconds of steps and validations that led to the present state."""
        return self.productive_seconds_before + time.monotonic() - self._began

    @property
    def productive_share(self) -> float:
        """Share of productive seconds since the run's first start; requested pauses do not count."""
        elapsed = self.attempt.elapsed_seconds + time.time() - self.attempt.start_time
        return min(1.0, self.productive_seconds / max(1e-9, elapsed))
