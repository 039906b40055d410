"""The watch over the nodes of a run's workers. Whole, on nodes that drain: tests/nodes/test_several_nodes.py."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.execution import preemption
from ray.train.v2.api.preemption import PreemptionInfo

from orchestrator.ray_backend.fast_start import ThreadPreemptionCallback

PATIENCE_SECONDS = 10.0


class Actor:
    """Takes the notice as Ray's worker does, by `mark_preempt.remote`."""

    def __init__(self) -> None:
        self.told: list[PreemptionInfo] = []
        self.heard = threading.Event()
        self.mark_preempt = SimpleNamespace(remote=self._mark)

    def _mark(self, info: PreemptionInfo) -> None:
        self.told.append(info)
        self.heard.set()


def group(actors: list[Actor], nodes: list[str]) -> Any:
    """Workers of these ranks on these nodes."""
    workers = [
        SimpleNamespace(
            distributed_context=SimpleNamespace(world_rank=rank), metadata=SimpleNamespace(node_id=node), actor=actor
        )
        for rank, (actor, node) in enumerate(zip(actors, nodes, strict=True))
    ]
    return SimpleNamespace(get_workers=lambda: workers)


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The nodes that drain, and until when in unix milliseconds: what Ray would say."""
    nodes: dict[str, int] = {}
    monkeypatch.setattr(preemption, "_get_draining_nodes", lambda: dict(nodes))
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.01")
    return nodes


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "PreemptionWatcher"]


def test_every_worker_is_told_of_a_node_that_goes(draining: dict[str, int]) -> None:
    actors, watch = [Actor(), Actor()], ThreadPreemptionCallback()
    watch.after_worker_group_start(group(actors, ["here", "there"]))
    draining["elsewhere"] = 1000  # no node of ours
    draining["there"] = 2000
    try:
        assert all(actor.heard.wait(PATIENCE_SECONDS) for actor in actors)
    finally:
        watch.before_worker_group_shutdown(group([], []))
    assert [actor.told for actor in actors] == 2 * [[PreemptionInfo(2000, {"there": [1]})]]


@pytest.mark.parametrize("end", ["before_worker_group_shutdown", "after_worker_group_abort"])
def test_it_ends_with_its_workers(draining: dict[str, int], end: str) -> None:
    before, watch = set(watchers()), ThreadPreemptionCallback()
    watch.after_worker_group_start(group([Actor()], ["here"]))
    (thread,) = set(watchers()) - before
    getattr(watch, end)(None)
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_a_new_group_is_watched_in_place_of_the_last(draining: dict[str, int]) -> None:
    first, second, watch = Actor(), Actor(), ThreadPreemptionCallback()
    before = set(watchers())
    watch.after_worker_group_start(group([first], ["here"]))
    (thread,) = set(watchers()) - before
    watch.after_worker_group_start(group([second], ["there"]))
    thread.join(PATIENCE_SECONDS)
    draining.update(here=0, there=0)
    try:
        assert second.heard.wait(PATIENCE_SECONDS)
    finally:
        watch.before_worker_group_shutdown(group([], []))
    assert first.told == []
    assert second.told == [PreemptionInfo(None, {"there": [0]})]


def test_a_run_goes_on_without_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    before = set(watchers())  # of other tests, which may not have woken up since they were told to end
    ThreadPreemptionCallback().after_worker_group_start(None)
    assert "their preemption will come without notice" in caplog.text
    assert set(watchers()) <= before
