"""One run on the cluster: Ray Train's TorchTrainer around our worker."""

from __future__ import annotations

import shutil
import tempfile

from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from orchestrator.launch import worker
from orchestrator.launch.config import RunSpec
from orchestrator.launch.lease import Lease
from orchestrator.storage import files
from orchestrator.training.job import Outcome, TrainJob
from orchestrator.training.outcome import finished

# A dead peer is noticed by the collective after this long; Ray's own watch is much faster for dead processes.
COLLECTIVE_SECONDS = 300


class RunFailedError(RuntimeError):
    """A run's workers crashed more often than its placement allows; the message ends with the last cause."""


class LaunchError(RuntimeError):
    """A run could not be launched, or its controller died; another launch may work."""


def launch(spec: RunSpec, lease: Lease, gpus: float) -> Outcome:
    """Train a run to its end, or return at once what it ended with. Blocks; one thread per run may call it.

    Raises RunFailedError when its workers crashed too often, LaunchError when Ray itself failed.
    """
    if (done := finished(spec.folder)) is not None:
        return done
    kept = spec.model_copy(update={"destination": spec.destination.redacted()})
    files.write_bytes(files.join(spec.folder, "spec.json"), kept.to_json().encode())
    # Ray keeps nothing of ours: its storage is scratch and its own for each launch, so that no ledger of an earlier
    # one is ever read (pitfalls A3, A8).
    scratch = tempfile.mkdtemp(prefix="orchestrator-ray-")
    try:
        result = _trainer(spec, lease, gpus, scratch).fit()
    except WorkerGroupError as error:
        raise RunFailedError(f"{spec.name}: {_last_line(error)}") from error
    except (TrainingFailedError, RayError) as error:
        raise LaunchError(f"{spec.name}: {_last_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Outcome.from_dict(result.return_value)  # type: ignore[attr-defined]


def _trainer(spec: RunSpec, lease: Lease, gpus: float, scratch: str) -> TorchTrainer:
    return TorchTrainer(
        worker.train,  # type: ignore[arg-type]  # V2 hands its return value back, the annotation is V1's
        train_loop_config=_job(spec, lease).to_dict(),
        scaling_config=ScalingConfig(
            num_workers=spec.placement.workers,
            use_gpu=gpus > 0,
            resources_per_worker=_resources(spec, gpus),
        ),
        torch_config=TorchConfig(backend="nccl" if gpus > 0 else "gloo", timeout_s=COLLECTIVE_SECONDS),
        run_config=RunConfig(
            name=spec.name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=spec.placement.max_restarts),
        ),
    )


def _job(spec: RunSpec, lease: Lease) -> TrainJob:
    return TrainJob(
        recipe=spec.recipe,
        cadence=spec.cadence,
        data=spec.destination.data,
        dataset_digest=spec.dataset_digest,
        folder=spec.folder,
        stop_flag=lease.stop_flag,
        threads=spec.placement.cpus_per_worker,
        reading=spec.placement.reading,
    )


def _resources(spec: RunSpec, gpus: float) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": spec.placement.cpus_per_worker}
    return resources | ({"GPU": gpus} if gpus > 0 else {})


def _last_line(error: BaseException) -> str:
    """The cause: Ray puts it at the end of a long text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
