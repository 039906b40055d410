"""One torch thread: networks this small gain nothing from two, and two that wait for a busy core lose much."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.runs import first_optimizer_step


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _torch_is_warm() -> None:
    first_optimizer_step()  # measuring a network imports torch's compiler too
