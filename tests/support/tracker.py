"""A tracker in memory, with MLflow's rules, that can be made to fail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.tracking.tracker import FinalStatus, MetricPoint, TrackedRun, TrackerUnreachableError


@dataclass
class RecordedRun:
    """The record of one run. Points keep their order of arrival."""

    run: TrackedRun
    status: str = "RUNNING"
    points: list[MetricPoint] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, dict[str, list[object]]] = field(default_factory=dict)
    last_steps: dict[str, int] = field(default_factory=dict)


class RecordingTracker:
    """Implements the Tracker protocol.

    down: every call raises TrackerUnreachableError. lossy: the next log_metrics() does, after it has recorded.
    """

    def __init__(self) -> None:
        self.runs: dict[str, RecordedRun] = {}
        self.down = False
        self.lossy = False
        self.calls: list[str] = []

    def check(self) -> None:
        self._call("check")

    def check_readable(self) -> None:
        self._call("look")

    def open_run(self, run: TrackedRun) -> str:
        self._call("open_run")
        run_id = f"id-{run.key}"
        recorded = self.runs.setdefault(run_id, RecordedRun(run))
        recorded.run, recorded.status = run, "RUNNING"
        recorded.tags.update(run.tags)
        return run_id

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        self._call("log")
        recorded = self.runs[run_id]
        for point in points:
            if point.step > recorded.last_steps.get(point.name, -1):
                recorded.points.append(point)
                recorded.last_steps[point.name] = point.step
        if self.lossy:
            self.lossy = False
            raise TrackerUnreachableError("the answer was lost")

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._call("set_tags")
        self.runs[run_id].tags.update(tags)

    def log_text(self, run_id: str, path: str, text: str) -> None:
        self._call("log_text")
        self.runs[run_id].texts[path] = text

    def log_file(self, run_id: str, local_path: str, artifact_folder: str = "") -> None:
        self._call("log_file")
        self.runs[run_id].files.append((local_path, artifact_folder))

    def log_table(self, run_id: str, path: str, columns: Mapping[str, Sequence[object]]) -> None:
        self._call("log_table")
        self.runs[run_id].tables[path] = {name: list(column) for name, column in columns.items()}

    def close_run(self, run_id: str, status: FinalStatus) -> None:
        self._call("close_run")
        self.runs[run_id].status = status

    def get_run_url(self, run_id: str) -> str:
        self._call("run_url")
        return f"recorded://{run_id}"

    def close_stale_runs(self, stale_seconds: float) -> list[str]:
        self._call("reap")
        return []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.down:
            raise TrackerUnreachableError("the recording tracker is down")
