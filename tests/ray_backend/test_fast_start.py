"""The trainer without processes that our runs have no use for."""

import inspect
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
from ray import PlacementGroupID
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.ray_backend import cluster, fast_start
from orchestrator.ray_backend.fast_start import FastStartTrainer, NonAutoscalingPolicy, PlacementGroupRecorder


def kinds(trainer: DataParallelTrainer) -> set[type]:
    return {type(one) for one in trainer._create_default_callbacks()}


def test_only_what_is_of_no_use_is_left_out() -> None:
    usual, ours = kinds(DataParallelTrainer(lambda: None)), kinds(FastStartTrainer(lambda: None, folder="/r"))
    assert BackendSetupCallback in ours
    assert usual - ours == {DatasetsCallback, PlacementGroupCleanerCallback}
    assert ours - usual == {PlacementGroupRecorder}


@pytest.mark.parametrize(
    ("workers", "grows", "kind"),
    [(1, False, NonAutoscalingPolicy), (1, True, FixedScalingPolicy), ((1, 2), False, type(None))],
    ids=["fixed", "autoscaled", "elastic"],
)
def test_nobody_is_asked_for_nodes_where_nothing_scales(
    workers: Any, grows: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(cluster, "has_autoscaler", lambda: grows)
    monkeypatch.setattr(fast_start, "disable_report_barrier", lambda: None)
    monkeypatch.setattr(fast_start, "FastStartController", lambda **given_: given.update(given_))
    monkeypatch.setattr(fast_start, "run_controller", lambda _: None)
    trainer = FastStartTrainer(lambda: None, folder="/r", scaling_config=ScalingConfig(num_workers=workers))
    # An elastic run's policy is left as it is, whatever it is: None stands for it.
    policy = None if isinstance(workers, tuple) else FixedScalingPolicy(ScalingConfig())
    trainer._initialize_and_run_controller(scaling_policy=policy)
    assert type(given["scaling_policy"]) is kind


def test_a_settled_policy_wants_its_number_of_workers_and_asks_nobody() -> None:
    policy = NonAutoscalingPolicy(ScalingConfig(num_workers=3, resources_per_worker={"CPU": 1}))
    policy.after_controller_start(None)
    decision: Any = policy.make_decision_for_non_running_worker_group()
    assert (decision.num_workers, decision.resources_per_worker) == (3, {"CPU": 1})


_RUNS = """
import os, sys, tempfile, time
from functools import partial
from pathlib import Path
from orchestrator.ray_backend import ray_env
ray_env.set_ray_variables()
import ray
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.util.placement_group import placement_group_table
from orchestrator.ray_backend import cluster, fast_start, worker_prestart
from tests.support.launched import process_tree, title

def pids(word):
    return {pid for pid in process_tree(os.getpid()) if title(pid).startswith(word)}

def wait_for(seen, what):
    deadline = time.monotonic() + 120
    while not (found := seen()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found

def reserved():
    return [one["state"] for one in placement_group_table().values()]

def trainer(function):
    return fast_start.FastStartTrainer(
        function, folder="/r", scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="r", storage_path=tempfile.mkdtemp(), worker_runtime_env=worker_prestart.build_runtime_env()),
    )

def here():
    return os.getpid(), ray.get_runtime_context().get_runtime_env_string()

training = Path(tempfile.mkdtemp(), "training")

def stay():
    training.touch()
    time.sleep(60)

class LostEarly(fast_start.FastStartController):
    async def _run_control_loop_iteration(self):
        self.worker_group_cls = Early
        await super()._run_control_loop_iteration()

class Early(fast_start.FastStartWorkerGroup):
    def _create_workers(self, *given, **named):
        super()._create_workers(*given, **named)
        raise KeyboardInterrupt("lost early")  # what Ray Train does not catch

class LostLate(fast_start.FastStartController):
    async def _run_control_loop_iteration(self):
        await super()._run_control_loop_iteration()
        if training.exists():
            print("helpers", sorted(title(pid).split(".")[0] for pid in pids("ray::") - agents))
            raise OSError("lost late")

cluster.connect_in_background(1)
with cluster.connect_cluster():
    agents = pids("ray::DashboardAgent") | pids("ray::RuntimeEnvAgent")
    ahead = wait_for(partial(pids, "ray::IDLE"), "a process started ahead")
    used = trainer(here).fit().return_value
    assert used[0] in ahead, (ahead, worker_prestart.serialize_runtime_env(worker_prestart.get_worker_variables()), used)
    assert set(reserved()) <= {"REMOVED"}, reserved()
    usual = fast_start.FastStartController
    for lost in (LostEarly, LostLate):
        fast_start.FastStartController = lost
        before = len(reserved())
        try:
            trainer(stay).fit()
        except BaseException as error:
            assert set(reserved()) <= {"REMOVED"}, (lost, reserved())
            assert len(reserved()) == before + 1
            print("given back after", error)
        wait_for(lambda: not pids("ray::RayTrainWorker"), "the workers' end")
    fast_start.FastStartController = usual
    assert trainer(here).fit().return_value[0] not in ahead
    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs", "train").glob("*-app-controller-*")
    print("logged", [log.read_text().count(" INFO r: Started training worker group") for log in logs])
"""


@pytest.mark.cluster
def test_a_controller_is_no_process_and_what_a_lost_one_leaves_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _RUNS], capture_output=True, text=True, check=False, timeout=300)
    said = done.stdout.splitlines()
    assert {"given back after lost early", "given back after lost late"} <= set(said), (said, done.stderr[-4000:])
    assert "helpers ['ray::RayTrainWorker']" in said, said
    assert said[-1] == "logged [3]", (said, done.stderr[-4000:])


