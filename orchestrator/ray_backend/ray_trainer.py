"""One run on the cluster: Ray Train around our worker."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from typing import Protocol, cast

from ray.exceptions import RayError
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.api.result import Result

from orchestrator.ray_backend import fast_start, worker_prestart
from orchestrator.ray_backend.failure_callback import FailureRecorderCallback
from orchestrator.ray_backend.fast_start import FastStartTrainer, PreemptionWatcherCallback
from orchestrator.ray_backend.launch_errors import LaunchError, RunFailedError
from orchestrator.ray_backend.process_group import ProcessGroupConfig
from orchestrator.ray_backend.run_spec import Placement, RunSpec
from orchestrator.training import attempts
from orchestrator.training.config import Outcome
from orchestrator.training.run_dir import load_finished_outcome

# Between looks whether an elastic run could have another number of workers; Ray's default is 60 s.
RESIZE_CHECK_SECONDS = 10.0
# More than the longest phase of training may take. Dead processes are noticed at once, dead nodes by Ray's own checks.
COLLECTIVE_MARGIN_SECONDS = 60


class StopUrls(Protocol):
    """What of a lease a run's workers look at."""

    @property
    def stop_flag(self) -> str:
        """URL of a file whose existence asks them to save and stop."""

    @property
    def successor(self) -> str:
        """URL of a file whose existence says that another driver took over."""


def launch_run(spec: RunSpec, lease: StopUrls, gpus: float) -> Outcome:
    """Train a run to its end, or return at once what it ended with. Blocks; one thread per run may call it.

    Raises RunFailedError when its workers crashed too often, LaunchError when Ray itself failed.
    """
    if (done := load_finished_outcome(spec.folder)) is not None:
        return done
    spec.save()
    # Ray keeps nothing of ours: its storage is scratch and its own for each launch, so that no ledger of an earlier
    # one is ever read (pitfalls A3, A8).
    scratch = tempfile.mkdtemp(prefix="orchestrator-ray-")
    worker_prestart.claim_workers(spec.placement.workers)
    try:
        result = _fit_while_progressing(spec, lease, gpus, scratch)
    except WorkerGroupError as error:
        raise RunFailedError(f"{spec.name}: {_read_watchdog_message(spec.folder) or _get_last_line(error)}") from error
    except (TrainingFailedError, RayError) as error:
        raise LaunchError(f"{spec.name}: {_get_last_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if result.return_value is None:
        raise LaunchError(f"{spec.name}: its workers ended without a word")
    return Outcome.from_dict(result.return_value)


def _fit_while_progressing(spec: RunSpec, lease: StopUrls, gpus: float, scratch: str) -> Result:
    """Train, as long as each launch comes farther than the one before.

    Ray counts restarts over a trainer's whole life; a run of weeks has more than one that gets nowhere may have.
    """
    while True:
        before = attempts.list_valid_checkpoints(spec.folder)
        try:
            # V2's trainer gives V2's result, whatever its annotation says.
            return cast(Result, _build_trainer(spec, lease, gpus, tempfile.mkdtemp(dir=scratch)).fit())
        except WorkerGroupError:
            if not attempts.has_progressed(spec.folder, before):
                raise


def _build_trainer(spec: RunSpec, lease: StopUrls, gpus: float, scratch: str) -> FastStartTrainer:
    return FastStartTrainer(
        fast_start.run_train_worker,
        folder=spec.folder,
        train_loop_config=spec.build_train_job(lease.stop_flag, lease.successor).to_dict(),
        scaling_config=ScalingConfig(
            num_workers=_choose_num_workers(spec.placement),
            elastic_resize_monitor_interval_s=RESIZE_CHECK_SECONDS,
            use_gpu=gpus > 0,
            resources_per_worker=_build_worker_resources(spec, gpus),
        ),
        backend_config=ProcessGroupConfig(
            backend="nccl" if gpus > 0 else "gloo", timeout_s=_compute_collective_timeout(spec)
        ),
        run_config=RunConfig(
            name=spec.name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=spec.placement.max_restarts),
            worker_runtime_env=worker_prestart.build_runtime_env(),
            callbacks=[FailureRecorderCallback(spec.folder, spec.placement.is_elastic), PreemptionWatcherCallback()],  # type: ignore[list-item]
        ),
    )


def _compute_collective_timeout(spec: RunSpec) -> int:
    """Longer than a rank may keep the others waiting: the watchdogs' limits come first, which name a cause."""
    limits = spec.cadence.limits
    longest = max(limits.start_seconds, limits.step_seconds, limits.evaluation_seconds, 2 * limits.save_seconds)
    return round(longest) + COLLECTIVE_MARGIN_SECONDS


def _choose_num_workers(placement: Placement) -> int | tuple[int, int]:
    """A number, or the least and the most."""
    return (placement.fewest_workers, placement.workers) if placement.is_elastic else placement.workers


def _build_worker_resources(spec: RunSpec, gpus: float) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": spec.placement.cpus_per_worker}
    return resources | ({"GPU": gpus} if gpus > 0 else {})


def _read_watchdog_message(folder: str) -> str | None:
    """Return what a watchdog of the last attempt said before it ended its worker; Ray can only suppose why it died."""
    with suppress(OSError):
        newest = attempts.load_latest_attempt(folder)
        return newest[1].stall_causes[0] if newest is not None and newest[1].stall_causes else None
    return None


def _get_last_line(error: BaseException) -> str:
    """Return the cause, which Ray puts at the end of a long text, without the list of what it supposes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
