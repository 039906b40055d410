"""What nodes and tests have in common."""

import pytest

from tests.support import machines


@pytest.fixture(scope="session", autouse=True)
def _tests_share_their_folders_with_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each node has a /tmp of its own: what a test keeps in `tmp_path` is seen there all the same."""
    machines.SHARED.add(tmp_path_factory.getbasetemp())
