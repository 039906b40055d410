"""Folders that nodes and tests share."""

import pytest

from tests.support import machines


@pytest.fixture(scope="session", autouse=True)
def _tests_share_their_folders_with_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make the files of `tmp_path` visible on nodes, each of which has a /tmp of its own."""
    machines.SHARED.add(tmp_path_factory.getbasetemp())
