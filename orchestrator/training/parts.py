"""What the training loop works with; built by entry.py."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.data.loader import Loader
from orchestrator.recipe.schedule import rate_at
from orchestrator.training.best import Best
from orchestrator.training.delivery import Delivery
from orchestrator.training.incident import Goodput
from orchestrator.training.job import Context, TrainJob
from orchestrator.training.recorder import Recorder
from orchestrator.training.saver import Saver
from orchestrator.training.state import TrainState
from orchestrator.training.step import Stepper
from orchestrator.training.watch import Watch
from orchestrator.training.watchdog import Watchdog
from orchestrator.training.world import World


@dataclass
class Parts:
    """One rank's; `watch` and `best` are rank 0's alone."""

    job: TrainJob
    world: World
    context: Context
    state: TrainState
    stepper: Stepper
    training: Loader
    validation: Loader
    training_counts: tuple[int, ...]
    validation_counts: tuple[int, ...]
    delivery: Delivery
    recorder: Recorder
    saver: Saver
    watchdog: Watchdog
    goodput: Goodput
    watch: Watch | None
    best: Best | None
    preempted: bool = False  # whether a rank has a notice that was answered with a checkpoint; the same on all ranks

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        recipe, progress = self.job.recipe, self.state.progress
        return rate_at(recipe.schedule, progress.samples, progress.samples_per_epoch, recipe.epochs)