def test_all_that_ray_s_group_of_workers_asks_of_the_barrier_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = inspect.getsource(worker_group.WorkerGroup)
    assert set(re.findall(r"sync_actor\.(\w+)\.remote\(", asked)) == {"set_required_ranks", "reset"}
    assert inspect.getsource(state).count("_shutdown_sync_actor(self.sync_actor)") == 2, "who else ends it?"
    assert re.findall(r"ray\.kill\(\w*sync_actor", asked + inspect.getsource(state)) == ["ray.kill(sync_actor"]
    for module, name in ((worker_group, "SynchronizationActor"), (state, "_shutdown_sync_actor")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    monkeypatch.setattr("ray.put", lambda value: ("put", value))
    fast_start.disable_report_barrier()
    actor: Any = vars(worker_group)["SynchronizationActor"].options(label_selector={}).remote(timeout_s=1.0)
    assert actor.set_required_ranks.remote({0}) == ("put", True)
    assert actor.reset.remote() == ("put", None)
    assert pickle.loads(pickle.dumps(actor)).reset.remote() == ("put", None), "workers get it, too"
    vars(state)["_shutdown_sync_actor"](actor)


def test_workers_get_all_that_ray_s_own_group_gives_them() -> None:
    given = [
        set(re.findall(r"^ +(\w+)=", inspect.getsource(kind._init_train_context_on_workers), re.MULTILINE))
        for kind in (worker_group.WorkerGroup, fast_start.FastStartWorkerGroup)
    ]
    assert given[0] == given[1] and "controller_actor" in given[0]


@pytest.mark.parametrize(("job", "left"), [("07", []), ("08", ["orchestrator"])], ids=["of this job", "of another"])
def test_only_what_this_job_has_reserved_is_given_back(
    job: str, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver of the run may only be suspended: its workers end by themselves when it has a successor."""
    group = PlacementGroupID.from_random()
    store, removed = {fast_start.make_reservation_key("/r"): f"{job} {group.hex()}".encode()}, []
    monkeypatch.setattr(fast_start, "_get_job_id", lambda: "07")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", store.get)
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_del", store.pop)
    monkeypatch.setattr(fast_start, "remove_placement_group", lambda one: removed.append(one.id))
    fast_start.release_placement_group(fast_start.make_reservation_key("/another"))
    fast_start.release_placement_group(fast_start.make_reservation_key("/r"))
    assert [key.split("-")[0] for key in store] == left
    assert removed == ([] if left else [group])


def test_a_worker_runs_our_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.ray_backend.worker.run_training", lambda payload: {"trained": payload})
    assert fast_start.run_train_worker({"a": 1}) == {"trained": {"a": 1}}
