import importlib
import json
import logging
import re
import sys
import time
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray._private import ray_constants
from ray.train.backend import BackendConfig
from ray.train.v2._internal import constants
from ray.tune.execution import class_cache

from orchestrator.ray_backend import cluster, ray_env, ray_internals
from orchestrator.ray_backend.cluster import ClusterCapacity, Node, resolve_gpus_per_worker, wait_for_capacity
from orchestrator.ray_backend.launch_errors import ClusterError
from orchestrator.ray_backend.run_spec import Placement


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *capacities: ClusterCapacity) -> None:
        self.now, self.said, self._capacities = 0.0, list[str](), list(capacities)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)
        monkeypatch.setattr(cluster, "get_capacity", self._capacity)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _capacity(self) -> ClusterCapacity:
        return self._capacities.pop(0) if len(self._capacities) > 1 else self._capacities[0]


SMALL = ClusterCapacity((Node(2, 0),))


# ------------------------------------------------------------------ how much fits
def test_workers_are_counted_node_by_node() -> None:
    found = ClusterCapacity((Node(4, 0), Node(3, 0), Node(1, 0)))
    assert (found.cpus, found.gpus) == (8, 0)
    assert found.count_bundles(2, 0) == 3  # 8 CPUs, but one of each of two nodes is left over
    assert found.count_bundles(8, 0) == 0


def test_a_worker_with_a_gpu_needs_both_on_one_node() -> None:
    found = ClusterCapacity((Node(64, 0), Node(2, 8), Node(16, 4)))
    assert found.count_bundles(1, 1) == 2 + 4
    assert found.count_bundles(4, 1) == 0 + 4
    assert found.count_bundles(1, 0) == 64 + 2 + 16


@pytest.mark.parametrize(("share", "workers"), [(0.1, 10), (0.2, 5), (0.3, 3), (0.25, 4), (1 / 3, 3), (0.7, 1)])
def test_shares_of_a_gpu_are_counted_as_ray_counts_them(share: float, workers: int) -> None:
    assert ClusterCapacity((Node(100, 1),)).count_bundles(1, share) == workers


@given(
    nodes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=5),
    cpus=st.integers(1, 5),
    gpus=st.integers(0, 3),
)
def test_bundles_are_what_packing_one_by_one_gives(nodes: list[tuple[int, int]], cpus: int, gpus: int) -> None:
    packed = 0
    for node in nodes:
        left = node
        while left[0] >= cpus and left[1] >= gpus:
            left, packed = (left[0] - cpus, left[1] - gpus), packed + 1
    assert ClusterCapacity(tuple(Node(*node) for node in nodes)).count_bundles(cpus, gpus) == packed


def test_gpus_are_used_where_there_are_any_unless_said_otherwise() -> None:
    with_gpu = ClusterCapacity((Node(4, 0), Node(4, 2)))
    assert resolve_gpus_per_worker(Placement(), with_gpu) == 1.0
    assert resolve_gpus_per_worker(Placement(), SMALL) == 0.0
    assert resolve_gpus_per_worker(Placement(gpus_per_worker=0), with_gpu) == 0.0
    assert resolve_gpus_per_worker(Placement(gpus_per_worker=0.5), with_gpu) == 0.5


# ------------------------------------------------------------------ waiting
def test_what_fits_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, SMALL)
    assert wait_for_capacity(Placement(workers=2), clock.said.append) is SMALL
    assert (clock.now, clock.said) == (0.0, [])


def test_what_can_never_fit_is_rejected_immediately_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, SMALL)
    with pytest.raises(ClusterError) as raised:
        wait_for_capacity(Placement(workers=3, cpus_per_worker=2), clock.said.append)
    assert (clock.now, clock.said) == (0.0, [])
    text = str(raised.value)
    assert "3 workers of 2 CPU and 0 GPU do not fit" in text
    assert "1 node(s) with 2 CPUs and 0 GPUs" in text
    for flag in ("--placement.workers", "--placement.cpus-per-worker", "--placement.wait-seconds"):
        assert flag in text


def test_nodes_that_join_in_time_are_waited_for_aloud_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    larger = ClusterCapacity((Node(2, 0), Node(2, 0)))
    clock = Clock(monkeypatch, SMALL, SMALL, SMALL, larger)
    assert wait_for_capacity(Placement(workers=4, wait_seconds=60), clock.said.append) is larger
    assert 0 < clock.now < 60
    assert len(clock.said) == 1
    assert re.match(r"WAITING for 4 workers of 1 CPU and 0 GPU: .* giving up after 60 s", clock.said[0])


