"""Attempts at a run, and incidents between them: each attempt is numbered and counts until a later one begins.

ATTEMPTS/000004.json is created conditionally, so that no two attempts share a number. `000004.beat` is its heartbeat,
`000004.resumed-SAMPLES` says where it began, `000004.stalled-rank-RRRRR.json` why a rank ended itself, and
`failed-MILLISECONDS.json` how the launcher saw a failure.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
class Heartbeat:
    """The newest heartbeat of rank 0."""

    time: float  # unix seconds
    samples: int


@dataclass(frozen=True)
class FailureRecord:
    """A failure as the launcher saw it: when, and the error of each rank."""

    time: float  # unix seconds
    causes: Mapping[str, str]


@dataclass(frozen=True)
class PreviousAttempt:
    """The records of the attempt before."""

    start_time: float  # unix seconds
    elapsed_seconds: float  # seconds that the run had taken when it began
    last_event: Event | None = None
    heartbeat: Heartbeat | None = None
    failure: FailureRecord | None = None
    stall_causes: tuple[str, ...] = ()  # why ranks ended themselves

    @property
    def ended_cleanly(self) -> bool:
        """True when it ended with an outcome."""
        return self.last_event is not None and self.last_event.kind in CLEAN_END_EVENTS

    @property
    def last_seen(self) -> float:
        """Its last heartbeat or event, in unix seconds."""
        times = [record.time for record in (self.last_event, self.heartbeat) if record is not None]
        return max([self.start_time, *times])

    @property
    def samples(self) -> int:
        """The largest number of samples that it is known to have trained."""
        return max(
            (record.samples or 0 for record in (self.last_event, self.heartbeat) if record is not None), default=0
        )


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
    attempts = get_attempts_dir(folder)
    names = file_io.list_names(attempts)
    number = _find_newest(names) + 1
    while True:
        before = _load_previous_attempt(folder, attempts, number - 1, names) if number > 1 else None
        began = time.time()
        elapsed = 0.0
        if before is not None:
            elapsed = before.elapsed_seconds + (before.last_seen if before.ended_cleanly else began) - before.start_time
        record = json.dumps({"workers": workers, "time": began, "elapsed": elapsed})
        if file_io.create_bytes(file_io.join(attempts, f"{number:06d}.json"), record.encode()):
            return Attempt(attempts, number, began, elapsed, before)
        number, names = number + 1, file_io.list_names(attempts)


def load_latest_attempt(folder: str) -> tuple[int, PreviousAttempt] | None:
    """Return the number of the newest attempt at the run in `folder` and its records; None when there is none."""
    attempts = get_attempts_dir(folder)
    names = file_io.list_names(attempts)
    number = _find_newest(names)
    return (number, _load_previous_attempt(folder, attempts, number, names)) if number else None


def load_stale_checkpoint_check(folder: str) -> Callable[[CheckpointFolder], str | None]:
    """Return a function that returns why a checkpoint of the run in `folder` is void, None when it is valid.

    It is void when a later attempt than its own began with fewer samples: its writer was cut off or suspended, and
    returned after another attempt had begun; or the checkpoint was damaged when that attempt began.
    """
    names = file_io.list_names(get_attempts_dir(folder))
    starts = [(int(match[1]), int(match[2])) for name in names if (match := _RESUMED_FILE.match(name))]

    def find_reason(place: CheckpointFolder) -> str | None:
        for number, samples in starts:
            if number > place.attempt and samples < place.samples:
                return f"void, since attempt {number} resumed from {samples} samples"
        return None

    return find_reason


def list_valid_checkpoints(folder: str) -> list[CheckpointFolder]:
    """Return the committed checkpoints of the run in `folder` that are not void, newest first."""
    is_void = load_stale_checkpoint_check(folder)
    return [
        place
        for place in checkpoint_dir.iter_committed_checkpoints(get_checkpoints_dir(folder))
        if is_void(place) is None
    ]


def has_progressed(folder: str, before: Sequence[CheckpointFolder]) -> bool:
    """Return whether the run has a complete checkpoint with more samples than the valid ones of `before`.

    A checkpoint of `before` that an attempt has skipped since, because it could not be loaded, does not count.
    """
    is_void = load_stale_checkpoint_check(folder)
    reached = max((place.samples for place in before if is_void(place) is None), default=-1)
    return any(_is_complete(place) for place in list_valid_checkpoints(folder) if place.samples > reached)


def _is_complete(place: CheckpointFolder) -> bool:
    try:
        commit.read_folder(place.url)
    except (commit.CommitError, FileNotFoundError):
        return False
    return True


def _load_previous_attempt(folder: str, attempts: str, number: int, names: list[str]) -> PreviousAttempt:
    record = file_io.read_json_or_empty(file_io.join(attempts, f"{number:06d}.json"))
    began = _to_float(record.get("time"))
    attempt, last = journal.read_last_event(get_journal_dir(folder)) or (0, None)
    beat = file_io.read_json_or_empty(file_io.join(attempts, f"{number:06d}.beat"))
    stalled = [name for name in sorted(names) if (match := _STALLED_FILE.match(name)) and int(match[1]) == number]
    causes = [str(file_io.read_json_or_empty(file_io.join(attempts, name)).get("cause", "stalled")) for name in stalled]
    return PreviousAttempt(
        start_time=began,
        elapsed_seconds=_to_float(record.get("elapsed")),
        last_event=last if attempt == number else None,
        heartbeat=Heartbeat(_to_float(beat["time"]), int(_to_float(beat.get("samples")))) if "time" in beat else None,
        failure=_find_failure(attempts, number, began, names),
        stall_causes=tuple(causes),
    )


def find_latest_number(folder: str) -> int:
    """Return the number of the newest attempt at the run in `folder`; 0 when there is none."""
    return _find_newest(file_io.list_names(get_attempts_dir(folder)))


def _find_newest(names: list[str]) -> int:
    return max((int(match[1]) for name in names if (match := _ATTEMPT_FILE.match(name))), default=0)


def _find_failure(attempts: str, number: int, since: float, names: list[str]) -> FailureRecord | None:
    """Return the launcher's first record of this attempt's failure; one without a number must be later than `since`."""
    moments = sorted(int(match[1]) for name in names if (match := _FAILED_FILE.match(name)))
    for moment in moments[-_MAX_FAILURE_RECORDS:]:
        record = file_io.read_json_or_empty(file_io.join(attempts, f"failed-{moment}.json"))
        if record.get("attempt") == number or ("attempt" not in record and moment / 1000 >= since):
            causes = record.get("causes")
            items = causes.items() if isinstance(causes, dict) else ()
            return FailureRecord(moment / 1000, {str(rank): str(text) for rank, text in items})
    return None


def _to_float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


WORKER_LOST_CAUSE = "the attempt before ended without an outcome: worker or node lost, or driver gone"
CHECKPOINT_UNUSABLE_CAUSE = "a checkpoint could not be used"
# Errors of ranks that lost their peer; another rank knows the cause.
_PEER_ERRORS = (
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
    if before.failure is not None and (cause := _find_root_cause(before.failure)) is not None:
        return cause
    if before.last_event is not None and before.last_event.kind == "crashed":
        return f"the attempt before crashed: {before.last_event.values.get('cause', 'no cause is recorded')}"
    return WORKER_LOST_CAUSE


def _find_root_cause(failure: FailureRecord) -> str | None:
    """Return the first cause that does not merely report a lost peer."""
    for rank, text in sorted(failure.causes.items()):
        if text and not any(error in text.lower() for error in _PEER_ERRORS):
            return f"rank {rank}: {text}" if rank.isdigit() else text
    return None


@dataclass
class Goodput:
    """Seconds that a run took, and those of them whose work is part of the result.

    Lost are the steps after the checkpoint that a restart resumed from, and the seconds until the failure was noticed
    and until the next attempt's first step.
    """

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
