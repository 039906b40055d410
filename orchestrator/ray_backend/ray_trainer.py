"""One run on the cluster: Ray Train around the training."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from typing import Any

import ray.train
from ray.exceptions import RayError
from ray.train import TrainingFailedError, WorkerGroupError

from orchestrator.ray_backend import cluster, ray_env
from orchestrator.ray_backend.failure_callback import FailureRecorder
from orchestrator.ray_backend.launch_errors import JobError, RunFailedError, get_last_line
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.worker import ProcessGroupConfig, run_train_worker
from orchestrator.training import attempts
from orchestrator.training.config import Outcome, TrainJob
from orchestrator.training.run_dir import load_finished_outcome

_train: Any = ray.train  # for type checkers its configs and results are those of the old Ray Train, V1
# Between checks whether an elastic run could have another number of workers; Ray's default is 60 s.
RESIZE_CHECK_SECONDS = 10.0
# More than the longest phase of training may take. Dead processes are noticed within seconds, dead nodes by Ray.
COLLECTIVE_MARGIN_SECONDS = 60


def launch_run(spec: RunSpec, stop_flag: str, successor: str, gpus: float) -> Outcome:
    """Train a run to its end; return the outcome. A finished run is not retrained.

    Blocks; several threads may call it, for one run each. The two URLs are those of the lease under which it is
    trained. gpus: of each worker. Raises RunFailedError when its workers crashed too often, JobError when Ray failed.
    """
    if (done := load_finished_outcome(spec.folder)) is not None:
        return done
    spec.save()
    job = spec.build_train_job(stop_flag, successor)
    # A new scratch folder for each launch: Ray Train would resume from its own records of an earlier one.
    scratch = tempfile.mkdtemp(prefix="orchestrator-ray-")
    cluster.claim_workers(spec.placement.workers)
    try:
        result = _fit_while_progressing(spec, job, gpus, scratch)
    except WorkerGroupError as error:
        raise RunFailedError(f"{spec.name}: {_read_watchdog_message(spec.folder) or get_last_line(error)}") from error
    except (TrainingFailedError, RayError) as error:
        raise JobError(f"{spec.name}: {get_last_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if result.return_value is None:
        raise JobError(f"{spec.name}: workers exited without returning a result")
    return Outcome.from_dict(result.return_value)


def _fit_while_progressing(spec: RunSpec, job: TrainJob, gpus: float, scratch: str) -> Any:
    """Train, as long as each launch comes farther than the one before; return Ray's result."""
    while True:  # Ray counts restarts over a trainer's life; a run of weeks has more than may pass without progress
        before = attempts.list_valid_checkpoints(spec.folder)
        try:
            return _build_trainer(spec, job, gpus, tempfile.mkdtemp(dir=scratch)).fit()
        except WorkerGroupError:
            if not attempts.has_progressed(spec.folder, before):
                raise


def _build_trainer(spec: RunSpec, job: TrainJob, gpus: float, scratch: str) -> Any:
    """Return the trainer of the fast start, or Ray Train's own where that is off."""
    fast_start, placement = ray_env.load_fast_start(), spec.placement
    recorder = FailureRecorder(spec.folder, placement.is_elastic)
    options: dict[str, Any] = {
        "train_loop_config": {"job": job.to_dict(), "fast_start": fast_start is not None},
        "scaling_config": _train.ScalingConfig(
            num_workers=(placement.fewest_workers, placement.workers) if placement.is_elastic else placement.workers,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_SECONDS,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": placement.cpus_per_worker} | ({"GPU": gpus} if gpus > 0 else {}),
        ),
        "run_config": _train.RunConfig(
            name=spec.name,
            storage_path=scratch,
            failure_config=_train.FailureConfig(max_failures=placement.max_restarts),
            worker_runtime_env={"env_vars": cluster.get_hook_variables()},
            callbacks=[recorder if fast_start is None else fast_start.ControllerEventCallback(recorder)],
        ),
    }
    # More than a rank may keep the others waiting: the watchdogs, which name a cause, come first.
    limits = spec.cadence.limits
    longest = max(limits.start_seconds, limits.step_seconds, limits.evaluation_seconds, 2 * limits.save_seconds)
    timeout = round(longest) + COLLECTIVE_MARGIN_SECONDS
    backend = ProcessGroupConfig("nccl" if gpus > 0 else "gloo", timeout)
    if fast_start is not None:
        return fast_start.FastStartTrainer(run_train_worker, spec.folder, backend_config=backend, **options)
    from ray.train.torch import TorchTrainer  # it imports torch, which the fast start does without in the driver

    return TorchTrainer(run_train_worker, torch_config=backend, **options)  # type: ignore[arg-type]  # may return values


def _read_watchdog_message(folder: str) -> str | None:
    """Return what a watchdog of the last attempt wrote before it ended its worker; Ray does not know that cause."""
    with suppress(OSError):
        newest = attempts.load_latest_attempt(folder)
        return newest[1].stall_causes[0] if newest is not None and newest[1].stall_causes else None
    return None
