"""The only clock: samples seen. Epoch, step and learning rate are functions of it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """How far a run is. An epoch is `steps_per_epoch` global batches; its ragged tail is dropped by plan."""

    samples: int
    batch_size: int
    steps_per_epoch: int

    @property
    def step(self) -> int:
        """Global batches done since the start."""
        return self.samples // self.batch_size

    @property
    def epoch(self) -> int:
        """Whole epochs done, which is also the number of the epoch in progress."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Global batches done of the epoch in progress."""
        return self.step % self.steps_per_epoch

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch, its ragged tail left out."""
        return self.steps_per_epoch * self.batch_size

    @property
    def epochs_done(self) -> float:
        """Epochs done, the part of the present one included; the time axis of schedules."""
        return self.step / self.steps_per_epoch

    def advance(self) -> Progress:
        """After one more global batch."""
        return replace(self, samples=self.samples + self.batch_size)
