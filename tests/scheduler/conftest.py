"""Fixtures of these tests."""

import pytest

from tests.support.runs import first_optimizer_step


@pytest.fixture(scope="session", autouse=True)
def _torch_is_warm() -> None:
    first_optimizer_step()  # a plan measures networks, which imports torch's compiler too
