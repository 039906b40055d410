"""Configurations small enough to hold in the head, with every feature the real ones use."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.flags import Flag


class StepDecay(Config):
    """Falls by a factor every few epochs."""

    kind: Literal["step"] = "step"
    base_rate: float = Field(0.01, gt=0)
    """Learning rate at the start."""
    decay_factor: float = Field(0.96, gt=0, le=1)
    """Factor on the rate."""
    decay_epochs: int = Field(8, gt=0)


class Polynomial(Config):
    """Falls to zero along a power of what is left."""

    kind: Literal["polynomial"] = "polynomial"
    base_rate: float = Field(0.02, gt=0)
    power: float = Field(0.5, gt=0)


class Plain(Config):
    """Pixels as they are."""

    kind: Literal["plain"] = "plain"


class Scheduled(Config):
    """Noise that falls as a schedule says."""

    kind: Literal["scheduled"] = "scheduled"
    noise: Annotated[StepDecay | Polynomial, Field(discriminator="kind")] = StepDecay()
    pair: tuple[int, str] = (1, "a")


class Augment(Config):
    """A union whose variant holds a union, and one that may be absent."""

    ops: Annotated[Plain | Scheduled, Field(discriminator="kind")] = Plain()
    other: Annotated[StepDecay | Polynomial, Field(discriminator="kind")] | None = None


class Member(Config):
    """One model of an ensemble."""

    seed: int = 0
    width: float = 1.0


class Pieces(Config):
    """One value after another; there is no default to begin with."""

    kind: Literal["pieces"] = "pieces"
    pieces: tuple[Member, ...] = Field(min_length=1)


class Handed(Config):
    """A union whose variant has to be said, and a field that no command line may set."""

    schedule: Annotated[StepDecay | Pieces, Field(discriminator="kind")] = StepDecay()
    origin: Annotated[Member | None, Flag(settable=False)] = None
    epochs: int = 1


class Recipe(Config):
    """A training run."""

    schedule: Annotated[StepDecay | Polynomial, Field(discriminator="kind")] = StepDecay()
    """Course of the learning rate."""
    scales: tuple[float, ...] = (0.08, 1)
    """Share of the image's area that a crop covers."""
    epochs: int = Field(90, gt=0)
    clip: float | None = None
    pooling: Literal["mean", "max"] = "mean"
    loss: Literal["softmax", "logistic"] = "softmax"
    members: tuple[Member, ...] = (Member(),)

    @model_validator(mode="after")
    def _epochs_suffice(self) -> Self:
        if isinstance(self.schedule, StepDecay) and self.epochs < self.schedule.decay_epochs:
            least = self.schedule.decay_epochs
            raise ValueError(f"epochs must be {least} or more for a step schedule, got {self.epochs}")
        return self


class Train(Config):
    """A job."""

    data: str = "data"
    """URL of the shards."""
    storage: str | None = None
    cache: str = "cache"
    dry_run: bool = False
    """Print the plan only."""
    recipe: Annotated[Recipe, Flag(name="")] = Recipe()


class Predict(Config):
    """A job with positional arguments."""

    images: Annotated[tuple[str, ...], Flag(positional=True)] = ()
    """Files to look at."""
    top: int = Field(5, gt=0)
