"""Presets of the networks that the paper's tables and related work name, as their authors trained them.

Two things differ in all of them. A crop of fixed size out of an image whose shorter side is 256 becomes a square with
the same share of the image's area, from anywhere in the image. And weights start with He's variance (models.build)
and are averaged over the last hundredth of training, in which the rate is lowest.
"""

from __future__ import annotations

from orchestrator.data.config import (
    NO_PHOTOMETRIC,
    AugmentationConfig,
    OrderConfig,
    PhotometricConfig,
    PreprocessingConfig,
)
from orchestrator.models.config import AlexNetConfig, LeNet5Config, NINConfig, SPPNetConfig, VGG16Config, ZFNetConfig
from orchestrator.recipe.config import Recipe, RunningMean, SGDConfig
from orchestrator.recipe.lr_schedule import PolynomialDecay, StepDecay

_SGD = SGDConfig(momentum=0.9, weight_decay=5e-4)  # Krizhevsky 2012, section 5
_LAST_HUNDREDTH_MEAN = RunningMean(start=0.99)
_LIGHTING = PhotometricConfig(brightness=0.0, contrast=0.0, saturation=0.0, lighting=0.1)  # Krizhevsky 2012, 4.1


def _make_augmentation(smallest: float, largest: float, photometric: PhotometricConfig) -> AugmentationConfig:
    return AugmentationConfig(
        area=(smallest, largest), aspect=(1.0, 1.0), interpolations=("bilinear",), photometric=photometric
    )


# 224 and 227 of 256 pixels: 77% of a square image and 59% of one of 4:3.
_FIXED_CROPS, _FIXED_CROPS_LIGHTING = (
    _make_augmentation(0.59, 0.77, NO_PHOTOMETRIC),
    _make_augmentation(0.59, 0.77, _LIGHTING),
)


def alexnet_imagenet() -> Recipe:
    """AlexNet on ImageNet-1k: batch 128, a tenth of the rate every 20 epochs, 90 epochs."""
    return Recipe(
        name="alexnet-imagenet",
        epochs=90,  # section 5: roughly 90
        batch_size=128,
        model=AlexNetConfig(),
        augmentation=_FIXED_CROPS_LIGHTING,
        # Section 5: 0.01, divided by 10 three times, by hand; Caffe's bvlc_alexnet does so every 100,000 steps of 256.
        schedule=StepDecay(base_rate=0.01, decay_factor=0.1, decay_epochs=20.0),
        optimizer=_SGD,
        averaging=_LAST_HUNDREDTH_MEAN,
    )


def zfnet_imagenet() -> Recipe:
    """ZFNet (Clarifai's family) on ImageNet-1k: batch 128, 70 epochs."""
    return Recipe(
        name="zfnet-imagenet",
        epochs=70,  # arXiv 1311.2901, section 3
        batch_size=128,
        model=ZFNetConfig(),
        augmentation=_FIXED_CROPS,
        # Section 3: 0.01, lowered by hand when the validation error plateaus; the steps are AlexNet's.
        schedule=StepDecay(base_rate=0.01, decay_factor=0.1, decay_epochs=20.0),
        optimizer=_SGD,  # the paper names no weight decay: AlexNet's
        averaging=_LAST_HUNDREDTH_MEAN,
    )


def nin_imagenet() -> Recipe:
    """Network in Network on ImageNet-1k as in Caffe's model zoo: batch 64, 23 epochs."""
    return Recipe(
        name="nin-imagenet",
        epochs=23,  # model zoo: 450,000 steps of 64
        batch_size=64,
        model=NINConfig(),
        augmentation=_FIXED_CROPS,
        schedule=StepDecay(base_rate=0.01, decay_factor=0.1, decay_epochs=10.0),  # model zoo: every 200,000 steps
        optimizer=_SGD,
        averaging=_LAST_HUNDREDTH_MEAN,
    )


def vgg_16_imagenet() -> Recipe:
    """VGG-16 on ImageNet-1k with scale jittering: batch 256, 74 epochs."""
    return Recipe(
        name="vgg-16-imagenet",
        epochs=74,  # arXiv 1409.1556, section 3.1
        batch_size=256,
        model=VGG16Config(),
        # Section 3.1: 224 pixels of a shorter side between 256 and 512, and AlexNet's lighting.
        augmentation=_make_augmentation(0.14, 0.77, _LIGHTING),
        # Section 3.1: 0.01, a tenth three times when validation stops improving; here in equal parts.
        schedule=StepDecay(base_rate=0.01, decay_factor=0.1, decay_epochs=18.5),
        optimizer=_SGD,
        averaging=_LAST_HUNDREDTH_MEAN,
    )


def spp_net_imagenet() -> Recipe:
    """SPP-net (MSRA's) on ImageNet-1k: spatial pyramid pooling over ZF-5, batch 128, 70 epochs."""
    return Recipe(
        name="spp-net-imagenet",
        epochs=70,  # arXiv 1406.4729 names no number of epochs and no batch: ZFNet's
        batch_size=128,
        model=SPPNetConfig(),
        augmentation=_FIXED_CROPS_LIGHTING,
        # Section 3.1: 0.01, divided by 10 twice when the error plateaus.
        schedule=StepDecay(base_rate=0.01, decay_factor=0.1, decay_epochs=25.0),
        optimizer=_SGD,
        averaging=_LAST_HUNDREDTH_MEAN,
    )


def lenet_5_digits() -> Recipe:
    """LeNet-5 on the embedded handwritten digits, its own kind of data; seconds of one core."""
    return Recipe(
        name="lenet-5-digits",
        epochs=26,
        batch_size=32,
        model=LeNet5Config(),
        # As googlenet-digits, to be compared with it.
        preprocessing=PreprocessingConfig(mean=(78.0, 78.0, 78.0), scale=1 / 58.0),
        augmentation=AugmentationConfig(area=(0.4, 1.0), photometric=NO_PHOTOMETRIC),
        order=OrderConfig(lanes=8, window=256),
        schedule=PolynomialDecay(base_rate=0.02, power=0.5, warmup_epochs=2.0),
        averaging=RunningMean(start=0.75),
    )
