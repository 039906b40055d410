r"""A tracker of one's own: one JSON file for each run, in a local folder.

    python jobs/train.py googlenet-tiny \
        --tracker.kind examples.json_tracker:JsonTracker --tracker.args '{"folder": "/tmp/tracked"}'

It runs in the driver alone. Points that it has already are dropped, so a resumed driver may send them again.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.tracking.tracker import FinalStatus, MetricPoint, TrackedRun, Tracker


class JsonTracker(Tracker):
    """Writes FOLDER/EXPERIMENT/RUN.json and the run's artifacts beside it."""

    def __init__(self, folder: str, uri: str, experiment: str) -> None:
        """folder: from `--tracker.args`. uri, experiment: `--tracking` and `--experiment`, given to every tracker."""
        self._folder = Path(folder) / experiment

    def check(self) -> None:
        """Create the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def open_run(self, run: TrackedRun) -> str:
        """Return the run's name in the folder; a known key keeps what was recorded."""
        run_id = run.key.replace("/", "_")
        record = {"name": run.name, "params": dict(run.params), "tags": {}, "metrics": {}} | self._read(run_id)
        record["tags"].update(run.tags)
        self._write(run_id, {**record, "status": "RUNNING", "parent": run.parent_id})
        return run_id

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        """Append the points that are past the last recorded step of their name."""
        record = self._read(run_id)
        for point in points:
            curve = record["metrics"].setdefault(point.name, [])
            if not curve or point.step > curve[-1][0]:
                curve.append([point.step, point.value])
        self._write(run_id, record)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        record = self._read(run_id)
        record["tags"].update(tags)
        self._write(run_id, record)

    def log_text(self, run_id: str, path: str, text: str) -> None:
        """Write a text below the run's folder."""
        file = self._folder / run_id / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def log_file(self, run_id: str, local_path: str, artifact_folder: str = "") -> None:
        """Copy a file below the run's folder."""
        folder = self._folder / run_id / artifact_folder
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(local_path, folder)

    def log_table(self, run_id: str, path: str, columns: Mapping[str, Sequence[object]]) -> None:
        """Write a table as JSON below the run's folder."""
        self.log_text(run_id, path, json.dumps({name: list(column) for name, column in columns.items()}))

    def close_run(self, run_id: str, status: FinalStatus) -> None:
        """Record the final status."""
        self._write(run_id, {**self._read(run_id), "status": status})

    def get_run_url(self, run_id: str) -> str:
        """Return the path of the run's file."""
        return str(self._folder / f"{run_id}.json")

    def _read(self, run_id: str) -> dict[str, Any]:
        file = self._folder / f"{run_id}.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def _write(self, run_id: str, record: Mapping[str, Any]) -> None:
        (self._folder / f"{run_id}.json").write_text(json.dumps(record, indent=1))
