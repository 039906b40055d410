"""What a Ray Train worker asks Ray Train for."""

from types import SimpleNamespace

import pytest
import ray.train
from ray.train import PreemptionInfo

from orchestrator.ray_backend import fast_start
from orchestrator.ray_backend.worker import RayTrainContext

DRAINING = PreemptionInfo(2000, {"here": [0]})


@pytest.mark.parametrize("info", [None, DRAINING])
def test_a_node_that_drains_is_noticed_on_both_paths(
    info: PreemptionInfo | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=info))
    monkeypatch.setattr(fast_start, "get_train_context", lambda: context)
    assert RayTrainContext(fast_start=True).has_preemption_notice() == (info is not None)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: info)
    assert RayTrainContext(fast_start=False).has_preemption_notice() == (info is not None)


def test_a_replacement_that_the_driver_announces_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=None))
    monkeypatch.setattr(fast_start, "get_train_context", lambda: context)
    monkeypatch.setattr(fast_start, "_replacement_announced", type(fast_start._replacement_announced)())
    assert not RayTrainContext(fast_start=True).has_preemption_notice()
    fast_start.announce_replacement()
    assert RayTrainContext(fast_start=True).has_preemption_notice()
