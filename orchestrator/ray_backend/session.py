"""What every job needs around its work: places, preflight, cluster, tracking, signals, leases."""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain

import ray
from rich.console import Console

from orchestrator.config import redaction
from orchestrator.config.fingerprint import compute_fingerprint
from orchestrator.config.overrides import flatten_config
from orchestrator.data.manifest import Manifest
from orchestrator.ray_backend import cluster, lease, preflight, run_lookup, signals
from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.launch_errors import NotRecordedError, PreflightError
from orchestrator.ray_backend.lease import Lease
from orchestrator.ray_backend.previews import PreviewRequest
from orchestrator.ray_backend.ray_env import get_submission_id
from orchestrator.ray_backend.ray_trainer import launch_run
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, SPEC_FILE, Destination, Placement, RunSpec
from orchestrator.ray_backend.signals import Interruption
from orchestrator.storage import file_io, storage_id
from orchestrator.tracking import connect
from orchestrator.tracking.replay import JournalReplayer
from orchestrator.tracking.tracker import FinalStatus, TrackedRun, Tracker, TrackerUnreachableError, TrackingError
from orchestrator.training.config import Outcome
from orchestrator.training.run_dir import get_journal_dir

_log = logging.getLogger(__name__)
STOP_FLAG_POLL_SECONDS = 2.0
TRACKER_DRAIN_SECONDS = 60.0
# Longer than a checkpoint takes to be written.
STOP_TIMEOUT_SECONDS = 120.0
STALE_RUN_SECONDS = 600.0
KILLED_DRAIN_SECONDS = 10.0


