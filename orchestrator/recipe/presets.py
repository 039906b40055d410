"""Recipes by name: functions called network_dataset[_variation], never hardware.

The first line of a docstring is the help on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.config.overrides import apply_overrides
from orchestrator.data import config as data
from orchestrator.data.config import NO_PHOTOMETRIC, AugmentationConfig, PhotometricConfig
from orchestrator.models import config as networks
from orchestrator.models.config import AnyModelConfig, GoogLeNetConfig
from orchestrator.recipe.config import LossConfig, Recipe, RunningMean, SGDConfig
from orchestrator.recipe.lr_schedule import CosineDecay, PolynomialDecay, StepDecay


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
    # Section 7 says "a wider version" and gives no factor.
    return _vary(googlenet_imagenet(), "googlenet-imagenet-wide", {"model.width": 1.25})


def googlenet_digits() -> Recipe:
    """GoogLeNet on the embedded handwritten digits: 32 px, quarter width; about a minute of one core."""
    return Recipe(
        name="googlenet-digits",
        epochs=26,
        batch_size=32,
        model=GoogLeNetConfig(image_size=32, width=0.25),
        preprocessing=data.PreprocessingConfig(mean=(78.0, 78.0, 78.0), scale=1 / 58.0),
        # Digits fill their image: crops below 40% of it cut them to pieces (21% error instead of 5%).
        augmentation=AugmentationConfig(area=(0.4, 1.0), photometric=NO_PHOTOMETRIC),
        order=data.OrderConfig(lanes=8, window=256),
        schedule=PolynomialDecay(base_rate=0.01, power=0.5, warmup_epochs=2.0),
        averaging=RunningMean(start=0.75),
    )


def googlenet_imagenet_naive() -> Recipe:
    """An ablation: naive Inception modules (Figure 2a) on ImageNet-1k; eight times the work, 14 times the weights."""
    return _vary(googlenet_imagenet(), "googlenet-imagenet-naive", {"model.module": "naive"})


def googlenet_digits_naive() -> Recipe:
    """The ablation on the digits: naive Inception modules (Figure 2a)."""
    return _vary(googlenet_digits(), "googlenet-digits-naive", {"model.module": "naive"})


def googlenet_bn_imagenet() -> Recipe:
    """Not the paper's: GoogLeNet with batch norm, label smoothing and a cosine on ImageNet-1k, 90 epochs."""
    return Recipe(
        name="googlenet-bn-imagenet",
        epochs=90,
        batch_size=256,
        # Batch norm takes the place of LRN and of biases (arXiv 1502.03167, section 3.2).
        model=GoogLeNetConfig(batch_norm=True, lrn=False),
        schedule=CosineDecay(base_rate=0.1, warmup_epochs=5.0),  # arXiv 1706.02677 for a batch of 256
        optimizer=SGDConfig(weight_decay=1e-4),  # arXiv 1706.02677
        loss=LossConfig(label_smoothing=0.1),  # arXiv 1512.00567, section 7
        averaging=RunningMean(start=0.9),
    )


def googlenet_bn_digits() -> Recipe:
    """Not the paper's: the variant with batch norm, label smoothing and a cosine on the digits."""
    modern = googlenet_bn_imagenet()
    changes = {
        "model.batch_norm": True,
        "model.lrn": False,
        "schedule": CosineDecay(base_rate=0.05, warmup_epochs=2.0),
        "optimizer": modern.optimizer,
        "loss": modern.loss,
    }
    return _vary(googlenet_digits(), "googlenet-bn-digits", changes)


def googlenet_tiny() -> Recipe:
    """For tests: GoogLeNet on the digits, a tenth of the width, two epochs; learns next to nothing."""
    schedule = PolynomialDecay(base_rate=0.02, power=0.5)
    changes = {"epochs": 2, "batch_size": 64, "model.width": 0.1, "schedule": schedule}
    return _vary(googlenet_digits(), "googlenet-tiny", changes)


def _vary(base: Recipe, name: str, changes: Mapping[str, Any]) -> Recipe:
    return apply_overrides(base, {"name": name, **changes})


# ------------------------------------------------------------------ baselines, trained as by their authors
# Two things differ in all of them. A crop of fixed size out of an image whose shorter side is 256 becomes a square with
# the same share of the image's area, from anywhere in the image. And weights start with He's variance (models.registry)
# and are averaged over the last hundredth of training, in which the rate is lowest.
_LIGHTING = PhotometricConfig(brightness=0.0, contrast=0.0, saturation=0.0, lighting=0.1)  # Krizhevsky 2012, 4.1


