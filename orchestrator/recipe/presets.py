"""Recipes by name: functions called network_dataset[_variation], never hardware.

The first line of a docstring is the help on the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.data.config import NO_PHOTOMETRIC, AugmentationConfig, OrderConfig, PreprocessingConfig
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe import baseline_presets
from orchestrator.recipe.config import LossConfig, Recipe, RunningMean, SGDConfig
from orchestrator.recipe.lr_schedule import CosineDecay, PolynomialDecay, StepDecay

# Batch norm takes the place of LRN and of biases (arXiv 1502.03167, section 3.2).
_BATCH_NORM_MODEL = GoogLeNetConfig(batch_norm=True, lrn=False)


def googlenet_imagenet() -> Recipe:
    """GoogLeNet on ImageNet-1k as in the paper: 224 px, 4% every 8 epochs, 250 epochs."""
    return Recipe(
        name="googlenet-imagenet",
        epochs=250,  # Caffe replication; the paper names no number
        batch_size=256,  # the replication's 32 at rate 0.01, scaled linearly for data parallelism (arXiv 1706.02677)
        schedule=StepDecay(base_rate=0.08, decay_factor=0.96, decay_epochs=8.0, warmup_epochs=5.0),
        averaging=RunningMean(start=0.9),
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
        augmentation=AugmentationConfig(area=(0.4, 1.0), photometric=NO_PHOTOMETRIC),
        order=OrderConfig(lanes=8, window=256),
        schedule=PolynomialDecay(base_rate=0.01, power=0.5, warmup_epochs=2.0),
        averaging=RunningMean(start=0.75),
    )


def googlenet_imagenet_naive() -> Recipe:
    """An ablation: naive Inception modules (Figure 2a) on ImageNet-1k; eight times the work, 14 times the weights."""
    base = googlenet_imagenet()
    model = base.model.model_copy(update={"module": "naive"})
    return base.model_copy(update={"name": "googlenet-imagenet-naive", "model": model})


def googlenet_digits_naive() -> Recipe:
    """The ablation on the digits: naive Inception modules (Figure 2a)."""
    base = googlenet_digits()
    model = base.model.model_copy(update={"module": "naive"})
    return base.model_copy(update={"name": "googlenet-digits-naive", "model": model})


def googlenet_bn_imagenet() -> Recipe:
    """Not the paper's: GoogLeNet with batch norm, label smoothing and a cosine on ImageNet-1k, 90 epochs."""
    return Recipe(
        name="googlenet-bn-imagenet",
        epochs=90,
        batch_size=256,
        model=_BATCH_NORM_MODEL,
        schedule=CosineDecay(base_rate=0.1, warmup_epochs=5.0),  # arXiv 1706.02677 for a batch of 256
        optimizer=SGDConfig(weight_decay=1e-4),  # arXiv 1706.02677
        loss=LossConfig(label_smoothing=0.1),  # arXiv 1512.00567, section 7
        averaging=RunningMean(start=0.9),
    )


def googlenet_bn_digits() -> Recipe:
    """Not the paper's: the variant with batch norm, label smoothing and a cosine on the digits."""
    base, modern = googlenet_digits(), googlenet_bn_imagenet()
    return base.model_copy(
        update={
            "name": "googlenet-bn-digits",
            "model": base.model.model_copy(update={"batch_norm": True, "lrn": False}),
            "schedule": CosineDecay(base_rate=0.05, warmup_epochs=2.0),
            "optimizer": modern.optimizer,
            "loss": modern.loss,
        }
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
    recipe().name: recipe
    for recipe in (
        googlenet_digits,
        googlenet_imagenet,
        googlenet_imagenet_wide,
        googlenet_imagenet_naive,
        googlenet_digits_naive,
        googlenet_bn_imagenet,
        googlenet_bn_digits,
        baseline_presets.lenet_5_digits,
        baseline_presets.alexnet_imagenet,
        baseline_presets.zfnet_imagenet,
        baseline_presets.nin_imagenet,
        baseline_presets.vgg_16_imagenet,
        baseline_presets.spp_net_imagenet,
        googlenet_tiny,
    )
}
DEFAULT = "googlenet-digits"
# Made for the embedded dataset; the others need one.
DIGITS_PRESETS = tuple(name for name in PRESETS if "-digits" in name or name == "googlenet-tiny")


def get_summary(name: str) -> str:
    """The one line that says what a preset is."""
    return (PRESETS[name].__doc__ or "").splitlines()[0]