@dataclass
class Session:
    """An open connection to everything; made by `opened`."""

    destination: Destination
    placement: Placement
    manifest: Manifest
    capacity: ClusterCapacity
    gpus: float  # of each worker
    replayer: JournalReplayer
    interruption: Interruption
    console: Console
    final_statuses: dict[str, FinalStatus] = field(default_factory=dict)  # by tracking key, in closing order
    _open_run_keys: set[str] = field(default_factory=set)
    _session_closed: threading.Event = field(default_factory=threading.Event)
    _drain_timed_out: bool = False  # in vain, for all there is to record

    def print_line(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, highlight=False, markup=False)

    def print_locations(self, folder: str, key: str) -> str:
        """Print where the results are; return the URL of the run's page in MLflow."""
        if not self.interruption.event.is_set():  # then there may be no time for it
            self._drain_timed_out = not self.replayer.drain(TRACKER_DRAIN_SECONDS)
        try:
            where = self.replayer.wait_for_run_url(key, 1.0)
        except TrackingError:
            where = "not recorded yet"  # the session's end says why, unless it is by then
        self.print_line(f"results: {redaction.redact(folder)}")
        self.print_line(f"MLflow:  {where}")
        return where

    def make_tracking_key(self, name: str, parent: str = "") -> str:
        """Identity of a run in the tracker: a run of the same name in another storage is another run.

        A storage keeps its id wherever it is moved and however its place is spelt.
        """
        return f"{parent}/{name}@{self.storage_id}"

    @cached_property
    def storage_id(self) -> str:
        """The id of the storage. Raises StorageError when it has none and none can be written."""
        storage = self.destination.storage
        return storage_id.ensure_id(storage, lambda: _choose_storage_id(storage))

    def make_run_key(self, spec: RunSpec, parent: str | None = None) -> str:
        """Return the identity in the tracker of a training run.

        A run of this storage has one for life, whichever ensembles it is in; one of a sweep is the sweep's own.
        """
        own = spec.destination.storage == self.destination.storage
        return self.make_tracking_key(spec.name, "" if own else parent or "")

    def record_run(self, spec: RunSpec, parent: str | None = None) -> str:
        """Record a run from its journal, nested under the run of key `parent`; its key."""
        key = self.make_run_key(spec, parent)
        params = {path: str(value) for path, value in flatten_config(spec.recipe).items()}
        tags = spec.tags | {"orchestrator.dataset": f"{self.manifest.name} {spec.dataset_digest}"}
        self.replayer.follow(TrackedRun(key, spec.name, None, params, tags), get_journal_dir(spec.folder), parent)
        self._open_run_keys.add(key)
        for name, text in spec.artifact_texts.items():
            self.replayer.submit(partial(self._log_text, key, name, text), required_key=key)
        return key

    def _log_text(self, key: str, name: str, text: str, tracker: Tracker) -> None:
        tracker.log_text(self.replayer.wait_for_run_id(key, 0.0), name, text)

    def record_parent_run(self, run: TrackedRun) -> None:
        """Record a run that has no journal of its own."""
        self.replayer.follow(run, None)
        self._open_run_keys.add(run.key)

    def close_run(self, key: str, status: FinalStatus, tags: Mapping[str, str]) -> None:
        """Close a run that this session opened, as soon as its journal is in the tracker: nothing more comes of it."""
        self.set_final_status(key, status)
        self.replayer.submit(partial(self._set_tags, key, tags), required_key=key)
        self.replayer.close(key, status).add_done_callback(partial(self._forget_closed_run, key))

    def _forget_closed_run(self, key: str, done: Future[None]) -> None:
        if done.exception() is None:  # else it is closed with the session
            self._open_run_keys.discard(key)
            self.final_statuses.pop(key, None)

    def _set_tags(self, key: str, tags: Mapping[str, str], tracker: Tracker) -> None:
        tracker.set_tags(self.replayer.wait_for_run_id(key, 0.0), tags)

    def set_final_status(self, key: str, status: FinalStatus) -> None:
        """The status with which the session will close a run that it opened; members before their parent."""
        if key in self._open_run_keys:
            self.final_statuses[key] = status

    def mark_open_runs_killed(self) -> None:
        """Mark every run without a status KILLED now: there may be no time for it later."""
        for key in self._open_run_keys - self.final_statuses.keys():
            self.replayer.submit(partial(self._mark_killed, key), required_key=key)

    def _mark_killed(self, key: str, tracker: Tracker) -> None:
        tracker.close_run(self.replayer.wait_for_run_id(key, 0.0), "KILLED")

    @contextmanager
    def hold_lease(self, folder: str) -> Iterator[Lease]:
        """The lease on a run's folder; its stop flag, or a signal, stops this session's work.

        Raises LeaseHeldError when another driver runs it.
        """
        held = lease.acquire_lease(folder)
        self.interruption.add_callback(held.request_stop)
        ended = threading.Event()
        watch = threading.Thread(target=self._watch_stop_flag, args=(held, ended), name="lease-flag", daemon=True)
        watch.start()
        try:
            yield held
        finally:
            ended.set()
            watch.join()
            self.interruption.remove_callback(held.request_stop)
            held.release()

    def train_run(self, spec: RunSpec, parent: str | None = None) -> Outcome:
        """Train a run under its lease, recorded under the run of key `parent`.

        Raises LeaseHeldError, RunFailedError (its workers crashed too often) or LaunchError.
        """
        with self.hold_lease(spec.folder) as held:
            # Only now: the journal and the tracker's run are this driver's as long as it has the lease.
            self._request_previews(spec, self.record_run(spec, parent))
            if self.interruption.event.is_set():
                return Outcome(status="stopped", message="not started")
            outcome = launch_run(spec, held, self.gpus)
            if outcome.status == "stopped":
                # Its workers may have seen the flag, and ended, before this process polled it; it stops all runs.
                self.interruption.request_stop()
            return outcome

    def _request_previews(self, spec: RunSpec, key: str) -> None:
        """Have pictures of what the run will do drawn and stored, beside its training."""
        self.replayer.submit(
            PreviewRequest(spec, self.manifest, partial(self.replayer.wait_for_run_id, key, 0.0)), required_key=key
        )

    def print_stop_notice(self) -> None:
        """Say that the stop was heard."""
        self.print_line("stopping: workers save and end; a second signal ends this process at once")

    def start_stop_timeout(self) -> None:
        """End what does not end by itself, such as a run that waits for resources: its launch then fails."""
        threading.Thread(target=self._enforce_stop_timeout, name="cut-off", daemon=True).start()

    def _enforce_stop_timeout(self) -> None:
        if not self._session_closed.wait(STOP_TIMEOUT_SECONDS):
            self.print_line(f"some runs did not stop within {STOP_TIMEOUT_SECONDS:g} s and are cut off")
            ray.shutdown()

    def _watch_stop_flag(self, held: Lease, ended: threading.Event) -> None:
        while not ended.wait(STOP_FLAG_POLL_SECONDS):
            try:
                if held.is_stop_requested():
                    self.interruption.request_stop()
                    return
            except OSError:
                continue  # a failed query stops nothing