def _make_baseline(
    model: AnyModelConfig, epochs: int, batch_size: int, decay_epochs: float,
    photometric: PhotometricConfig = NO_PHOTOMETRIC, smallest_area: float = 0.59,
) -> Recipe:  # fmt: skip
    """Return a baseline's recipe on ImageNet-1k: rate 0.01, a tenth every `decay_epochs`."""
    return Recipe(
        name=f"{model.kind}-imagenet",
        epochs=epochs,
        batch_size=batch_size,
        model=model,
        # 224 and 227 of 256 pixels: 77% of a square image and 59% of one of 4:3.
        augmentation=AugmentationConfig(
            area=(smallest_area, 0.77), aspect=(1.0, 1.0), interpolations=("bilinear",), photometric=photometric
        ),
        schedule=StepDecay(base_rate=0.01, decay_factor=0.1, decay_epochs=decay_epochs),
        optimizer=SGDConfig(momentum=0.9, weight_decay=5e-4),  # Krizhevsky 2012, section 5
        averaging=RunningMean(start=0.99),
    )


def alexnet_imagenet() -> Recipe:
    """AlexNet on ImageNet-1k: batch 128, a tenth of the rate every 20 epochs, 90 epochs."""
    # Section 5: roughly 90 epochs; 0.01, divided by 10 three times, by hand; Caffe's bvlc_alexnet does so every 100,000
    # steps of 256.
    return _make_baseline(networks.AlexNetConfig(), 90, 128, 20.0, _LIGHTING)


def zfnet_imagenet() -> Recipe:
    """ZFNet (Clarifai's family) on ImageNet-1k: batch 128, 70 epochs."""
    # arXiv 1311.2901, section 3: 0.01, lowered by hand when the validation error plateaus; the steps and the weight
    # decay, of which the paper names none, are AlexNet's.
    return _make_baseline(networks.ZFNetConfig(), 70, 128, 20.0)


def nin_imagenet() -> Recipe:
    """Network in Network on ImageNet-1k as in Caffe's model zoo: batch 64, 23 epochs."""
    # Model zoo: 450,000 steps of 64, a tenth of the rate every 200,000 steps.
    return _make_baseline(networks.NINConfig(), 23, 64, 10.0)


def vgg_16_imagenet() -> Recipe:
    """VGG-16 on ImageNet-1k with scale jittering: batch 256, 74 epochs."""
    # arXiv 1409.1556, section 3.1: 224 pixels of a shorter side between 256 and 512, and AlexNet's lighting; 0.01, a
    # tenth three times when validation stops improving, here in equal parts.
    return _make_baseline(networks.VGG16Config(), 74, 256, 18.5, _LIGHTING, smallest_area=0.14)


def spp_net_imagenet() -> Recipe:
    """SPP-net (MSRA's) on ImageNet-1k: spatial pyramid pooling over ZF-5, batch 128, 70 epochs."""
    # arXiv 1406.4729 names no number of epochs and no batch: ZFNet's. Section 3.1: 0.01, divided by 10 twice when the
    # error plateaus.
    return _make_baseline(networks.SPPNetConfig(), 70, 128, 25.0, _LIGHTING)


def lenet_5_digits() -> Recipe:
    """LeNet-5 on the embedded handwritten digits, its own kind of data; seconds of one core."""
    # As googlenet-digits, to be compared with it.
    schedule = PolynomialDecay(base_rate=0.02, power=0.5, warmup_epochs=2.0)
    return _vary(googlenet_digits(), "lenet-5-digits", {"model": networks.LeNet5Config(), "schedule": schedule})


PRESETS: dict[str, Callable[[], Recipe]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (
        googlenet_digits,
        googlenet_imagenet,
        googlenet_imagenet_wide,
        googlenet_imagenet_naive,
        googlenet_digits_naive,
        googlenet_bn_imagenet,
        googlenet_bn_digits,
        lenet_5_digits,
        alexnet_imagenet,
        zfnet_imagenet,
        nin_imagenet,
        vgg_16_imagenet,
        spp_net_imagenet,
        googlenet_tiny,
    )
}
DEFAULT = "googlenet-digits"
# Made for the embedded dataset; the others need one.
DIGITS_PRESETS = tuple(name for name in PRESETS if "-digits" in name or name == "googlenet-tiny")
