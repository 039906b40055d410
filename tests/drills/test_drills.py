"""Three of the drills: a rank, the driver, and all ranks in mid-checkpoint are killed; no weight differs in a bit."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.checkpoint.checkpoint import FinalWeights
from tests.drills import recipes, stage
from tests.drills.stage import Cluster

FAULTS = ["worker", "mid-checkpoint", "driver"]
SEED = 20140917

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with stage.cluster() as made:
        yield made


@pytest.fixture(scope="session")
def expected(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> FinalWeights:
    words = recipes.flags(recipes.epochs_for(len(FAULTS)))
    return recipes.undisturbed(cluster, tmp_path_factory.mktemp("undisturbed"), words)


def test_kills_cost_a_replay_and_change_no_bit(cluster: Cluster, expected: FinalWeights, tmp_path: Path) -> None:
    words = recipes.flags(recipes.epochs_for(len(FAULTS)))
    with recipes.submitted(cluster, tmp_path, words) as run:
        reports = list(recipes.hit_at_random(run, expected, FAULTS, random.Random(SEED), "random"))
    assert [report.line() for report in reports if report.problems] == [], [report.problems for report in reports]
    assert all(report.replayed is not None for report in reports[:-1])