@contextmanager
def open_session(asked: Destination, placement: Placement, console: Console) -> Iterator[Session]:
    """A session; all that is wrong is told at once by a PreflightError (or ConfigError, ClusterError).

    On leaving, every run gets its final status in the tracker: that which was set, else FAILED, or KILLED when the
    session was interrupted.
    """
    destination = asked.resolve()
    with ThreadPoolExecutor(3, thread_name_prefix="preflight") as pool:
        data = pool.submit(preflight.prepare_dataset, asked, destination)
        tracker = pool.submit(_make_tracker_factory, destination)
        storage = pool.submit(preflight.check_storage_writable, destination)
        with cluster.connect_cluster():
            checked = _collect_checks(data, tracker, storage, asked.data == EMBEDDED_DATASET)
            # Before signals are handled: Ctrl-C must end a wait for nodes, which looks at no event.
            capacity = cluster.wait_for_capacity(placement, lambda text: console.print(text, highlight=False))
            if (problem := preflight.check_nodes(destination)) is not None:
                raise PreflightError([problem])
            with signals.catch_stop_signals() as interruption:
                session = Session(
                    destination,
                    placement,
                    checked[0],
                    capacity,
                    cluster.resolve_gpus_per_worker(placement, capacity),
                    JournalReplayer(checked[1]),
                    interruption,
                    console,
                )
                session.storage_id  # noqa: B018  what is wrong with it is told before anything runs
                for action in (session.print_stop_notice, session.mark_open_runs_killed, session.start_stop_timeout):
                    interruption.add_callback(action)
                if (job := get_submission_id()) is not None:
                    session.print_line(
                        f"job {job}: Ctrl-C only stops showing this log; to stop the job: ray job stop {job}"
                    )
                # Runs whose driver was killed; a live one beats every few seconds, whatever it trains.
                session.replayer.submit(_close_stale_runs)
                try:
                    yield session
                except BaseException:
                    if (lacking := _close_session(session)) is not None:
                        session.print_line(lacking)
                    raise
                if (lacking := _close_session(session)) is not None:
                    if not interruption.event.is_set():
                        raise NotRecordedError(lacking)
                    session.print_line(lacking)  # and the exit status stays that of the signal


def _choose_storage_id(storage: str) -> str:
    """Return the id that a storage is given.

    Before there were ids, MLflow knew the runs of a storage by a hash of its place, which their specs still name.
    """
    sweeps = (
        run_lookup.list_folders(sweep, run_lookup.MODELS)
        for sweep in run_lookup.list_folders(storage, run_lookup.SWEEPS)
    )
    for folder in chain(run_lookup.list_folders(storage, run_lookup.MODELS), *sweeps):
        kept = file_io.read_json_or_empty(file_io.join(folder, SPEC_FILE)).get("destination")
        place = kept.get("storage") if isinstance(kept, dict) else None
        if isinstance(place, str) and place:
            # A trial's is the folder of its sweep.
            return compute_fingerprint(re.sub(rf"/{run_lookup.SWEEPS}/[^/]+$", "", place))
    return uuid.uuid4().hex


def _make_tracker_factory(destination: Destination) -> Callable[[], Tracker]:
    """Return what opens the tracker, which is open already unless it cannot fail to. Raises TrackingError."""
    if connect.will_create_database(destination.tracking, destination.tracker):
        return lambda: connect.run_at_low_priority(lambda: _open_checked_tracker(destination))
    tracker = _open_checked_tracker(destination)
    return lambda: tracker


def _open_checked_tracker(destination: Destination) -> Tracker:
    """Return the tracker once it proved that runs can be recorded. Raises TrackingError."""
    tracker = connect.open_tracker(destination.tracking, destination.experiment, destination.tracker)
    tracker.check()
    return tracker


def _close_stale_runs(tracker: Tracker) -> None:
    """Close stale runs. What the tracker refuses is only logged: they are another job's."""
    try:
        tracker.close_stale_runs(STALE_RUN_SECONDS)
    except TrackerUnreachableError:
        raise
    except TrackingError as error:
        _log.warning("runs that earlier jobs left open stay so: %s", error)


def _collect_checks(
    data: Future[Manifest], tracker: Future[Callable[[], Tracker]], storage: Future[str | None], embedded: bool
) -> tuple[Manifest, Callable[[], Tracker]]:
    """What the checks found, or all their problems in one PreflightError."""
    problems: list[str] = []
    if (problem := storage.result()) is not None:
        problems.append(problem)
    # Embedded data lies in the storage: what is wrong with that is not told twice.
    if (error := data.exception()) is not None and not (embedded and problems):
        if not isinstance(error, PreflightError):
            raise error
        problems.extend(error.problems)
    if (error := tracker.exception()) is not None:
        if not isinstance(error, TrackingError):
            raise error
        problems.append(f"tracking: {error}")
    if problems:
        raise PreflightError(problems)
    return data.result(), tracker.result()


def _close_session(session: Session) -> str | None:
    """Give every run its final status; what to say of that which is not recorded, None when all is."""
    session._session_closed.set()
    interrupted = session.interruption.event.is_set()
    missing: FinalStatus = "KILLED" if interrupted else "FAILED"
    # Runs that were given a status keep their place: members before their parent.
    unset: Mapping[str, FinalStatus] = dict.fromkeys(
        sorted(session._open_run_keys - session.final_statuses.keys()), missing
    )
    seconds = KILLED_DRAIN_SECONDS if interrupted or session._drain_timed_out else TRACKER_DRAIN_SECONDS
    if session.replayer.stop({**session.final_statuses, **unset}, seconds):
        return None
    cause = session.replayer.first_error or f"it did not take all within {seconds:g} s"
    return (
        f"tracking: not everything is recorded: {cause} What was trained is kept in "
        f"{redaction.redact(session.destination.storage)}: once MLflow can be used, run the same command "
        "again; it retrains "
        "nothing that is finished and records what is missing"
    )
