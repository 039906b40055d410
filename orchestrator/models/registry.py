"""A network from its config, with initial weights that depend on nothing but config, classes and seed."""

from __future__ import annotations

import math

import torch
from torch import nn

from orchestrator.config.plugins import load_plugin
from orchestrator.models import baselines
from orchestrator.models.config import AnyModelConfig, GoogLeNetConfig, ModelPlugin
from orchestrator.models.googlenet import GoogLeNet
from orchestrator.models.network import Network
from orchestrator.models.plugin_model import PluginNetwork, fork_torch_rng

__all__ = ["baselines", "create_model", "create_uninitialized_model"]


def create_uninitialized_model(config: AnyModelConfig, classes: int) -> Network:
    """Build the network, its weights as torch makes them.

    Raises ValueError for fewer than 2 classes; ConfigError when a plug-in is none, or cannot be built.
    """
    if isinstance(config, ModelPlugin):
        return PluginNetwork(config, classes)
    if isinstance(config, GoogLeNetConfig):
        return GoogLeNet(config, classes)
    network: Network = load_plugin("model", config.kind)(num_classes=classes, **config.model_dump(exclude={"kind"}))
    return network


def create_model(config: AnyModelConfig, classes: int, seed: int) -> Network:
    """Build a network whose initial weights depend on config, classes and seed only.

    Weights have He's variance (arXiv 1502.01852), 2 / fan-in (half of it where scores come out or no ReLU follows),
    and zero biases. The paper names no initialisation; the Caffe replication's ("xavier": variance 1 / fan-in, biases
    of 0.2) would saturate a deep plain net of another width. He's trains at every width. A plug-in keeps its own.
    """
    with fork_torch_rng(seed):
        model = create_uninitialized_model(config, classes)
    if isinstance(model, PluginNetwork):
        return model
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
