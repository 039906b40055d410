"""Attempts at a run: each is numbered, leaves signs of life, and counts until a later one begins.

ATTEMPTS/000004.json is taken by conditional create, so no two attempts have a number in common; `000004.beat` is
overwritten while the attempt lives, `000004.resumed-SAMPLES` says where it began, `000004.stalled-rank-RRRRR.json` why
a rank ended itself, and `failed-MILLISECONDS.json` what the launcher saw of a failure.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.checkpoint import places
from orchestrator.checkpoint.places import Place
from orchestrator.storage import commit, files
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.training.job import attempts_of, checkpoints_of, journal_of

_RECORD = re.compile(r"^(\d{6})\.json$")
_RESUMED = re.compile(r"^(\d{6})\.resumed-(\d{15})$")
_STALLED = re.compile(r"^(\d{6})\.stalled-rank-\d{5}\.json$")
_FAILED = re.compile(r"^failed-(\d+)\.json$")

_FAILURES = 20  # newest records that are looked at

ORDERLY = ("finished", "stopped", "failed")  # kinds of the event that ends an attempt in order


@dataclass(frozen=True)
class Beat:
    """A sign of life of rank 0."""

    time: float  # unix seconds
    samples: int


@dataclass(frozen=True)
class Failure:
    """What the launcher saw: when, and what each rank ended with."""

    time: float  # unix seconds
    causes: Mapping[str, str]


@dataclass(frozen=True)
class Before:
    """What the attempt before left behind."""

    began: float  # unix seconds
    elapsed: float  # seconds that the run had been under way when it began
    last: Event | None = None
    beat: Beat | None = None
    failure: Failure | None = None
    stalled: tuple[str, ...] = ()  # why ranks ended themselves

    @property
    def orderly(self) -> bool:
        """Whether it ended with an outcome."""
        return self.last is not None and self.last.kind in ORDERLY

    @property
    def ended(self) -> float:
        """Its last sign of life, in unix seconds."""
        signs = [one.time for one in (self.last, self.beat) if one is not None]
        return max([self.began, *signs])

    @property
    def samples(self) -> int:
        """The farthest that it is known to have come."""
        return max((self.last.samples or 0) if self.last else 0, self.beat.samples if self.beat else 0)


@dataclass(frozen=True)
class Attempt:
    """One attempt, this process's own."""

    folder: str  # URL of the run's attempts
    number: int
    began: float  # unix seconds
    elapsed: float = 0.0  # seconds that the run had been under way before, what failures cost included
    before: Before | None = None

    def superseded(self) -> bool:
        """Whether a later attempt has begun: then nothing that this one writes counts any more."""
        return files.exists(files.join(self.folder, f"{self.number + 1:06d}.json"))

    def beat(self, samples: int) -> None:
        """Leave a sign of life."""
        about = json.dumps({"time": time.time(), "samples": samples})
        files.write_bytes(files.join(self.folder, f"{self.number:06d}.beat"), about.encode())

    def resumed(self, samples: int) -> None:
        """Say where this attempt begins: what earlier ones have beyond it is void from now on."""
        files.write_bytes(files.join(self.folder, f"{self.number:06d}.resumed-{samples:015d}"), b"")

    def stalled(self, rank: int, cause: str) -> None:
        """Say why this rank ends itself."""
        name = f"{self.number:06d}.stalled-rank-{rank:05d}.json"
        files.write_bytes(files.join(self.folder, name), json.dumps({"time": time.time(), "cause": cause}).encode())


def take(folder: str, workers: int) -> Attempt:
    """The next attempt at the run in `folder`, with what the one before left behind."""
    attempts = attempts_of(folder)
    names = files.list_names(attempts)
    numbers = [int(match[1]) for name in names if (match := _RECORD.match(name))]
    number = max(numbers, default=0) + 1
    while True:
        before = _before(folder, attempts, number - 1, names) if number > 1 else None
        began = time.time()
        elapsed = 0.0
        if before is not None:
            elapsed = before.elapsed + (before.ended if before.orderly else began) - before.began
        about = json.dumps({"workers": workers, "time": began, "elapsed": elapsed})
        if files.create_bytes(files.join(attempts, f"{number:06d}.json"), about.encode()):
            return Attempt(attempts, number, began, elapsed, before)
        number, names = number + 1, files.list_names(attempts)


