"""Datasets that are packed once, and processes that are ranks, for all tests of this room."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.build.sources.digits import pack_digits
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import TrainJob
from tests.support import runs, tiny_shards
from tests.support.ranks import Ranks
from tests.support.runs import first_optimizer_step


@pytest.fixture(scope="session", autouse=True)
def _torch_is_warm() -> None:
    first_optimizer_step()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,437 training and 360 validation digits."""
    folder = tmp_path_factory.mktemp("digits")
    pack_digits(str(folder))
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training samples, so that two of each epoch are dropped at batches of 8, and 5 for validation."""
    folder = tmp_path_factory.mktemp("small")
    tiny_shards.dataset(folder, train=50, per_shard=6)
    return folder


@pytest.fixture(scope="session")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A run of 18 steps (3 epochs of 6) that nothing interrupted."""
    done = runs.job(small, tmp_path_factory.mktemp("whole"), runs.recipe())
    assert runs.train(done).status == "finished"
    return done


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three processes."""
    started = Ranks(3, tmp_path_factory.mktemp("stores"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _no_watchdog_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close each watchdog: one left open would end the whole process minutes later, during other tests."""
    made: list[Watchdog] = []
    begin = Watchdog.__init__

    def noted(self: Watchdog, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        made.append(self)

    monkeypatch.setattr(Watchdog, "__init__", noted)
    yield
    for one in made:
        one.on_end()
