"""Fixtures of the tests of recipes."""

import pytest

from tests.support.runs import first_optimizer_step


@pytest.fixture(scope="session", autouse=True)
def _torch_is_warm() -> None:
    first_optimizer_step()
