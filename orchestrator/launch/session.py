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

from orchestrator.config.fingerprint import fingerprint
from orchestrator.config.overrides import paths
from orchestrator.data.manifest import Manifest
from orchestrator.launch import cluster, interrupt, lease, named, preflight
from orchestrator.launch.cluster import Capacity
from orchestrator.launch.config import EMBEDDED, SPEC, Destination, Placement, RunSpec
from orchestrator.launch.environment import submission_id
from orchestrator.launch.interrupt import Interruption
from orchestrator.launch.lease import Lease
from orchestrator.launch.preflight import PreflightError
from orchestrator.launch.previews import PreviewRequest
from orchestrator.launch.trainer import launch
from orchestrator.storage import files, identity, urls
from orchestrator.tracking import opening
from orchestrator.tracking.replay import Replayer
from orchestrator.tracking.tracker import FinalStatus, TrackedRun, Tracker, TrackerUnreachable, TrackingError
from orchestrator.training.job import Outcome, journal_of

_log = logging.getLogger(__name__)
FLAG_SECONDS = 2.0
CLOSE_SECONDS = 60.0
# Longer than a checkpoint takes to be written.
CUT_OFF_SECONDS = 120.0
STALE_RUN_SECONDS = 600.0
KILLED_CLOSE_SECONDS = 10.0


class NotRecordedError(RuntimeError):
    """The job's work is done and kept, but the tracker does not have all of it; the message says what to do."""


