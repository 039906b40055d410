"""What the training loop works with; built by entry.py."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.data.dataloader import BatchLoader
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.training.attempts import Goodput
from orchestrator.training.callbacks.best_checkpoint import BestCheckpoint
from orchestrator.training.callbacks.checkpointer import Checkpointer
from orchestrator.training.callbacks.journal_logger import JournalLogger
from orchestrator.training.callbacks.stop_monitor import StopMonitor
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import LauncherContext, TrainJob
from orchestrator.training.delivered_samples import SampleTracker
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.train_state import TrainState
from orchestrator.training.train_step import TrainStep


@dataclass
class RunContext:
    """One rank's; `watch` and `best` are rank 0's alone."""

    job: TrainJob
    world: DistributedContext
    launcher: LauncherContext
    state: TrainState
    train_step: TrainStep
    train_loader: BatchLoader
    val_loader: BatchLoader
    train_shard_samples: tuple[int, ...]
    val_shard_samples: tuple[int, ...]
    sample_tracker: SampleTracker
    journal_logger: JournalLogger
    checkpointer: Checkpointer
    watchdog: Watchdog
    goodput: Goodput
    stop_monitor: StopMonitor | None
    best_checkpoint: BestCheckpoint | None
    preemption_handled: bool = (
        False  # whether a rank has a notice that was answered with a checkpoint; the same on all ranks
    )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        recipe, progress = self.job.recipe, self.state.progress
        return compute_lr(recipe.schedule, progress.samples, progress.samples_per_epoch, recipe.epochs)
