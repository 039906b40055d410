"""What the rest of the project asks of an experiment tracker, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

# MLflow's page opens on the runs and their curves instead of on its views for language models.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]


class TrackingError(RuntimeError):
    """The tracker refused something, or cannot be used as configured; the message says what to do."""


class TrackerUnreachableError(TrackingError):
    """The tracker does not answer, or answers that it is in trouble: the same call may work later."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as the tracker shall show it.

    key: identity for life, for example the run's fingerprint; the same key finds the same run again.
    name: for people. parent_id: the tracker's id of the run it is nested under.
    params: immutable configuration. tags: facts that may change.
    """

    key: str
    name: str
    parent_id: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricPoint:
    """One value of a curve. step: samples seen. time: unix seconds."""

    name: str
    value: float
    step: int
    time: float


class Tracker(Protocol):
    """An experiment tracker; used from one thread at a time.

    Every method raises TrackingError, or TrackerUnreachable where a later try may work.
    """

    def check(self) -> None:
        """Prove within about 10 seconds that runs can be recorded."""

    def check_readable(self) -> None:
        """Do of `check` what writes nothing, for a store that is there already."""

    def open_run(self, run: TrackedRun) -> str:
        """The run's id: a new run, or the one of this key set back to RUNNING."""

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        """Add points, dropping those at or below the last recorded step of their name.

        With no points it is a heartbeat.
        """

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""

    def log_text(self, run_id: str, path: str, text: str) -> None:
        """Store a text as an artifact, replacing one at the same path."""

    def log_file(self, run_id: str, local_path: str, artifact_folder: str = "") -> None:
        """Store a local file as an artifact below the folder."""

    def log_table(self, run_id: str, path: str, columns: Mapping[str, Sequence[object]]) -> None:
        """Store columns of equal length (JSON scalars) as a table, replacing an older one at that path."""

    def close_run(self, run_id: str, status: FinalStatus) -> None:
        """End a run."""

    def get_run_url(self, run_id: str) -> str:
        """What a person opens to see the run, or the command that shows it."""

    def close_stale_runs(self, stale_seconds: float) -> list[str]:
        """Close as KILLED the runs left RUNNING whose heartbeat looks older than this and stays as it is; their ids.

        A heartbeat's time is of another machine's clock, so whether it stays is what a later call finds.
        """
