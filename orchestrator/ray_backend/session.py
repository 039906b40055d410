"""The surroundings of every job that trains or scores: checked places, a cluster, leases, a tracker, signals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import ray
from rich.console import Console

from orchestrator.config import redaction
from orchestrator.data.manifest import Manifest
from orchestrator.ray_backend import cluster, lease, preflight, signals
from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.launch_errors import NotRecordedError, PreflightError
from orchestrator.ray_backend.lease import Lease
from orchestrator.ray_backend.previews import PreviewRequest
from orchestrator.ray_backend.ray_env import get_submission_id
from orchestrator.ray_backend.ray_trainer import launch_run
from orchestrator.ray_backend.run_recorder import RunRecorder, close_stale_runs
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination, Placement, RunSpec
from orchestrator.ray_backend.signals import Interruption
from orchestrator.tracking import connect
from orchestrator.tracking.replay import JournalReplayer
from orchestrator.tracking.tracker import Tracker, TrackingError
from orchestrator.training.config import Outcome

STOP_FLAG_POLL_SECONDS = 2.0
STOP_TIMEOUT_SECONDS = 120.0  # longer than a checkpoint takes to be written


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
        url = self.recorder.get_run_url(key)
        self.print_line(f"results: {redaction.redact(folder)}")
        self.print_line(f"MLflow:  {url}")
        return url

    @contextmanager
    def hold_lease(self, folder: str) -> Iterator[Lease]:
        """Hold the lease on a run's folder; its stop flag, or a signal, stops the work of this session.

        Raises LeaseHeldError when another driver runs it.
        """
        with lease.acquire_lease(folder) as held, self.interruption.calling(held.request_stop):
            ended = threading.Event()
            watch = threading.Thread(target=self._watch_stop_flag, args=(held, ended), name="lease-flag", daemon=True)
            watch.start()
            try:
                yield held
            finally:
                ended.set()
                watch.join()

    def train_run(self, spec: RunSpec, parent: str | None = None) -> Outcome:
        """Train a run under its lease, recorded under the run of key `parent`; return the outcome.

        Raises LeaseHeldError, RunFailedError (its workers crashed too often) or LaunchError.
        """
        with self.hold_lease(spec.folder) as held:
            # Only now: the journal and the tracker's run are this driver's as long as it has the lease.
            key = self.recorder.record_run(spec, parent)
            self._request_previews(spec, key)
            if self.interruption.event.is_set():
                return Outcome(status="stopped", message="not started")
            outcome = launch_run(spec, held, self.gpus)
            if outcome.status == "stopped":
                # Its workers may have seen the flag before this session's own poll: the flag asks for all to stop.
                self.interruption.request_stop()
            return outcome

    def _request_previews(self, spec: RunSpec, key: str) -> None:
        """Have pictures of what the run will do drawn and stored while it trains."""
        replayer = self.recorder.replayer
        replayer.submit(
            PreviewRequest(spec, self.manifest, partial(replayer.wait_for_run_id, key, 0.0)), required_key=key
        )

    def _watch_stop_flag(self, held: Lease, ended: threading.Event) -> None:
        while not ended.wait(STOP_FLAG_POLL_SECONDS):
            try:
                if held.is_stop_requested():
                    self.interruption.request_stop()
                    return
            except OSError:
                continue  # a failed poll stops nothing


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
        storage = pool.submit(preflight.check_storage_writable, destination)
        with cluster.connect_cluster():
            manifest, open_tracker = _collect_checks(data, tracker, storage, asked.data == EMBEDDED_DATASET)
            # Before signals are handled: Ctrl-C must end a wait for nodes, which looks at no event.
            capacity = cluster.wait_for_capacity(placement, lambda text: console.print(text, highlight=False))
            if (problem := preflight.check_nodes(destination)) is not None:
                raise PreflightError([problem])
            gpus = cluster.resolve_gpus_per_worker(placement, capacity)
            recorder = RunRecorder(destination.storage, manifest.name, JournalReplayer(open_tracker))
            with signals.catch_stop_signals() as interruption:
                yield from _run_session(
                    Session(destination, placement, manifest, capacity, gpus, recorder, interruption, console)
                )


def _run_session(session: Session) -> Iterator[Session]:
    """Yield a session whose runs are stopped by signals and closed in the tracker in the end."""
    recorder, interruption, closed = session.recorder, session.interruption, threading.Event()
    recorder.storage_id  # noqa: B018  what is wrong with it is reported before anything runs
    notice = "stopping: workers save and end; a second signal ends this process immediately"
    interruption.add_callback(partial(session.print_line, notice))
    interruption.add_callback(recorder.mark_open_runs_killed)
    interruption.add_callback(partial(_start_stop_timeout, session, closed))
    if (job := get_submission_id()) is not None:
        session.print_line(f"job {job}: Ctrl-C only stops showing this log; to stop the job: ray job stop {job}")
    recorder.replayer.submit(close_stale_runs)
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


def _start_stop_timeout(session: Session, closed: threading.Event) -> None:
    """End what does not end by itself, such as a run that waits for resources: its launch then fails."""

    def cut_off() -> None:
        if not closed.wait(STOP_TIMEOUT_SECONDS):
            session.print_line(f"some runs did not stop within {STOP_TIMEOUT_SECONDS:g} s and are cut off")
            ray.shutdown()

    threading.Thread(target=cut_off, name="cut-off", daemon=True).start()


def _make_tracker_factory(destination: Destination) -> Callable[[], Tracker]:
    """Return what opens the tracker, which is open already unless it cannot fail to. Raises TrackingError."""
    if connect.will_create_database(destination.tracking, destination.tracker):
        return lambda: _open_checked_tracker(destination)
    tracker = _open_checked_tracker(destination)
    return lambda: tracker


def _open_checked_tracker(destination: Destination) -> Tracker:
    """Return the tracker once it proved that runs can be recorded. Raises TrackingError."""
    tracker = connect.open_tracker(destination.tracking, destination.experiment, destination.tracker)
    tracker.check()
    return tracker


def _collect_checks(
    data: Future[Manifest], tracker: Future[Callable[[], Tracker]], storage: Future[str | None], embedded: bool
) -> tuple[Manifest, Callable[[], Tracker]]:
    """Return what the checks loaded. Raises PreflightError with all their problems."""
    problems: list[str] = []
    if (problem := storage.result()) is not None:
        problems.append(problem)
    # Embedded data lies in the storage: what is wrong with that is not reported twice.
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
