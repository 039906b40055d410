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

from orchestrator.ray_backend import fast_start, ray_internals
from orchestrator.ray_backend.fast_start import FastStartTrainer, NonAutoscalingPolicy, _FolderCallback


def kinds(trainer: DataParallelTrainer) -> set[type]:
    return {type(one) for one in trainer._create_default_callbacks()}


def test_only_what_is_of_no_use_is_left_out() -> None:
    usual, ours = kinds(DataParallelTrainer(lambda: None)), kinds(FastStartTrainer(lambda: None, folder="/r"))
    assert BackendSetupCallback in ours
    assert usual - ours == {DatasetsCallback, PlacementGroupCleanerCallback}
    assert ours - usual == {_FolderCallback}


@pytest.mark.parametrize(
    ("workers", "grows", "kind"),
    [(1, False, NonAutoscalingPolicy), (1, True, FixedScalingPolicy), ((1, 2), False, type(None))],
    ids=["fixed", "autoscaled", "elastic"],
)
def test_nobody_is_asked_for_nodes_where_nothing_scales(
    workers: Any, grows: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray_internals, "read_autoscaler_limits", lambda: {"CPU": 4} if grows else None)
    monkeypatch.setattr(fast_start, "_apply_patches", lambda stack: None)
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
    runtime_env = {"env_vars": worker_prestart.get_hook_variables()}
    config = RunConfig(name="r", storage_path=tempfile.mkdtemp(), worker_runtime_env=runtime_env)
    return fast_start.FastStartTrainer(
        function, folder="/r", scaling_config=ScalingConfig(num_workers=1), run_config=config
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
    variables = worker_prestart.get_worker_variables()
    assert used[0] in ahead, (ahead, worker_prestart.serialize_runtime_env(variables), used)
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
    monkeypatch.setattr("ray.put", lambda value: ("put", value))
    monkeypatch.setenv(fast_start.STRUCTURED_LOGGING_VARIABLE, "1")
    with fast_start.patch_ray_train():
        actor: Any = vars(worker_group)["SynchronizationActor"].options(label_selector={}).remote(timeout_s=1.0)
        assert actor.set_required_ranks.remote({0}) == ("put", True)
        assert actor.reset.remote() == ("put", None)
        assert pickle.loads(pickle.dumps(actor)).reset.remote() == ("put", None), "workers get it, too"
        vars(state)["_shutdown_sync_actor"](actor)


def test_ray_is_patched_as_long_as_a_trainer_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast_start.STRUCTURED_LOGGING_VARIABLE, "1")
    before = (vars(worker_group)["SynchronizationActor"], vars(state)["_shutdown_sync_actor"])
    with fast_start.patch_ray_train():
        with fast_start.patch_ray_train():
            pass
        assert vars(worker_group)["SynchronizationActor"] is fast_start.NoOpSynchronizationActor
    assert (vars(worker_group)["SynchronizationActor"], vars(state)["_shutdown_sync_actor"]) == before


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
    store, removed = {ray_internals._make_key("/r"): f"{job} {group.hex()}".encode()}, []
    monkeypatch.setattr(ray_internals, "get_job_id", lambda: "07")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", store.get)
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_del", store.pop)
    monkeypatch.setattr(ray_internals, "remove_placement_group", lambda one: removed.append(one.id))
    ray_internals.release_placement_group("/another")
    ray_internals.release_placement_group("/r")
    assert [key.split("-")[0] for key in store] == left
    assert removed == ([] if left else [group])
