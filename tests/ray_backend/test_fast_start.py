"""The trainer without processes that our runs have no use for."""

from __future__ import annotations

import inspect
import logging
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import PlacementGroupID
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution import preemption
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2._internal.logging.logging import LoggingManager
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.preemption import PreemptionInfo

from orchestrator.ray_backend import fast_start, ray_env, ray_internals
from orchestrator.ray_backend.fast_start import (
    FastStartTrainer,
    NonAutoscalingPolicy,
    ThreadPreemptionCallback,
)


def kinds(trainer: DataParallelTrainer) -> set[type]:
    return {type(one) for one in trainer._create_default_callbacks()}


def test_only_what_is_of_no_use_is_left_out() -> None:
    usual, ours = kinds(DataParallelTrainer(lambda: None)), kinds(FastStartTrainer(lambda: None, folder="/r"))
    assert BackendSetupCallback in ours
    assert usual - ours == {DatasetsCallback, PlacementGroupCleanerCallback}
    assert ours - usual == set()


@pytest.mark.parametrize(
    ("workers", "grows", "kind"),
    [(1, False, NonAutoscalingPolicy), (1, True, FixedScalingPolicy), ((1, 2), False, type(None))],
    ids=["fixed", "autoscaled", "elastic"],
)
def test_no_node_is_requested_without_an_autoscaler(
    workers: Any, grows: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray_internals, "read_autoscaler_limits", lambda: {"CPU": 4} if grows else None)
    monkeypatch.setattr(fast_start, "_apply_patches", lambda stack: None)
    monkeypatch.setattr(fast_start, "FastStartController", lambda _, **given_: given.update(given_))
    monkeypatch.setattr(fast_start, "run_controller", lambda _: None)
    trainer = FastStartTrainer(lambda: None, folder="/r", scaling_config=ScalingConfig(num_workers=workers))
    # An elastic run's policy is left as it is, whatever it is: None stands for it.
    policy = None if isinstance(workers, tuple) else FixedScalingPolicy(ScalingConfig())
    trainer._initialize_and_run_controller(scaling_policy=policy)
    assert type(given["scaling_policy"]) is kind


def test_a_fixed_policy_wants_its_number_of_workers_and_sends_no_request() -> None:
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
from orchestrator.ray_backend import cluster, fast_start
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
    runtime_env = {"env_vars": cluster.get_hook_variables()}
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
    run_folder = "/r"
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
    variables = cluster.get_worker_variables()
    assert used[0] in ahead, (ahead, cluster.serialize_runtime_env(variables), used)
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


# ------------------------------------------------------------------ the watch over the nodes of a run
PATIENCE_SECONDS = 10.0


class Actor:
    """Takes the notice as Ray's worker does, by `mark_preempt.remote`."""

    def __init__(self) -> None:
        self.notices: list[PreemptionInfo] = []
        self.heard = threading.Event()
        self.mark_preempt = SimpleNamespace(remote=self._mark)

    def _mark(self, info: PreemptionInfo) -> None:
        self.notices.append(info)
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


def test_every_worker_receives_the_notice_of_a_draining_node(draining: dict[str, int]) -> None:
    actors, watch = [Actor(), Actor()], ThreadPreemptionCallback()
    watch.after_worker_group_start(group(actors, ["here", "there"]))
    draining["elsewhere"] = 1000  # no node of ours
    draining["there"] = 2000
    try:
        assert all(actor.heard.wait(PATIENCE_SECONDS) for actor in actors)
    finally:
        watch.before_worker_group_shutdown(group([], []))
    assert [actor.notices for actor in actors] == 2 * [[PreemptionInfo(2000, {"there": [1]})]]


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
    assert first.notices == []
    assert second.notices == [PreemptionInfo(None, {"there": [0]})]


def test_a_failed_watch_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    before = set(watchers())  # of other tests, which may not have woken up since their end was requested
    ThreadPreemptionCallback().after_worker_group_start(None)
    assert "their preemption will come without notice" in caplog.text
    assert set(watchers()) <= before


# ------------------------------------------------------------------ logs of Ray Train's controllers
LOGGER = logging.getLogger("ray.train")


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    kept = (list(LOGGER.handlers), LOGGER.level, LOGGER.propagate)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_worker_id=lambda: "0a"))
    monkeypatch.setattr(LoggingManager, "get_log_directory", lambda: str(tmp_path / "first"))
    monkeypatch.setenv(fast_start.STRUCTURED_LOGGING_VARIABLE, "0")
    yield tmp_path
    LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = kept


def say(run: str, words: str) -> None:
    def log() -> None:
        with fast_start.patch_ray_train():
            logging.getLogger(f"{'ray.train'}.v2.somewhere").info(words)

    thread = threading.Thread(target=log, name=run)  # as the trainer names its own
    thread.start()
    thread.join()


def lines(folder: Path) -> list[str]:
    return [line.split(" ", 2)[2] for line in (folder / "ray-train-app-controller-0a.log").read_text().splitlines()]


def test_each_line_names_its_run(session: Path) -> None:
    runs = [threading.Thread(target=say, args=(f"m{number}", "started")) for number in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(lines(session / "first")) == [f"INFO m{number}: started" for number in range(3)]


def test_nothing_reaches_the_screen(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = logging.StreamHandler()
    logging.getLogger().addHandler(shown)
    try:
        say("m1", "started")
    finally:
        logging.getLogger().removeHandler(shown)
    assert lines(session / "first") == ["INFO m1: started"]
    assert capsys.readouterr() == ("", "")


def test_another_session_of_ray_s_gets_a_file_of_its_own(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say("m1", "one")
    monkeypatch.setattr(LoggingManager, "get_log_directory", lambda: str(session / "second"))
    say("m1", "two")
    assert (lines(session / "first"), lines(session / "second")) == (["INFO m1: one"], ["INFO m1: two"])


def test_ray_s_own_set_up_of_logs_is_used_on_request(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast_start.STRUCTURED_LOGGING_VARIABLE, "1")
    before = list(LOGGER.handlers)
    say("m1", "started")
    assert LOGGER.handlers == before


def test_jobs_set_the_switch() -> None:
    assert ray_env._RAY_VARIABLES[fast_start.STRUCTURED_LOGGING_VARIABLE] == "0"
