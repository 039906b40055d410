"""Workers' processes that are started ahead: they fit the actors that Ray Train makes."""

import importlib
import json
from types import SimpleNamespace

import pytest
import ray
from ray._private import ray_constants
from ray.train.v2._internal import constants
from ray.tune.execution import class_cache

from orchestrator.ray_backend import ray_compat, ray_internals, worker_prestart


def test_what_ray_train_hands_on_is_known() -> None:
    assert set(worker_prestart.TRAIN_PROPAGATED_VARIABLES) == constants.ENV_VARS_TO_PROPAGATE


def test_what_ray_tune_hands_on_is_known() -> None:
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
    known = {*worker_prestart.TUNE_PROPAGATED_VARIABLES, *worker_prestart.TRAIN_PROPAGATED_VARIABLES}
    assert class_cache.ENV_VARS_TO_PROPAGATE - keys == known - {ray_compat.FAST_START_VARIABLE}
    assert class_cache.DEFAULT_ENV_VARS == worker_prestart.TUNE_ADDED_VARIABLES


def test_the_hook_can_be_called() -> None:
    name = worker_prestart.get_hook_variables()[ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR]
    module, _, called = name.rpartition(".")
    getattr(importlib.import_module(module), called)()  # it wants nothing and raises nothing


def test_a_jobs_own_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"working_dir": "gcs://x.zip", "env_vars": {"OURS": "ä", "RAY_TRAIN_V2_ENABLED": "0"}}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=given))
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    text = worker_prestart.serialize_runtime_env(worker_prestart.get_worker_variables())
    found = json.loads(text)
    assert found["working_dir"] == "gcs://x.zip"
    assert found["env_vars"]["OURS"] == "ä"
    assert found["env_vars"]["RAY_TRAIN_V2_ENABLED"] == "1"
    assert "ä" in text and " " not in text  # as Ray writes it; another text is another environment


def test_trouble_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("not connected")

    monkeypatch.setattr(ray, "nodes", refuse)
    worker_prestart.prestart_workers(1)


def test_what_is_there_already_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    node = {"Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": 1}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    monkeypatch.setattr(ray_internals, "request_workers", lambda _, count, *rest: asked.append(count))
    worker_prestart.prestart_workers(2)  # by the job, as it begins
    for workers in (1, 1, 1, 3):  # runs that are launched
        worker_prestart.claim_workers(workers)
    assert asked == [2, 1, 3]


def test_on_several_nodes_nothing_is_started_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * 2)
    monkeypatch.setattr(ray_internals, "request_workers", lambda *_: pytest.fail("asked"))
    worker_prestart.claim_workers(1)
