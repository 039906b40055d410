"""The stage of drills and of the benchmarks of survival: a Ray cluster of their own, and runs that are watched."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.checkpoint_dir import CheckpointFolder
from orchestrator.storage import commit
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.tracking.journal import Cursor
from orchestrator.training.run_dir import get_checkpoints_dir, get_journal_dir
from tests.support.launched import ROOT, Ended, process_tree, title, until

START_SECONDS = 90.0
STOP_SECONDS = 20.0
# From a submission to the first step, and from a fault to the next one.
PATIENCE_SECONDS = 150.0
POLL_SECONDS = 0.05
STORE_BYTES = 100_000_000
WORKER = "RayTrainWorker"
# Kinds of events that only steps bring.
STEPPED = ("metrics", "epoch")


class Stuck(AssertionError):
    """An event that a drill waits for does not happen."""


@dataclass(frozen=True)
class Cluster:
    """A Ray head of our own, and the environment of a driver that uses it."""

    pid: int
    environment: dict[str, str]


@contextmanager
def cluster(cpus: int = 8) -> Iterator[Cluster]:
    """Start a cluster with this many CPUs, as Ray counts them; end all its processes afterwards."""
    # Short, since sockets lie below it. Closed to other users, which Ray's own folder is not.
    folder = tempfile.mkdtemp(prefix="drill-", dir="/tmp")
    port, client = _free_ports(2)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", f"--ray-client-server-port={client}", f"--num-cpus={cpus}", "--num-gpus=0",
        "--include-dashboard=false", "--disable-usage-stats", f"--object-store-memory={STORE_BYTES}",
        f"--temp-dir={folder}/ray",
    ]  # fmt: skip
    with open(Path(folder) / "head.log", "wb") as log:
        head = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        head_log = Path(folder) / "head.log"
        # Ray prints this last, when all its processes are up.
        until(lambda: head.poll() is not None or "Ray runtime started" in head_log.read_text(), START_SECONDS, 0.2)
        if head.poll() is not None:
            raise Stuck(f"ray start: {head_log.read_text()[-500:]}")
        yield Cluster(head.pid, {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"})
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _end(head: subprocess.Popen[bytes]) -> None:
    """Kill a head and all its processes: it holds nothing that is needed, and a clean end takes half a minute."""
    for pid in process_tree(head.pid):
        send(pid, signal.SIGKILL)
    head.wait(STOP_SECONDS)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; return whether the process was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@dataclass
class Run:
    """A run of a job on a cluster, one at a time there, seen from outside: processes, files, journal."""

    cluster: Cluster
    storage: Path
    flags: tuple[str, ...]
    logs: Path | None = None  # folder of drivers' output, if not the storage
    job: str = "train.py"
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _events: list[Event] = field(default_factory=list)
    _cursor: Cursor | None = None

    # -------------------------------------------------------------- actions
    def submit(self) -> subprocess.Popen[bytes]:
        """Start a driver; the same command each time."""
        self.storage.mkdir(parents=True, exist_ok=True)
        with open(self.log(len(self.drivers)), "wb") as log:
            driver = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / self.job), *self.flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd="/", start_new_session=True,
                env={**self.cluster.environment, "ORCHESTRATOR_RUNS": str(self.storage), "TMPDIR": str(self.scratch)},
            )  # fmt: skip
        self.drivers.append(driver)
        return driver

    def close(self) -> None:
        """End the drivers that still run; their workers end with them."""
        for driver in self.drivers:
            if driver.poll() is None:
                driver.kill()
            driver.wait(STOP_SECONDS)
        # The next run must find the machine idle.
        until(lambda: not self.workers(), PATIENCE_SECONDS, 0.2)

    # -------------------------------------------------------------- observations
    @property
    def driver(self) -> subprocess.Popen[bytes]:
        """The driver that was started last."""
        return self.drivers[-1]

    @property
    def scratch(self) -> Path:
        """The folder of its drivers' temporary files, Ray's ledger among them."""
        folder = self.storage / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log(self, number: int) -> Path:
        """Return the file of a driver's output."""
        return (self.logs or self.storage) / f"driver-{number}.log"

    @property
    def folder(self) -> Path:
        """The run's folder, once it is there."""
        runs = sorted((self.storage / "models").glob("*"))
        if len(runs) != 1:
            raise Stuck(f"{self.storage}: {len(runs)} runs, where one is expected")
        return runs[0]

    def workers(self) -> list[int]:
        """Return the processes of its ranks."""
        return [pid for pid in process_tree(self.cluster.pid) if WORKER in title(pid)]

    def events(self, kind: str | None = None) -> list[Event]:
        """Return the journal up to now, or its events of one kind."""
        if self._begun():
            new_events, self._cursor = journal.read_events(get_journal_dir(str(self.folder)), self._cursor)
            self._events += new_events
        return [event for event in self._events if kind in (None, event.kind)]

    def samples(self) -> int:
        """Return the samples of this attempt by its journal or its newest checkpoint, whichever is later."""
        events = self.events()
        starts = [number for number, event in enumerate(events) if event.kind == "started"]
        journaled = max((event.samples or 0 for event in events[starts[-1] :]), default=0) if starts else 0
        return max([journaled, *(place.samples for place in self.committed()[:1])])

    def committed(self) -> list[CheckpointFolder]:
        """Return its complete checkpoints, newest first."""
        return [place for place in self._places() if commit.is_complete(place.url)]

    def uncommitted(self) -> list[CheckpointFolder]:
        """Return its checkpoints that are being written, or whose writer died."""
        return [place for place in self._places() if not commit.is_complete(place.url)]

    def _places(self) -> list[CheckpointFolder]:
        return checkpoint_dir.list_checkpoints(get_checkpoints_dir(str(self.folder))) if self._begun() else []

    def _begun(self) -> bool:
        return any((self.storage / "models").glob("*"))

    def await_samples(self, samples: int) -> None:
        """Wait until it has trained this many samples."""
        self.wait(lambda: self.samples() >= samples, f"{samples} samples", PATIENCE_SECONDS * 2)

    def await_steps_after(self, moment: float) -> Event:
        """Wait for a step of an attempt that began after `moment` (unix seconds); return its first event."""
        steps: list[Event] = []

        def stepped() -> bool:
            since = [event for event in self.events() if event.time > moment]
            starts = [number for number, event in enumerate(since) if event.kind == "started"]
            steps[:] = [event for event in since[starts[-1] :] if event.kind in STEPPED] if starts else []
            return bool(steps)

        self.wait(stepped, "a step after the fault", PATIENCE_SECONDS)
        return steps[0]

    def ended(self, seconds: float = 2 * PATIENCE_SECONDS) -> Ended:
        """Wait for the last driver; return its status and output."""
        began = time.monotonic()
        try:
            status = self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Stuck(f"the driver did not end in {seconds:g} s: {self._tail()}") from None
        return Ended(status, self.log(len(self.drivers) - 1).read_text(errors="replace"), "", time.monotonic() - began)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for a condition. Raises Stuck after `seconds`, or when the driver ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            # Once more after the end: it may have come just before.
            if self.driver.poll() is not None and not condition():
                raise Stuck(f"the driver ended with {self.driver.returncode} before {what}: {self._tail()}")
            if time.monotonic() > deadline:
                raise Stuck(f"{what} did not come in {seconds:g} s: {self._tail()}")
            time.sleep(POLL_SECONDS)

    def _tail(self) -> str:
        lines = self.log(len(self.drivers) - 1).read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])
