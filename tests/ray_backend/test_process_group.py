import os

import pytest
import ray.util

from orchestrator.ray_backend import process_group
from orchestrator.ray_backend.process_group import (
    INTERFACE_VARIABLES,
    find_network_interface,
    set_network_interface,
)


def test_the_interface_is_the_one_with_the_address() -> None:
    assert find_network_interface("127.0.0.1") == "lo"
    assert find_network_interface("203.0.113.77") is None  # of a range that nobody has


def test_collectives_use_the_nodes_interface_unless_the_user_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    gloo, nccl = INTERFACE_VARIABLES
    monkeypatch.setenv(gloo, "to-be-removed-afterwards")
    monkeypatch.delenv(gloo)
    monkeypatch.setenv(nccl, "ib0")
    set_network_interface()
    assert (os.environ[gloo], os.environ[nccl]) == ("lo", "ib0")


def test_without_such_an_interface_the_choice_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "find_network_interface", lambda _: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.77")
    set_network_interface()
    assert not any(name in os.environ for name in INTERFACE_VARIABLES)