def newest(folder: str) -> tuple[int, Before] | None:
    """The number of the last attempt at the run in `folder` and what there is of it so far; None without any."""
    attempts = attempts_of(folder)
    names = files.list_names(attempts)
    number = max((int(match[1]) for name in names if (match := _RECORD.match(name))), default=0)
    return (number, _before(folder, attempts, number, names)) if number else None


def void(folder: str) -> Callable[[Place], str | None]:
    """Tells why a checkpoint of the run in `folder` does not count, None when it does.

    It does not when a later attempt than its own began at an earlier place: then its writer was cut off, or suspended,
    and came back after another had taken over; or it was damaged when that one began.
    """
    found = [match for name in files.list_names(attempts_of(folder)) if (match := _RESUMED.match(name))]
    begun = [(int(match[1]), int(match[2])) for match in found]

    def reason(place: Place) -> str | None:
        for number, samples in begun:
            if number > place.attempt and samples < place.samples:
                return f"void, since attempt {number} went on from {samples} samples"
        return None

    return reason


def committed(folder: str) -> list[Place]:
    """Return the committed checkpoints of the run in `folder` that count as far as is known, newest first."""
    is_void = void(folder)
    return [place for place in places.committed(checkpoints_of(folder)) if is_void(place) is None]


def has_progressed(folder: str, before: Sequence[Place]) -> bool:
    """Return whether the run has a good checkpoint that is farther than what `before`, its earlier ones, was worth.

    A checkpoint that an attempt passed over since then, because it could not be loaded, was worth nothing.
    """
    is_void = void(folder)
    reached = max((place.samples for place in before if is_void(place) is None), default=-1)
    return any(_is_whole(place) for place in committed(folder) if place.samples > reached)


def _is_whole(place: Place) -> bool:
    try:
        commit.read(place.url)
    except (commit.CommitError, FileNotFoundError):
        return False
    return True


def _before(folder: str, attempts: str, number: int, names: list[str]) -> Before:
    record = files.read_record(files.join(attempts, f"{number:06d}.json"))
    began = _number(record.get("time"))
    attempt, last = journal.last(journal_of(folder)) or (0, None)
    beat = files.read_record(files.join(attempts, f"{number:06d}.beat"))
    stalled = [name for name in sorted(names) if (match := _STALLED.match(name)) and int(match[1]) == number]
    causes = [str(files.read_record(files.join(attempts, name)).get("cause", "stalled")) for name in stalled]
    return Before(
        began=began,
        elapsed=_number(record.get("elapsed")),
        last=last if attempt == number else None,
        beat=Beat(_number(beat["time"]), int(_number(beat.get("samples")))) if "time" in beat else None,
        failure=_failure(attempts, number, began, names),
        stalled=tuple(causes),
    )


def latest(folder: str) -> int:
    """The number of the newest attempt at the run in `folder`; 0 when there is none."""
    names = files.list_names(attempts_of(folder))
    return max((int(match[1]) for name in names if (match := _RECORD.match(name))), default=0)


def _failure(attempts: str, number: int, since: float, names: list[str]) -> Failure | None:
    """The launcher's first word of this attempt's failure; of one since then where it does not say whose."""
    moments = sorted(int(match[1]) for name in names if (match := _FAILED.match(name)))
    for moment in moments[-_FAILURES:]:
        found = files.read_record(files.join(attempts, f"failed-{moment}.json"))
        if found.get("attempt") == number or ("attempt" not in found and moment / 1000 >= since):
            causes = found.get("causes")
            told = {str(rank): str(text) for rank, text in causes.items()} if isinstance(causes, dict) else {}
            return Failure(moment / 1000, told)
    return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
