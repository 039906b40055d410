"""The stack of an MLflow server, once for all tests here."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.support import mlflow_stack, postgres
from tests.support.mlflow_stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start PostgreSQL with passwords, S3 and the server with a login, from the files of infra/."""
    if (reason := postgres.trouble()) is not None:
        pytest.skip(reason)
    with mlflow_stack.running(tmp_path_factory.mktemp("stack")) as made:
        yield made


@pytest.fixture(scope="session")
def prepared(stack: Stack) -> "subprocess.CompletedProcess[str]":
    """Return the result of the first run of prepare.py."""
    return stack.prepare("--buckets", "runs", "mlflow", "--user", "jobs", "--reader", "grafana")
