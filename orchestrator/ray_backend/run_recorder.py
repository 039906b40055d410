"""The runs of one job in the tracker: their identity, their journals, and the status that each is closed with."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property, partial
from itertools import chain

from orchestrator.config import redaction
from orchestrator.config.fingerprint import compute_fingerprint
from orchestrator.config.overrides import flatten_config
from orchestrator.ray_backend import run_lookup
from orchestrator.ray_backend.run_spec import SPEC_FILE, RunSpec
from orchestrator.storage import commit, file_io
from orchestrator.tracking.replay import JournalReplayer
from orchestrator.tracking.tracker import FinalStatus, TrackedRun, Tracker, TrackerUnreachableError, TrackingError
from orchestrator.training.run_dir import get_journal_dir

DRAIN_SECONDS = 60.0
KILLED_DRAIN_SECONDS = 10.0
STALE_RUN_SECONDS = 600.0
_log = logging.getLogger(__name__)


class RunRecorder:
    """Records runs through a JournalReplayer, and gives each a final status."""

    def __init__(self, storage: str, dataset: str, replayer: JournalReplayer) -> None:
        """storage: URL of the job's storage. dataset: its name."""
        self.replayer = replayer
        self.final_statuses: dict[str, FinalStatus] = {}  # by tracking key, in closing order
        self._storage, self._dataset = storage, dataset
        self._open_keys: set[str] = set()
        self._drain_timed_out = False

    @cached_property
    def storage_id(self) -> str:
        """The id of the storage. Raises StorageError when it has none and none can be written."""
        return commit.ensure_storage_id(self._storage, lambda: _choose_storage_id(self._storage))

    def make_tracking_key(self, name: str, parent: str = "") -> str:
        """Return the identity of a run in the tracker: a run of the same name in another storage is another run.

        A storage keeps its id wherever it is moved and however its URL is spelled.
        """
        return f"{parent}/{name}@{self.storage_id}"

    def make_run_key(self, spec: RunSpec, parent: str | None = None) -> str:
        """Return the identity in the tracker of a training run.

        A run of this storage has one for life, whichever ensembles it is in; one of a sweep is the sweep's own.
        """
        own = spec.destination.storage == self._storage
        return self.make_tracking_key(spec.name, "" if own else parent or "")

    def record_run(self, spec: RunSpec, parent: str | None = None) -> str:
        """Record a run from its journal, nested under the run of key `parent`; return its key."""
        key = self.make_run_key(spec, parent)
        params = {path: str(value) for path, value in flatten_config(spec.recipe).items()}
        tags = spec.tags | {"orchestrator.dataset": f"{self._dataset} {spec.dataset_digest}"}
        self.replayer.follow(TrackedRun(key, spec.name, None, params, tags), get_journal_dir(spec.folder), parent)
        self._open_keys.add(key)
        for name, text in spec.artifact_texts.items():
            self.replayer.submit(partial(self._log_text, key, name, text), required_key=key)
        return key

    def record_parent_run(self, run: TrackedRun) -> None:
        """Record a run that has no journal of its own."""
        self.replayer.follow(run, None)
        self._open_keys.add(run.key)

    def set_final_status(self, key: str, status: FinalStatus) -> None:
        """Set the status with which a recorded run is closed in the end; members before their parent."""
        if key in self._open_keys:
            self.final_statuses[key] = status

    def close_run(self, key: str, status: FinalStatus, tags: Mapping[str, str]) -> None:
        """Close a recorded run as soon as its journal is in the tracker, since it has ended."""
        self.set_final_status(key, status)
        self.replayer.submit(partial(self._set_tags, key, tags), required_key=key)
        self.replayer.close(key, status).add_done_callback(partial(self._forget_closed_run, key))

    def mark_open_runs_killed(self) -> None:
        """Mark every run without a status KILLED now: there may be no time for it later."""
        for key in self._open_keys - self.final_statuses.keys():
            self.replayer.submit(partial(self._mark_killed, key), required_key=key)

    def drain(self) -> None:
        """Wait until all that the journals hold is in the tracker, for a minute at most."""
        self._drain_timed_out = not self.replayer.drain(DRAIN_SECONDS)

    def get_run_url(self, key: str) -> str:
        """Return where people see a run in the tracker, or that it is not recorded yet."""
        try:
            return self.replayer.wait_for_run_url(key, 1.0)
        except TrackingError:
            return "not recorded yet"  # the end of the job says why, if it is not recorded by then

    def close(self, interrupted: bool) -> str | None:
        """Give every run its final status: KILLED or FAILED where none was set. Return a message when some is lacking.

        interrupted: whether the job was asked to stop.
        """
        missing: FinalStatus = "KILLED" if interrupted else "FAILED"
        # Runs that were given a status keep their place: members before their parent.
        unset: Mapping[str, FinalStatus] = dict.fromkeys(sorted(self._open_keys - self.final_statuses.keys()), missing)
        seconds = KILLED_DRAIN_SECONDS if interrupted or self._drain_timed_out else DRAIN_SECONDS
        if self.replayer.stop({**self.final_statuses, **unset}, seconds):
            return None
        cause = self.replayer.first_error or f"it did not take all within {seconds:g} s"
        return (
            f"tracking: not everything is recorded: {cause} What was trained is kept in "
            f"{redaction.redact(self._storage)}: once MLflow can be used, run the same command again; it retrains "
            "nothing that is finished and records what is missing"
        )

    def _forget_closed_run(self, key: str, done: Future[None]) -> None:
        if done.exception() is None:  # else it is closed in the end
            self._open_keys.discard(key)
            self.final_statuses.pop(key, None)

    def _log_text(self, key: str, name: str, text: str, tracker: Tracker) -> None:
        tracker.log_text(self.replayer.wait_for_run_id(key, 0.0), name, text)

    def _set_tags(self, key: str, tags: Mapping[str, str], tracker: Tracker) -> None:
        tracker.set_tags(self.replayer.wait_for_run_id(key, 0.0), tags)

    def _mark_killed(self, key: str, tracker: Tracker) -> None:
        tracker.close_run(self.replayer.wait_for_run_id(key, 0.0), "KILLED")


def close_stale_runs(tracker: Tracker) -> None:
    """Close runs whose driver was killed; a live one beats every few seconds. Errors are logged: they are others' runs.

    Raises TrackerUnreachableError, to be called again.
    """
    try:
        tracker.close_stale_runs(STALE_RUN_SECONDS)
    except TrackerUnreachableError:
        raise
    except TrackingError as error:
        _log.warning("runs that earlier jobs left open stay so: %s", error)


def _choose_storage_id(storage: str) -> str:
    """Return an id for a storage that has none.

    Before there were ids, MLflow knew the runs of a storage by a hash of its URL, which their specs still name.
    """
    sweeps = (
        run_lookup.list_folders(sweep, run_lookup.MODELS)
        for sweep in run_lookup.list_folders(storage, run_lookup.SWEEPS)
    )
    for folder in chain(run_lookup.list_folders(storage, run_lookup.MODELS), *sweeps):
        destination = file_io.read_json_or_empty(file_io.join(folder, SPEC_FILE)).get("destination")
        url = destination.get("storage") if isinstance(destination, dict) else None
        if isinstance(url, str) and url:
            # A trial's is the folder of its sweep.
            return compute_fingerprint(re.sub(rf"/{run_lookup.SWEEPS}/[^/]+$", "", url))
    return uuid.uuid4().hex
