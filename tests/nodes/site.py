"""A whole site on this machine: nodes with Ray that take jobs, and beside them S3, PostgreSQL and an MLflow server.

Storage and data are in S3, tracking is by HTTP: what a cluster of real machines has. The buckets are folders here, so a
run is watched from outside without a client.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.drills import stage
from tests.nodes.scenes import STOP_SECONDS, NodesRun
from tests.support import mlflow_server, postgres, s3
from tests.support.launched import ROOT
from tests.support.machines import BIN, TMP, network
from tests.support.mlflow_server import MlflowServer
from tests.support.nodes import HEALTH, Cluster
from tests.support.postgres import Postgres

S3_PORT, DATABASE_PORT, MLFLOW_PORT = 9000, 5432, 5000
JOBS = "http://127.0.0.1:8265"
BUCKET = "orchestrator"
PASSWORD = "password-of-a-test"


@dataclass
class Site:
    """The nodes and the services that they share."""

    nodes: Cluster
    buckets: Path  # what S3 serves
    environment: Mapping[str, str]  # of every node: how S3 is reached
    seconds: dict[str, float] = field(default_factory=dict)  # until each part was up
    database: Postgres | None = None
    mlflow: MlflowServer | None = None

    @property
    def endpoint(self) -> str:
        """S3, for the nodes."""
        return f"http://{self.nodes.services.address}:{S3_PORT}"

    @property
    def tracking(self) -> str:
        """MLflow, for the nodes."""
        return f"http://{self.nodes.services.address}:{MLFLOW_PORT}"

    def storage(self, name: str) -> str:
        """Return the URL of a place for runs."""
        return f"s3://{BUCKET}/{name}"

    def folder(self, name: str) -> Path:
        """Return the folder behind `storage(name)`."""
        return self.buckets / BUCKET / name

    def submitted(self, name: str, script: str, *words: str) -> SiteRun:
        """Submit a job to the head, with storage of its own."""
        # The output of a submission does not go into the bucket, which only S3 may write.
        logs = self.buckets.parent / "logs" / name
        logs.mkdir(parents=True)
        run = SiteRun(stage.Cluster(0, {}), self.folder(name), words, logs, nodes=self.nodes, site=self, script=script)
        run.submit()
        return run

    def recorded(self, code: str) -> str:
        """Return the output of Python code on the head, with `client` for the MLflow server."""
        begin = f"from mlflow.tracking import MlflowClient\nclient = MlflowClient({self.tracking!r})\n"
        return self.nodes.ask(0, [sys.executable, "-c", begin + code], self.environment)


@dataclass
class SiteRun(NodesRun):
    """A job given to `ray job submit` on the head; `driver` is the command, which follows the job to its end."""

    site: Site = field(kw_only=True)
    script: str = field(kw_only=True)

    def submit(self) -> subprocess.Popen[bytes]:
        """Submit the job; the same command each time."""
        place = ["--storage", self.site.storage(self.storage.name), "--tracking", self.site.tracking]
        command = [
            *(str(BIN / "ray"), "job", "submit", "--address", JOBS, "--working-dir", str(ROOT), "--"),
            *("python", f"jobs/{self.script}", *self.flags, *place),
        ]
        with open(self.log(len(self.drivers)), "wb") as log:
            driver = self.nodes.exec(0, command, out=log)
        self.drivers.append(driver)
        return driver

    def said(self) -> str:
        """Return the output of the last submission."""
        return self.log(len(self.drivers) - 1).read_text(errors="replace")

    def stop(self) -> int:
        """Stop it with jobs/stop.py; return the exit status of its driver."""
        storage = self.site.storage(self.storage.name)
        stop = [sys.executable, str(ROOT / "jobs" / "stop.py"), self.folder.name, "--storage", storage]
        stopping = self.nodes.nodes[0].call(stop, self.site.environment, STOP_SECONDS)
        assert stopping.returncode == 0, stopping.stdout + stopping.stderr
        return self.driver.wait(STOP_SECONDS)

    def first_step(self) -> float:
        """Wait for a step; return the seconds since the submission, which was just made."""
        submitted = time.time()
        return self.await_steps_after(submitted).time - submitted


@contextmanager
def site(cpus: Sequence[int], head: Mapping[str, str] | None = None) -> Iterator[Site]:
    """Start a site of nodes with these CPUs. head: additions to the environment of the head's Ray."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="site-")))
        machines = stack.enter_context(network(folder, len(cpus) + 1))
        services = machines[-1]
        environment = s3.environment(f"http://{services.address}:{S3_PORT}")
        cluster = Cluster(
            machines[:-1], services, tuple(cpus), environment=environment, head={**HEALTH, **(head or {})}, jobs=True
        )
        made = Site(cluster, folder / "buckets", environment)
        began = time.monotonic()
        services.boot(machines, shared=[TMP])  # PostgreSQL's folder, which its own user must reach, comes later
        _serve(stack, made)
        made.seconds["services"] = time.monotonic() - began
        began = time.monotonic()
        cluster.start(range(len(cpus)))
        made.seconds["cluster"] = time.monotonic() - began
        yield made


def _serve(stack: ExitStack, made: Site) -> None:
    """Start the shared services on their machine."""
    services = made.nodes.services
    for bucket in (BUCKET, "artifacts"):
        (made.buckets / bucket).mkdir(parents=True)
    stack.enter_context(s3.served(made.buckets, S3_PORT, address=services.address, inside=services.inside))
    made.database = stack.enter_context(
        postgres.served(services.address, DATABASE_PORT, PASSWORD, prefix=services.inside)
    )
    made.database.psql(sql="create database mlflow")
    made.mlflow = stack.enter_context(
        mlflow_server.served(
            made.buckets.parent, made.database.uri("mlflow", password=PASSWORD), "s3://artifacts",
            address=services.address, port=MLFLOW_PORT, environment=made.environment, prefix=services.inside,
        )
    )  # fmt: skip
