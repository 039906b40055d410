"""A network from its config, with initial weights that depend on nothing but config, classes and seed."""

from __future__ import annotations

import math

import torch
from torch import nn

from orchestrator.models.baselines.alexnet import AlexNet
from orchestrator.models.baselines.lenet import LeNet5
from orchestrator.models.baselines.nin import NIN
from orchestrator.models.baselines.sppnet import SPPNet
from orchestrator.models.baselines.vgg import VGG16
from orchestrator.models.baselines.zfnet import ZFNet
from orchestrator.models.config import (
    AlexNetConfig,
    AnyModelConfig,
    GoogLeNetConfig,
    LeNet5Config,
    NINConfig,
    SPPNetConfig,
    VGG16Config,
    ZFNetConfig,
)
from orchestrator.models.googlenet import GoogLeNet
from orchestrator.models.network import Network


def create_uninitialized_model(config: AnyModelConfig, classes: int) -> Network:
    """The network, its weights as torch makes them. Raises ValueError for fewer than 2 classes."""
    match config:
        case GoogLeNetConfig():
            return GoogLeNet(config, classes)
        case LeNet5Config():
            return LeNet5(config, classes)
        case AlexNetConfig():
            return AlexNet(config, classes)
        case ZFNetConfig():
            return ZFNet(config, classes)
        case NINConfig():
            return NIN(config, classes)
        case VGG16Config():
            return VGG16(config, classes)
        case SPPNetConfig():
            return SPPNet(config, classes)


def create_model(config: AnyModelConfig, classes: int, seed: int) -> Network:
    """A network whose initial weights depend on config, classes and seed only.

    Weights have He's variance (arXiv 1502.01852), 2 / fan-in (half of it where scores come out or no ReLU follows),
    and zero biases. The paper names no initialisation; the Caffe replication's ("xavier": variance 1 / fan-in, biases
    of 0.2) would saturate a deep plain net of another width. He's trains at every width.
    """
    # The modules' own initialisation, replaced below, draws from the global generator: leave that as it was.
    with torch.random.fork_rng(devices=[]):
        model = create_uninitialized_model(config, classes)
    generator = torch.Generator().manual_seed(seed)
    classifiers = {id(layer) for layer in model.get_classifiers().values()}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                gain = 1.0 if id(module) in classifiers else model.gain
                module.weight.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return model
