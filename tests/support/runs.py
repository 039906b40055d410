"""Training runs of seconds: tiny recipes and jobs, a launcher's context that records, and readers of a run's files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from orchestrator.checkpoint import checkpoint, checkpoint_dir
from orchestrator.checkpoint.checkpoint import FinalWeights
from orchestrator.data import manifest, sample_audit
from orchestrator.data.dataloader import Batch
from orchestrator.data.sample_audit import AuditRecord
from orchestrator.data.sampler import EpochOrder
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe import presets
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.training import trainer
from orchestrator.training.callbacks import watchdog
from orchestrator.training.config import Cadence, Outcome, TrainJob
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.rank_sync import StepSums
from orchestrator.training.run_dir import get_checkpoints_dir, get_final_weights_dir, get_journal_dir
from orchestrator.training.train_step import TrainStep
from tests.support.ranks import Ranks

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)
NEVER = 1e9  # seconds between checkpoints


def first_optimizer_step() -> None:
    """Let torch import its compiler, which sets an environment variable for the rest of the process."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0).step()


def recipe(**changes: Any) -> Recipe:
    """The tiny preset for the tiny dataset of tests/support/tiny_shards.py: 32 px, three epochs of batches of 8."""
    base = presets.googlenet_tiny()
    small = {
        "epochs": 3,
        "batch_size": 8,
        "model": GoogLeNetConfig(image_size=32, width=0.1),
        "order": base.order.model_copy(update={"lanes": 8, "window": 4}),
        "averaging": base.averaging.model_copy(update={"start": 0.3}),
    }
    return Recipe.from_dict(base.model_copy(update=small | changes).to_dict())


def job(data: Path, folder: Path, of: Recipe, **cadence: Any) -> TrainJob:
    """Return a job on the dataset at `data` that polls every step; checkpoints by the clock are off by default."""
    chosen = Cadence(**({"checkpoint_seconds": NEVER, "pulse_steps": 1, "log_steps": 1} | cadence))
    return TrainJob(
        recipe=of,
        cadence=chosen,
        data=str(data),
        dataset_digest=manifest.load(str(data)).digest(),
        folder=str(folder),
        stop_flag=str(folder / "stop"),
    )


@dataclass
class RecordingContext:
    """Keeps what is reported; raises `error` at the first report if there is one."""

    error: Exception | None = None
    reports: list[dict[str, float]] = field(default_factory=list)
    notice: bool = False  # a node will be taken away
    enough: int | None = None  # the epoch after which the run ends

    def report(self, metrics: dict[str, float]) -> None:
        if self.error is not None:
            raise self.error
        self.reports.append(metrics)

    def has_preemption_notice(self) -> bool:
        return self.notice

    def should_continue(self) -> bool:
        return self.enough is None or self.reports[-1]["epoch"] < self.enough


def train(of: TrainJob, world: DistributedContext = ALONE, context: RecordingContext | None = None) -> Outcome:
    """Run one attempt that polls the stop flag often."""
    with patch.object(watchdog, "POLL_SECONDS", 0.002):
        return trainer.run_training(of, world, context or RecordingContext())


def train_on_rank(rank: int, workers: int, payload: dict[str, Any]) -> dict[str, Any]:
    """Run an attempt on one of several processes; return its outcome."""
    return train(TrainJob.from_dict(payload), DistributedContext(rank, workers, CPU)).to_dict()


def train_by(ranks: Ranks, workers: int, of: TrainJob) -> list[Outcome]:
    """Run one attempt on several processes; return each rank's outcome. Raises the first rank's error."""
    answers = ranks.run(train_on_rank, workers, of.to_dict())
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return [Outcome.from_dict(answer) for answer in answers]


def train_and_note(rank: int, workers: int, payload: dict[str, Any]) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """Run an attempt; return its outcome, and the sample ids of this rank by global step."""
    noted: dict[int, list[int]] = {}
    step = TrainStep.__call__

    def noting(self: TrainStep, batch: Batch) -> StepSums:
        noted[self._state.progress.step] = batch.ids.tolist()
        return step(self, batch)

    with patch.object(TrainStep, "__call__", noting):
        outcome = train_on_rank(rank, workers, payload)
    return outcome, noted


def plan(of: TrainJob, epoch: int) -> EpochOrder:
    """Return the order of one of its epochs."""
    counts = tuple(shard.samples for shard in manifest.load(of.data).shards("train"))
    recipe = of.recipe
    return EpochOrder(counts, recipe.seeds.order, epoch, recipe.order.lanes, recipe.order.window)


def delivered(of: TrainJob) -> AuditRecord:
    """Return the audit record that is kept with the final weights."""
    return sample_audit.parse_record(checkpoint.load_audit(get_final_weights_dir(of.folder)), "final")


def as_planned(of: TrainJob) -> bool:
    """Return whether every epoch of a finished run was delivered as planned."""
    record = delivered(of)
    return len(record.epochs) == of.recipe.epochs and not any(
        sample_audit.compare_with_plan(
            epoch, order, of.recipe.batch_size, order.samples // of.recipe.batch_size
        ).problems
        for epoch in record.epochs
        for order in [plan(of, epoch.epoch)]
    )


def ask_to_stop(of: TrainJob) -> None:
    """Set the stop flag."""
    file_io.write_bytes(of.stop_flag, b"")


def stop_asking(of: TrainJob) -> None:
    """Remove the stop flag."""
    file_io.remove(of.stop_flag)


def events(of: TrainJob, kind: str | None = None) -> list[Event]:
    """Return the journal of a run, or its events of one kind."""
    found, _ = journal.read_events(get_journal_dir(of.folder))
    return [event for event in found if kind in (None, event.kind)]


def saved_at(of: TrainJob) -> list[int]:
    """Return the samples seen at each checkpoint, newest first."""
    return [place.samples for place in checkpoint_dir.list_checkpoints(get_checkpoints_dir(of.folder))]


def final(of: TrainJob) -> FinalWeights:
    """Return the final weights."""
    return checkpoint.load_final_weights(get_final_weights_dir(of.folder))


def outcome(of: TrainJob) -> Outcome:
    """Return the outcome that rank 0 wrote."""
    return Outcome.from_dict(json.loads(Path(of.folder, "outcome.json").read_bytes()))


def identical(one: FinalWeights, other: FinalWeights) -> bool:
    """Return whether all weights, averaged and raw, are equal in every bit."""
    return farthest(one, other) == 0.0 and one.digest == other.digest


def farthest(one: FinalWeights, other: FinalWeights) -> float:
    """Return the largest difference between weights, averaged and raw, as a share of their tensor's largest weight."""
    assert one.raw.keys() == other.raw.keys() == one.averaged.keys() == other.averaged.keys()
    pairs = [
        (left[name].double(), right[name].double())
        for left, right in ((one.raw, other.raw), (one.averaged, other.averaged))
        for name in left
    ]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-3)) for a, b in pairs)
