"""A scratch PostgreSQL server for tests: data in a temporary folder, processes of an unprivileged user."""

import contextlib
import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ending import end

SUPERUSER = "postgres"
START_SECONDS = 30.0
STOP_SECONDS = 15.0
# Users to run the server as when the tests run as root, which PostgreSQL rejects.
USERS = ("postgres", "nobody")
# Nothing of it outlives the test.
FORGETFUL = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


@functools.cache
def trouble() -> str | None:
    """Return why no server can run here; None when one can."""
    if programs() is None:
        return "PostgreSQL's server is not installed (initdb, postgres; Debian's package postgresql)"
    if shutil.which("setpriv") is None:
        return "setpriv is not installed (package util-linux)"
    if os.geteuid() == 0 and user() is None:
        return f"PostgreSQL does not run as root, and there is no other user ({', '.join(USERS)})"
    return None


@functools.cache
def programs() -> Path | None:
    """Return the folder of PostgreSQL's newest programs; Debian keeps the server's out of PATH."""
    folders = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    folders += sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda path: int(path.parent.name.partition(".")[0]),
        reverse=True,
    )
    return next((path for path in folders if (path / "initdb").exists() and (path / "postgres").exists()), None)


def user() -> pwd.struct_passwd | None:
    """Return the unprivileged user of the server when the tests run as root."""
    for name in USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


@dataclass(frozen=True)
class Postgres:
    """A running server.

    password: of the superuser, asked for over the network (scram-sha-256); None for a server that trusts every client.
    """

    address: str
    port: int
    password: str | None
    folder: Path
    prefix: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of libpq's clients, without the password."""
        # A user's own passwords are not for tests.
        return {"PGHOST": self.address, "PGPORT": str(self.port), "PGUSER": SUPERUSER, "PGPASSFILE": os.devnull}

    def uri(self, database: str = "postgres", user: str = SUPERUSER, password: str | None = None) -> str:
        """Return the URI of a database, as SQLAlchemy and MLflow take it."""
        word = password if password is not None else self.password
        return f"postgresql+psycopg2://{user}{f':{word}' if word else ''}@{self.address}:{self.port}/{database}"

    def psql(self, *arguments: str, sql: str = "", environment: Mapping[str, str] | None = None) -> str:
        """Run psql with statements or arguments; return its output. Raises AssertionError when it fails."""
        done = subprocess.run(
            [*self.prefix, str(_program("psql")), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *arguments],
            input=sql,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **self.environment, "PGPASSWORD": self.password or "", **(environment or {})},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()


@contextmanager
def served(
    address: str = "127.0.0.1", port: int = 0, password: str | None = None, prefix: Sequence[str] = ()
) -> Iterator[Postgres]:
    """Run a server while the block runs, on a free port by default; `trouble()` must be None.

    prefix: words before commands, to run them elsewhere (nsenter and its arguments); then `port` is required.
    """
    assert (reason := trouble()) is None, reason
    assert port or not prefix, "a port that is free here may not be so there"
    made = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        data = _initialised(made, password)
        server = Postgres(address, port or _free_port(address), password, made, tuple(prefix))
        with open(made / "log", "wb") as log:
            process = subprocess.Popen(
                [*prefix, *_unprivileged("--pdeathsig", "INT"), *_command(data, server)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
            )
        try:
            _wait(server, process, made / "log")
            yield server
        finally:
            end(process, signal.SIGINT, STOP_SECONDS)  # which ends connections, too
    finally:
        shutil.rmtree(made)


def _initialised(folder: Path, password: str | None) -> Path:
    """Make a data folder that belongs to the server's user."""
    data, word = folder / "data", folder / "password"
    data.mkdir(mode=0o700)
    word.write_text(password or "unused")
    if os.geteuid() == 0 and (owner := user()) is not None:
        for path in (folder, data, word):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    method = "scram-sha-256" if password else "trust"
    subprocess.run(
        [*_unprivileged(), str(_program("initdb")), "--pgdata", str(data), "--username", SUPERUSER, "--no-sync",
         "--encoding=UTF8", "--locale=C", f"--auth={method}", f"--pwfile={word}", "--no-instructions"],
        check=True, capture_output=True, timeout=60, cwd="/",
    )  # fmt: skip
    with open(data / "pg_hba.conf", "a") as rules:
        # From other machines of a test as from this one.
        rules.write(f"host all all 0.0.0.0/0 {method}\n")
    return data


def _command(data: Path, server: Postgres) -> list[str]:
    settings = (f"listen_addresses={server.address}", f"port={server.port}", "unix_socket_directories=", *FORGETFUL)
    return [str(_program("postgres")), "-D", str(data), *(word for each in settings for word in ("-c", each))]


def _unprivileged(*options: str) -> list[str]:
    """Return the words before a command that run it as the server's user."""
    owner = user() if os.geteuid() == 0 else None
    changes = [f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"] if owner else []
    return ["setpriv", *changes, *options] if changes or options else []


def _wait(server: Postgres, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    ready = [*server.prefix, str(_program("pg_isready")), "-q", "-h", server.address, "-p", str(server.port)]
    while subprocess.run(ready, check=False, timeout=10).returncode != 0:
        assert process.poll() is None, f"PostgreSQL ended with {process.returncode}: {log.read_text()}"
        assert time.monotonic() < deadline, f"PostgreSQL does not answer: {log.read_text()}"
        time.sleep(0.1)


def _program(name: str) -> Path:
    folder = programs()
    assert folder is not None
    return folder / name


def _free_port(address: str) -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
