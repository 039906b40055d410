"""The surroundings of every job that trains or scores: checked places, a cluster, leases, a tracker, signals."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import ray
from rich.console import Console

from orchestrator.config import redaction
from orchestrator.config.overrides import flatten_config
from orchestrator.data.manifest import Manifest
from orchestrator.ray_backend import cluster, lease, preflight, signals
from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.launch_errors import NotRecordedError, PreflightError
from orchestrator.ray_backend.lease import Lease
from orchestrator.ray_backend.ray_env import get_submission_id
from orchestrator.ray_backend.ray_trainer import launch_run
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination, Placement, RunSpec
from orchestrator.ray_backend.signals import Interruption
from orchestrator.storage import commit
from orchestrator.tracking import connect
from orchestrator.tracking.replay import JournalReplayer
from orchestrator.tracking.tracker import FinalStatus, TrackedRun, Tracker, TrackerUnreachableError, TrackingError
from orchestrator.training.config import Outcome
from orchestrator.training.run_dir import get_journal_dir

STOP_TIMEOUT_SECONDS = 120.0  # longer than a checkpoint takes to be written
DRAIN_SECONDS = 60.0
KILLED_DRAIN_SECONDS = 10.0
STALE_RUN_SECONDS = 600.0
_log = logging.getLogger(__name__)


class RunRecorder:
    """Records the runs of one job in the tracker through a JournalReplayer, and gives each a final status."""

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
        return commit.ensure_storage_id(self._storage, lambda: uuid.uuid4().hex)

    def make_tracking_key(self, name: str, parent: str = "") -> str:
        """Return the identity of a run in the tracker: a run of the same name in another storage is another run.

        A storage keeps its id wherever it is moved and however its URL is spelled.
        """
        return f"{parent}/{name}@{self.storage_id}"

    def make_run_key(self, spec: RunSpec, parent: str | None = None) -> str:
        """Return a training run's identity in the tracker: one for life in this storage; of a sweep, the sweep's."""
        own = spec.destination.storage == self._storage
        return self.make_tracking_key(spec.name, "" if own else parent or "")

    def record_run(self, spec: RunSpec, parent: str | None = None) -> str:
        """Record a run from its journal, nested under the run of key `parent`; return its key."""
        key, origin = self.make_run_key(spec, parent), spec.provenance
        params = {path: str(value) for path, value in flatten_config(spec.recipe).items()}
        tags = {
            "orchestrator.folder": redaction.redact(spec.folder),
            "orchestrator.dataset": f"{self._dataset} {spec.dataset_digest}",
        } | ({} if origin is None else {"orchestrator.sweep": f"{origin.sweep} {origin.trial}".strip()})
        self.replayer.follow(TrackedRun(key, spec.name, None, params, tags), get_journal_dir(spec.folder), parent)
        self._open_keys.add(key)

        def log_texts(tracker: Tracker, run_id: str) -> None:
            tracker.log_text(run_id, "recipe.json", spec.recipe.to_json())
            if origin is not None:
                tracker.log_text(run_id, "provenance.json", origin.to_json())

        self.submit(key, log_texts)
        return key

    def record_parent_run(self, run: TrackedRun) -> None:
        """Record a run that has no journal of its own."""
        self.replayer.follow(run, None)
        self._open_keys.add(run.key)

    def submit(self, key: str, action: Callable[[Tracker, str], None]) -> None:
        """Have an action called with the tracker and its id of a recorded run, as soon as it can be reached."""
        self.replayer.submit(lambda tracker: action(tracker, self.replayer.wait_for_run_id(key, 0.0)), required_key=key)

    def set_final_status(self, key: str, status: FinalStatus) -> None:
        """Set the status with which a recorded run is closed in the end; members before their parent."""
        if key in self._open_keys:
            self.final_statuses[key] = status

    def close_run(self, key: str, status: FinalStatus, tags: Mapping[str, str]) -> None:
        """Close a recorded run as soon as its journal is in the tracker, since it has ended."""
        self.set_final_status(key, status)
        self.submit(key, lambda tracker, run_id: tracker.set_tags(run_id, tags))
        self.replayer.close(key, status).add_done_callback(partial(self._forget_closed_run, key))

    def _forget_closed_run(self, key: str, done: Future[None]) -> None:
        if done.exception() is None:  # else it is closed in the end
            self._open_keys.discard(key)
            self.final_statuses.pop(key, None)

    def mark_open_runs_killed(self) -> None:
        """Mark every run without a status KILLED now: there may be no time for it later."""
        for key in self._open_keys - self.final_statuses.keys():
            self.submit(key, lambda tracker, run_id: tracker.close_run(run_id, "KILLED"))

    def drain(self) -> None:
        """Wait until all that the journals hold is in the tracker, for a minute at most."""
        self._drain_timed_out = not self.replayer.drain(DRAIN_SECONDS)

    def close(self, interrupted: bool) -> str | None:
        """Give every run its final status, KILLED or FAILED where none was set; return a message if some is lacking."""
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


def _close_stale_runs(tracker: Tracker) -> None:
    """Close runs whose driver was killed. Errors but outages are only logged: they are others' runs."""
    try:
        tracker.close_stale_runs(STALE_RUN_SECONDS)
    except TrackerUnreachableError:
        raise
    except TrackingError as error:
        _log.warning("runs that earlier jobs left open stay so: %s", error)


