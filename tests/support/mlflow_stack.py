"""The MLflow server as infra/ ships it, with the PostgreSQL and the S3 that it stands on."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import postgres, s3
from tests.support.launched import ROOT
from tests.support.mlflow_server import Login, MlflowServer, served
from tests.support.postgres import Postgres

MLFLOW = ROOT / "infra" / "mlflow"
NAME = "mlflow.internal"  # of the server for clients, besides its address
PASSWORDS = ("admin_password", "database_password", "grafana_database_password", "jobs_password", "session_key")


@dataclass(frozen=True)
class Stack:
    """The running services, and the folder of their secrets."""

    server: MlflowServer
    database: Postgres
    store: s3.S3Server
    secrets: Path

    def secret(self, name: str) -> str:
        """A password."""
        return (self.secrets / name).read_text()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of prepare.py and backup.sh."""
        return {**places(self.store, self.database, self.secrets), "MLFLOW_TRACKING_URI": self.server.uri}

    def prepare(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run prepare.py."""
        return subprocess.run(
            [sys.executable, str(MLFLOW / "prepare.py"), *arguments],
            capture_output=True, text=True, timeout=60, env={**os.environ, **self.environment}, check=False,
        )  # fmt: skip


def places(store: s3.S3Server, database: Postgres, secrets_folder: Path) -> dict[str, str]:
    """Return the variables that name storage and database; keys and passwords are in files."""
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE")
    where: Mapping[str, str] = {**store.environment, **database.environment}
    return {
        **{name: value for name, value in where.items() if name not in keys},
        "PGUSER": "mlflow",
        "SECRETS_DIRECTORY": str(secrets_folder),
    }


@contextmanager
def running(folder: Path) -> Iterator[Stack]:
    """Run the stack on loopback, with a login, while the block runs; `postgres.trouble()` must be None."""
    words = folder / "secrets"
    words.mkdir(mode=0o700)
    for name in PASSWORDS:
        (words / name).write_text(secrets.token_hex(16))
    keys = f"[default]\naws_access_key_id = {s3.KEY_ID}\naws_secret_access_key = {s3.SECRET}\n"
    (words / "s3_credentials").write_text(keys)
    (folder / "buckets" / "mlflow").mkdir(parents=True)
    with postgres.served(password=secrets.token_hex(16)) as database, s3.served(folder / "buckets") as store:
        database.psql("-f", str(MLFLOW / "databases.sql"), environment={"SECRETS_DIRECTORY": str(words)})
        environment = {**places(store, database, words), "MLFLOW_AUTH_CONFIG_PATH": str(MLFLOW / "basic_auth.ini")}
        with served(
            folder / "server",
            "postgresql+psycopg2:///mlflow",
            "s3://mlflow/artifacts",
            hosts=[NAME],
            login=Login("postgresql+psycopg2:///mlflow_auth"),
            environment=environment,
        ) as server:
            yield Stack(server, database, store, words)