def test_waiting_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, SMALL)
    with pytest.raises(ClusterError, match="waited 60 s for 4 workers"):
        wait_for_capacity(Placement(workers=4, wait_seconds=60), clock.said.append)
    assert 60 <= clock.now < 70


def test_an_autoscaler_is_waited_for_up_to_its_own_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, ClusterCapacity((Node(2, 0),), max_cpus=16, max_gpus=0))
    with pytest.raises(ClusterError, match="waited 100 s"):
        wait_for_capacity(Placement(workers=16, autoscale_seconds=100), clock.said.append)
    assert clock.now >= 100


@pytest.mark.parametrize(
    "placement", [Placement(workers=17, wait_seconds=60), Placement(workers=2, gpus_per_worker=2, wait_seconds=60)]
)
def test_more_than_the_autoscaler_may_ever_bring_is_rejected_immediately(
    monkeypatch: pytest.MonkeyPatch, placement: Placement
) -> None:
    clock = Clock(monkeypatch, ClusterCapacity((Node(1, 0),), max_cpus=16, max_gpus=3))
    with pytest.raises(ClusterError, match="do not fit"):
        wait_for_capacity(placement, clock.said.append)
    assert clock.now == 0


def test_gpus_that_join_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    larger = ClusterCapacity((Node(8, 2),))
    clock = Clock(monkeypatch, ClusterCapacity((Node(1, 0),)), larger)
    assert wait_for_capacity(Placement(workers=2, wait_seconds=60), clock.said.append) is larger


def test_what_ray_hands_on_from_the_environment_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
    ours = {*ray_env._RAY_VARIABLES, *ray_env._TUNE_VARIABLES, ray_env.FAST_START_VARIABLE}
    train, tune = constants.ENV_VARS_TO_PROPAGATE, class_cache.ENV_VARS_TO_PROPAGATE - keys
    for name in ours | train | tune:
        monkeypatch.setenv(name, "1")
    hook = ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR
    known = ours | train
    assert {name for name in cluster.get_worker_variables() if name in known} == train
    added = {hook, ray_env.FAST_START_VARIABLE}
    assert cluster.get_tune_variables().keys() == tune | class_cache.DEFAULT_ENV_VARS.keys() | added


def test_the_setup_hook_takes_no_arguments_and_makes_rays_torch_backend() -> None:
    name = cluster.get_hook_variables()[ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR]
    module, _, attribute = name.rpartition(".")
    config = getattr(importlib.import_module(module), attribute)()
    assert isinstance(config, BackendConfig)
    assert config.backend_cls.__module__ in sys.modules, "its import is the point of the call"


def test_a_jobs_own_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"working_dir": "gcs://x.zip", "env_vars": {"OURS": "ä", "RAY_TRAIN_V2_ENABLED": "0"}}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=given))
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    text = cluster.serialize_runtime_env(cluster.get_worker_variables())
    found = json.loads(text)
    assert found["working_dir"] == "gcs://x.zip"
    assert found["env_vars"]["OURS"] == "ä"
    assert found["env_vars"]["RAY_TRAIN_V2_ENABLED"] == "1"
    assert "ä" in text and " " not in text  # as Ray writes it; another text is another environment


def test_a_failed_prestart_of_workers_is_only_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("not connected")

    monkeypatch.setattr(ray, "nodes", fail)
    with caplog.at_level(logging.DEBUG, cluster.__name__):
        cluster.prestart_workers(1)
    assert "not connected" in caplog.text
    assert not cluster._prestarted.acquire(blocking=False), "a run could claim a process that was not requested"


def test_what_is_there_already_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    node = {"Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": 1}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    monkeypatch.setattr(ray_internals, "request_workers", lambda _, count, *rest: asked.append(count))
    cluster.prestart_workers(2)  # by the job, as it begins
    for workers in (1, 1, 1, 3):  # runs that are launched
        cluster.claim_workers(workers)
    assert asked == [2, 1, 3]


def test_on_several_nodes_nothing_is_started_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * 2)
    monkeypatch.setattr(ray_internals, "request_workers", lambda *_: pytest.fail("asked"))
    cluster.claim_workers(1)