@dataclass(frozen=True)
class Session:
    """The surroundings of one job; opened by `open_session`."""

    destination: Destination
    placement: Placement
    manifest: Manifest
    capacity: ClusterCapacity
    gpus: float  # of each worker
    recorder: RunRecorder
    interruption: Interruption
    console: Console

    def print_line(self, text: str) -> None:
        """Print a line for people."""
        self.console.print(text, highlight=False, markup=False)

    def print_locations(self, folder: str, key: str) -> str:
        """Print where the results are, and the run of that tracking key; return the URL of its page in MLflow."""
        if not self.interruption.event.is_set():  # else there may be no time for it
            self.recorder.drain()
        try:
            url = self.recorder.replayer.wait_for_run_url(key, 1.0)
        except TrackingError:
            url = "not recorded yet"  # the end of the job says why, if it is not recorded by then
        self.print_line(f"results: {redaction.redact(folder)}")
        self.print_line(f"MLflow:  {url}")
        return url

    @contextmanager
    def hold_lease(self, folder: str) -> Iterator[Lease]:
        """Hold the lease on a run's folder; its stop flag, or a signal, stops this session. Raises LeaseHeldError."""
        held = lease.acquire_lease(folder, on_stop=self.interruption.request_stop)
        try:
            with self.interruption.calling(held.request_stop):
                yield held
        finally:
            held.release()

    def train_run(self, spec: RunSpec, parent: str | None = None) -> Outcome:
        """Train a run under its lease, recorded under the run of key `parent`; return the outcome.

        Raises LeaseHeldError, RunFailedError (its workers crashed too often) or JobError.
        """
        with self.hold_lease(spec.folder) as held:
            # Only now: the journal and the tracker's run are this driver's as long as it has the lease.
            self.recorder.record_run(spec, parent)
            if self.interruption.event.is_set():
                return Outcome(status="stopped", message="not started")
            outcome = launch_run(spec, held.stop_flag, held.successor, self.gpus)
            if outcome.status == "stopped":
                # Its workers may have seen the flag before this session's own poll: the flag asks for all to stop.
                self.interruption.request_stop()
            return outcome


@contextmanager
def open_session(asked: Destination, placement: Placement, console: Console) -> Iterator[Session]:
    """Check all places, connect, and yield a session.

    Raises PreflightError with all that is wrong, ConfigError or ClusterError. On leaving, every run gets its final
    status in the tracker; NotRecordedError says that some of it is not recorded.
    """
    destination = asked.resolve()
    with ThreadPoolExecutor(3, thread_name_prefix="preflight") as pool:
        data = pool.submit(preflight.prepare_dataset, asked, destination)
        tracker = pool.submit(_make_tracker_factory, destination)
        storage = pool.submit(preflight.check_storage, destination)
        with cluster.connect_cluster():
            manifest, open_tracker = _collect_checks(data, tracker, storage, asked.data == EMBEDDED_DATASET)
            # Before signals are handled: Ctrl-C must end a wait for nodes, which looks at no event.
            capacity = cluster.wait_for_capacity(placement, lambda text: console.print(text, highlight=False))
            preflight.check_nodes(destination)
            gpus = cluster.resolve_gpus_per_worker(placement, capacity)
            recorder = RunRecorder(destination.storage, manifest.name, JournalReplayer(open_tracker))
            with signals.catch_stop_signals() as interruption:
                yield from _run_session(
                    Session(destination, placement, manifest, capacity, gpus, recorder, interruption, console)
                )


def _run_session(session: Session) -> Iterator[Session]:
    """Yield a session whose runs are stopped by signals and closed in the tracker in the end."""
    recorder, interruption, closed = session.recorder, session.interruption, threading.Event()

    def cut_off() -> None:  # what does not end by itself, such as a run that waits for resources: its launch then fails
        if not closed.wait(STOP_TIMEOUT_SECONDS):
            session.print_line(f"some runs did not stop within {STOP_TIMEOUT_SECONDS:g} s and are cut off")
            ray.shutdown()

    recorder.storage_id  # noqa: B018  what is wrong with it is reported before anything runs
    notice = "stopping: workers save and end; a second signal ends this process immediately"
    interruption.add_callback(partial(session.print_line, notice))
    interruption.add_callback(recorder.mark_open_runs_killed)
    interruption.add_callback(cut_off)
    if (job := get_submission_id()) is not None:
        session.print_line(f"job {job}: Ctrl-C only stops showing this log; to stop the job: ray job stop {job}")
    recorder.replayer.submit(_close_stale_runs)
    completed = False
    try:
        yield session
        completed = True
    finally:
        closed.set()
        if (message := recorder.close(interruption.event.is_set())) is not None:
            if completed and not interruption.event.is_set():
                raise NotRecordedError(message)
            session.print_line(message)  # the exit status stays that of the error or the signal


def _make_tracker_factory(destination: Destination) -> Callable[[], Tracker]:
    """Return what opens the tracker, which is open already unless it cannot fail to. Raises PreflightError."""

    def open_checked() -> Tracker:
        tracker = connect.open_tracker(destination.tracking, destination.experiment, destination.tracker)
        tracker.check()
        return tracker

    try:
        if connect.will_create_database(destination.tracking, destination.tracker):
            return open_checked
        tracker = open_checked()
    except TrackingError as error:
        raise PreflightError(f"tracking: {error}") from None
    return lambda: tracker


def _collect_checks(
    data: Future[Manifest], tracker: Future[Callable[[], Tracker]], storage: Future[None], embedded: bool
) -> tuple[Manifest, Callable[[], Tracker]]:
    """Return what the checks loaded. Raises PreflightError with all their problems."""
    problems: list[str] = []
    for future in (storage, data, tracker):
        # Embedded data lies in the storage: what is wrong with that is not reported twice.
        if not (future is data and embedded and problems):
            try:
                future.result()
            except PreflightError as error:
                problems.extend(error.problems)
    if problems:
        raise PreflightError(*problems)
    return data.result(), tracker.result()
