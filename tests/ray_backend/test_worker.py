"""A Ray Train worker: notices of preemption, and the interface of its collectives."""

import os
from types import SimpleNamespace

import pytest
import ray.train
import ray.util
from ray.train import PreemptionInfo

from orchestrator.ray_backend import fast_start
from orchestrator.ray_backend.worker import (
    INTERFACE_VARIABLES,
    RayTrainContext,
    set_network_interface,
)

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


def test_collectives_use_the_nodes_interface_unless_the_user_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    gloo, nccl = INTERFACE_VARIABLES
    monkeypatch.setenv(gloo, "to-be-removed-afterwards")
    monkeypatch.delenv(gloo)
    monkeypatch.setenv(nccl, "ib0")
    set_network_interface()
    assert (os.environ[gloo], os.environ[nccl]) == ("lo", "ib0")


def test_without_such_an_interface_the_choice_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.77")  # of a range for documentation
    set_network_interface()
    assert not any(name in os.environ for name in INTERFACE_VARIABLES)