@dataclass
class Session:
    """An open connection to everything; made by `opened`."""

    destination: Destination
    placement: Placement
    manifest: Manifest
    capacity: Capacity
    gpus: float  # of each worker
    replayer: Replayer
    interruption: Interruption
    console: Console
    statuses: dict[str, FinalStatus] = field(default_factory=dict)  # by tracking key, in closing order
    _open: set[str] = field(default_factory=set)
    _leases: dict[str, Lease] = field(default_factory=dict)  # by folder, of what this session runs
    _alone: set[str] = field(default_factory=set)  # folders of runs that are stopped by themselves
    _closed: threading.Event = field(default_factory=threading.Event)
    _waited: bool = False  # in vain, for all there is to record

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, highlight=False, markup=False)

    def tell_places(self, folder: str, key: str) -> None:
        """Say where everything is."""
        if not self.interruption.event.is_set():  # then there may be no time for it
            self._waited = not self.replayer.drain(CLOSE_SECONDS)
        try:
            where = self.replayer.run_url(key, 1.0)
        except TrackingError:
            where = "not recorded yet"  # the session's end says why, unless it is by then
        self.say(f"results: {urls.redact(folder)}")
        self.say(f"MLflow:  {where}")

    def key(self, name: str, parent: str = "") -> str:
        """Identity of a run in the tracker: a run of the same name in another storage is another run.

        A storage keeps its id wherever it is moved and however its place is spelt.
        """
        return f"{parent}/{name}@{self.storage_id}"

    @cached_property
    def storage_id(self) -> str:
        """The id of the storage. Raises StorageError when it has none and none can be written."""
        storage = self.destination.storage
        return identity.ensure_id(storage, lambda: _first_id(storage))

    def run_key(self, spec: RunSpec, parent: str | None = None) -> str:
        """Return the identity in the tracker of a training run.

        A run of this storage has one for life, whichever ensembles it is in; one of a sweep is the sweep's own.
        """
        own = spec.destination.storage == self.destination.storage
        return self.key(spec.name, "" if own else parent or "")

    def follow(self, spec: RunSpec, parent: str | None = None) -> str:
        """Record a run from its journal, nested under the run of key `parent`; its key."""
        key = self.run_key(spec, parent)
        params = {path: str(value) for path, value in paths(spec.recipe).items()}
        tags = spec.tags | {"orchestrator.dataset": f"{self.manifest.name} {spec.dataset_digest}"}
        self.replayer.follow(TrackedRun(key, spec.name, None, params, tags), journal_of(spec.folder), parent)
        self._open.add(key)
        for name, text in spec.texts.items():
            self.replayer.submit(partial(self._log_text, key, name, text), needs=key)
        return key

    def _log_text(self, key: str, name: str, text: str, tracker: Tracker) -> None:
        tracker.log_text(self.replayer.run_id(key, 0.0), name, text)

    def opened_run(self, run: TrackedRun) -> None:
        """Record a run that has no journal of its own."""
        self.replayer.follow(run, None)
        self._open.add(run.key)

    def ended_run(self, key: str, status: FinalStatus, tags: Mapping[str, str]) -> None:
        """Close a run that this session opened, as soon as its journal is in the tracker: nothing more comes of it."""
        self.closing(key, status)
        self.replayer.submit(partial(self._tag, key, tags), needs=key)
        self.replayer.close(key, status).add_done_callback(partial(self._closed_run, key))

    def _closed_run(self, key: str, done: Future[None]) -> None:
        if done.exception() is None:  # else it is closed with the session
            self._open.discard(key)
            self.statuses.pop(key, None)

    def _tag(self, key: str, tags: Mapping[str, str], tracker: Tracker) -> None:
        tracker.set_tags(self.replayer.run_id(key, 0.0), tags)

    def closing(self, key: str, status: FinalStatus) -> None:
        """The status with which the session will close a run that it opened; members before their parent."""
        if key in self._open:
            self.statuses[key] = status

    def kill_open_runs(self) -> None:
        """Mark every run without a status KILLED now: there may be no time for it later."""
        for key in self._open - self.statuses.keys():
            self.replayer.submit(partial(self._kill, key), needs=key)

    def _kill(self, key: str, tracker: Tracker) -> None:
        tracker.close_run(self.replayer.run_id(key, 0.0), "KILLED")

    @contextmanager
    def leased(self, folder: str) -> Iterator[Lease]:
        """The lease on a run's folder; its stop flag, or a signal, stops this session's work.

        Raises LeaseHeldError when another driver runs it.
        """
        held = lease.take(folder)
        self._leases[folder] = held
        self.interruption.on_set(held.request_stop)
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(folder, held, ended), name="lease-flag", daemon=True)
        watch.start()
        try:
            yield held
        finally:
            ended.set()
            watch.join()
            self.interruption.forget(held.request_stop)
            del self._leases[folder]
            self._alone.discard(folder)
            held.release()

    def train(self, spec: RunSpec, parent: str | None = None) -> Outcome:
        """Train a run under its lease, recorded under the run of key `parent`.

        Raises LeaseHeldError, RunFailedError (its workers crashed too often) or LaunchError.
        """
        with self.leased(spec.folder) as held:
            # Only now: the journal and the tracker's run are this driver's as long as it has the lease.
            self._preview(spec, self.follow(spec, parent))
            if self.interruption.event.is_set():
                return Outcome(status="stopped", message="not started")
            outcome = launch(spec, held, self.gpus)
            if outcome.status == "stopped" and spec.folder not in self._alone:
                # Its workers may have seen the flag, and be done, before our own look: the wish is for all of this.
                self.interruption.request()
            return outcome

    def stop_one(self, spec: RunSpec) -> None:
        """Have one of this session's runs save and stop, while the others go on.

        One that is not under way is left, and one that somebody has asked to stop: that is a wish for all.
        """
        held = self._leases.get(spec.folder)
        if held is not None and not held.stop_requested():
            self._alone.add(spec.folder)
            try:
                held.request_stop()
            except OSError:
                self._alone.discard(spec.folder)  # the next stop flag is somebody's wish
                raise

    def _preview(self, spec: RunSpec, key: str) -> None:
        """Have pictures of what the run will do drawn and stored, beside its training."""
        self.replayer.submit(PreviewRequest(spec, self.manifest, partial(self.replayer.run_id, key, 0.0)), needs=key)

    def announce_stop(self) -> None:
        """Say that the stop was heard."""
        self.say("stopping: workers save and end; a second signal ends this process at once")

    def cut_off(self) -> None:
        """End what does not end by itself, such as a run that waits for resources: its launch then fails."""
        threading.Thread(target=self._cut_off, name="cut-off", daemon=True).start()

    def _cut_off(self) -> None:
        if not self._closed.wait(CUT_OFF_SECONDS):
            self.say(f"some runs did not stop within {CUT_OFF_SECONDS:g} s and are cut off")
            ray.shutdown()

    def _watch(self, folder: str, held: Lease, ended: threading.Event) -> None:
        while not ended.wait(FLAG_SECONDS):
            try:
                if held.stop_requested():
                    if folder not in self._alone:
                        self.interruption.request()
                    return
            except OSError:
                continue  # a failed query stops nothing


