"""The trainer without processes that our runs have no use for."""

import inspect
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.launch import barrier, cluster, lean
from orchestrator.launch.lean import LeanTrainer, Reservation, SettledPolicy, WithoutBarrier


def kinds(trainer: DataParallelTrainer) -> set[type]:
    return {type(one) for one in trainer._create_default_callbacks()}


def test_only_what_is_of_no_use_is_left_out() -> None:
    usual, ours = kinds(DataParallelTrainer(lambda: None)), kinds(LeanTrainer(lambda: None, folder="/r"))
    assert BackendSetupCallback in ours
    assert usual - ours == {DatasetsCallback, PlacementGroupCleanerCallback}
    assert ours - usual == {Reservation, WithoutBarrier}


@pytest.mark.parametrize(
    ("workers", "grows", "kind"),
    [(1, False, SettledPolicy), (1, True, FixedScalingPolicy), ((1, 2), False, type(None))],
    ids=["fixed", "autoscaled", "elastic"],
)
def test_nobody_is_asked_for_nodes_where_nothing_scales(
    workers: Any, grows: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(cluster, "grows", lambda: grows)
    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", lambda _, **given_: given.update(given_))
    trainer = LeanTrainer(lambda: None, folder="/r", scaling_config=ScalingConfig(num_workers=workers))
    # An elastic run's policy is left as it is, whatever it is: None stands for it.
    policy = None if isinstance(workers, tuple) else FixedScalingPolicy(ScalingConfig())
    trainer._initialize_and_run_controller(scaling_policy=policy)
    assert type(given["scaling_policy"]) is kind


def test_a_settled_policy_wants_its_number_of_workers_and_asks_nobody() -> None:
    policy = SettledPolicy(ScalingConfig(num_workers=3, resources_per_worker={"CPU": 1}))
    policy.after_controller_start(None)
    decision: Any = policy.make_decision_for_non_running_worker_group()
    assert (decision.num_workers, decision.resources_per_worker) == (3, {"CPU": 1})


_RUNS = """
import os, signal, subprocess, sys, tempfile, threading, time
from functools import partial
from pathlib import Path
import ray
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.util.placement_group import placement_group_table
from orchestrator.launch import cluster, environment, prestart
from orchestrator.launch.lean import LeanTrainer
from tests.support.launched import process_tree, title

def pids(word):
    return {pid for pid in process_tree(os.getpid()) if title(pid).startswith(word)}

def wait_for(seen, what):
    deadline = time.monotonic() + 120
    while not (found := seen()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found

def process(word):
    return wait_for(partial(pids, word), word)

def reserved():
    return [one["state"] for one in placement_group_table().values()]

def trainer(function):
    return LeanTrainer(
        function, folder="/r", scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=tempfile.mkdtemp(), worker_runtime_env=prestart.runtime_env()),
    )

def here():
    return os.getpid(), ray.get_runtime_context().get_runtime_env_string()

training = Path(tempfile.mkdtemp(), "training")

def stay():
    training.touch()
    time.sleep(60)

def kill_the_controller(early):
    process("ray::RayTrainWorker")
    if not early:
        wait_for(training.exists, "training")
        print("helpers", len(pids("ray::SynchronizationActor")), len(pids("ray::PreemptionWatcher")))
    os.kill(process("ray::TrainController").pop(), signal.SIGKILL)

environment.switch()
cluster.begin(1)
with cluster.connected():
    ahead = process("ray::IDLE")
    used = trainer(here).fit().return_value
    assert used[0] in ahead, (ahead, prestart.expected_environment(prestart.worker_variables()), used)
    assert set(reserved()) <= {"REMOVED"}, reserved()
    for early in (True, False):
        threading.Thread(target=kill_the_controller, args=[early]).start()
        before = len(reserved())
        try:
            trainer(stay).fit()
        except Exception:
            assert set(reserved()) <= {"REMOVED"}, (early, reserved())
            assert len(reserved()) == before + 1
            print("given back", early)
        wait_for(lambda: not pids("ray::RayTrainWorker"), "the workers' end")
"""


@pytest.mark.cluster
def test_workers_use_what_was_started_ahead_and_a_lost_controllers_reservation_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _RUNS], capture_output=True, text=True, check=False, timeout=300)
    # Ray may still tell, after it, that the controller was killed.
    assert {"given back True", "given back False"} <= set(done.stdout.splitlines()), done.stderr[-4000:]
    assert "helpers 0 0" in done.stdout.splitlines(), done.stdout


def test_all_that_ray_s_group_of_workers_asks_of_the_barrier_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = inspect.getsource(worker_group.WorkerGroup)
    assert set(re.findall(r"sync_actor\.(\w+)\.remote\(", asked)) == {"set_required_ranks", "reset"}
    assert inspect.getsource(state).count("_shutdown_sync_actor(self.sync_actor)") == 2, "who else ends it?"
    assert re.findall(r"ray\.kill\(\w*sync_actor", asked + inspect.getsource(state)) == ["ray.kill(sync_actor"]
    for module, name in ((worker_group, "SynchronizationActor"), (state, "_shutdown_sync_actor")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    monkeypatch.setattr("ray.put", lambda value: ("put", value))
    barrier.install()
    actor: Any = vars(worker_group)["SynchronizationActor"].options(label_selector={}).remote(timeout_s=1.0)
    assert actor.set_required_ranks.remote({0}) == ("put", True)
    assert actor.reset.remote() == ("put", None)
    assert pickle.loads(pickle.dumps(actor)).reset.remote() == ("put", None), "workers get it, too"
    vars(state)["_shutdown_sync_actor"](actor)


def test_a_worker_runs_our_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        @staticmethod
        def train(payload: dict[str, Any]) -> dict[str, Any]:
            return {"trained": payload}

    monkeypatch.setattr(lean, "import_module", lambda name: {"orchestrator.launch.worker": Worker}[name])
    assert lean.train({"a": 1}) == {"trained": {"a": 1}}
