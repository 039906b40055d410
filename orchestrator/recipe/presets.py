"""Recipes by name: functions called network_dataset[_variation], never hardware.

The first line of a docstring is the help on the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.data.config import AugmentationConfig, OrderConfig, PreprocessingConfig
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe.config import AveragingConfig, Recipe
from orchestrator.recipe.schedule import PolynomialDecay, StepDecay


def googlenet_imagenet() -> Recipe:
    """GoogLeNet on ImageNet-1k as in the paper: 224 px, 4% every 8 epochs, 250 epochs."""
    return Recipe(
        name="googlenet-imagenet",
        epochs=250,  # Caffe replication; the paper names no number
        batch_size=256,  # the replication's 32 at rate 0.01, scaled linearly for data parallelism (arXiv 1706.02677)
        schedule=StepDecay(base_rate=0.08, decay_factor=0.96, decay_epochs=8.0, warmup_epochs=5.0),
        averaging=AveragingConfig(start=0.9),
    )


def googlenet_imagenet_wide() -> Recipe:
    """The wider GoogLeNet of the ensemble on ImageNet-1k: a quarter more filters everywhere."""
    base = googlenet_imagenet()
    return base.model_copy(
        update={
            "name": "googlenet-imagenet-wide",
            # Section 7 says "a wider version" and gives no factor.
            "model": base.model.model_copy(update={"width": 1.25}),
        }
    )


def googlenet_digits() -> Recipe:
    """GoogLeNet on the embedded handwritten digits: 32 px, quarter width; about a minute of one core."""
    return Recipe(
        name="googlenet-digits",
        epochs=26,
        batch_size=32,
        model=GoogLeNetConfig(image_size=32, width=0.25),
        preprocessing=PreprocessingConfig(mean=(78.0, 78.0, 78.0), scale=1 / 58.0),
        # Digits fill their image: crops below 40% of it cut them to pieces (21% error instead of 5%).
        augmentation=AugmentationConfig(area=(0.4, 1.0)),
        order=OrderConfig(lanes=8, window=256),
        schedule=PolynomialDecay(base_rate=0.01, power=0.5, warmup_epochs=2.0),
        averaging=AveragingConfig(start=0.75),
    )


def googlenet_tiny() -> Recipe:
    """For tests: GoogLeNet on the digits, a tenth of the width, two epochs; learns next to nothing."""
    base = googlenet_digits()
    return base.model_copy(
        update={
            "name": "googlenet-tiny",
            "epochs": 2,
            "batch_size": 64,
            "model": base.model.model_copy(update={"width": 0.1}),
            "schedule": PolynomialDecay(base_rate=0.02, power=0.5),
        }
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    recipe().name: recipe for recipe in (googlenet_digits, googlenet_imagenet, googlenet_imagenet_wide, googlenet_tiny)
}
DEFAULT = "googlenet-digits"
# Made for the embedded dataset; the others need one.
ON_DIGITS = ("googlenet-digits", "googlenet-tiny")


def summary(name: str) -> str:
    """The one line that says what a preset is."""
    return (PRESETS[name].__doc__ or "").splitlines()[0]