@contextmanager
def opened(asked: Destination, placement: Placement, console: Console) -> Iterator[Session]:
    """A session; all that is wrong is told at once by a PreflightError (or ConfigError, ClusterError).

    On leaving, every run gets its final status in the tracker: that which was set, else FAILED, or KILLED when the
    session was interrupted.
    """
    destination = asked.resolved()
    with ThreadPoolExecutor(3, thread_name_prefix="preflight") as pool:
        data = pool.submit(preflight.dataset, asked, destination)
        tracker = pool.submit(_tracker, destination)
        storage = pool.submit(preflight.writable, destination)
        with cluster.connected():
            checked = _all_or_problems(data, tracker, storage, asked.data == EMBEDDED)
            # Before signals are handled: Ctrl-C must end a wait for nodes, which looks at no event.
            capacity = cluster.wait_for(placement, lambda text: console.print(text, highlight=False))
            if (problem := preflight.reachable_from_nodes(destination)) is not None:
                raise PreflightError([problem])
            with interrupt.handled() as interruption:
                session = Session(
                    destination,
                    placement,
                    checked[0],
                    capacity,
                    cluster.gpus_per_worker(placement, capacity),
                    Replayer(checked[1]),
                    interruption,
                    console,
                )
                session.storage_id  # noqa: B018  what is wrong with it is told before anything runs
                for action in (session.announce_stop, session.kill_open_runs, session.cut_off):
                    interruption.on_set(action)
                if (job := submission_id()) is not None:
                    session.say(f"job {job}: Ctrl-C only stops showing this log; to stop the job: ray job stop {job}")
                # Runs whose driver was killed; a live one beats every few seconds, whatever it trains.
                session.replayer.submit(_reap)
                try:
                    yield session
                except BaseException:
                    if (lacking := _close(session)) is not None:
                        session.say(lacking)
                    raise
                if (lacking := _close(session)) is not None:
                    if not interruption.event.is_set():
                        raise NotRecordedError(lacking)
                    session.say(lacking)  # and the exit status stays that of the signal


def _first_id(storage: str) -> str:
    """Return the id that a storage is given.

    Before there were ids, MLflow knew the runs of a storage by a hash of its place, which their specs still name.
    """
    sweeps = (named.below(sweep, named.MODELS) for sweep in named.below(storage, named.SWEEPS))
    for folder in chain(named.below(storage, named.MODELS), *sweeps):
        kept = files.read_record(files.join(folder, SPEC)).get("destination")
        place = kept.get("storage") if isinstance(kept, dict) else None
        if isinstance(place, str) and place:
            # A trial's is the folder of its sweep.
            return fingerprint(re.sub(rf"/{named.SWEEPS}/[^/]+$", "", place))
    return uuid.uuid4().hex


def _tracker(destination: Destination) -> Callable[[], Tracker]:
    """Return what opens the tracker, which is open already unless it cannot fail to. Raises TrackingError."""
    if opening.is_made_on_use(destination.tracking):
        return lambda: opening.beside(lambda: _usable_tracker(destination))
    tracker = _usable_tracker(destination)
    return lambda: tracker


def _usable_tracker(destination: Destination) -> Tracker:
    """Return the tracker once it proved that runs can be recorded. Raises TrackingError."""
    tracker = opening.tracker(destination.tracking, destination.experiment)
    tracker.check()
    return tracker


def _reap(tracker: Tracker) -> None:
    """Close stale runs. What the tracker refuses is only logged: they are another job's."""
    try:
        tracker.reap(STALE_RUN_SECONDS)
    except TrackerUnreachable:
        raise
    except TrackingError as error:
        _log.warning("runs that earlier jobs left open stay so: %s", error)


def _all_or_problems(
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


def _close(session: Session) -> str | None:
    """Give every run its final status; what to say of that which is not recorded, None when all is."""
    session._closed.set()
    interrupted = session.interruption.event.is_set()
    missing: FinalStatus = "KILLED" if interrupted else "FAILED"
    # Runs that were given a status keep their place: members before their parent.
    unset: Mapping[str, FinalStatus] = dict.fromkeys(sorted(session._open - session.statuses.keys()), missing)
    seconds = KILLED_CLOSE_SECONDS if interrupted or session._waited else CLOSE_SECONDS
    if session.replayer.stop({**session.statuses, **unset}, seconds):
        return None
    cause = session.replayer.cause or f"it did not take all within {seconds:g} s"
    return (
        f"tracking: not everything is recorded: {cause} What was trained is kept in "
        f"{urls.redact(session.destination.storage)}: once MLflow can be used, run the same command again; it retrains "
        "nothing that is finished and records what is missing"
    )
