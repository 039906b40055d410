"""Files of a run's folder in the tracker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

from orchestrator.storage import file_io
from orchestrator.tracking.tracker import Tracker


def log_run_folder(tracker: Tracker, run_id: str, folder: str, texts: Iterable[str]) -> None:
    """Store the named text files of a folder, and every picture in it, as artifacts of the run."""
    for name in texts:
        tracker.log_text(run_id, name, file_io.read_bytes(file_io.join(folder, name)).decode())
    with tempfile.TemporaryDirectory() as scratch:
        for name in sorted(name for name in file_io.list_names(folder) if name.endswith(".png")):
            path = os.path.join(scratch, name)
            with open(path, "wb") as file:
                file.write(file_io.read_bytes(file_io.join(folder, name)))
            tracker.log_file(run_id, path)
