"""One training step of GoogLeNet-224, batch 16, on two cores, against a plain reading of the paper in torch.

The peer below has the same weights, inputs and dropout masks, torch's default memory layout, layers and optimizer.
A step: forward with auxiliary heads, loss, backward, update. Outputs and gradients are compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import frame
from benchmarks.frame import Cost, Figure
from orchestrator.models import googlenet
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.models.googlenet import ConvolutionRow, InceptionRow, MaxPoolRow, scale_filters
from orchestrator.models.network import DropoutMasks
from orchestrator.recipe import loss, presets
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import Recipe
from orchestrator.training import train_state, train_step

THREADS, BATCH, CLASSES, SEED = 2, 16, 1000, 7
ROUNDS, SMALL_ROUNDS = 15, 60
RATE = 1e-6  # so low that the last round computes with nearly the weights of the first
PIXEL_DEVIATION = 60.0  # of ImageNet's pixels, roughly, once the mean is subtracted

Step = Callable[[], tuple[Tensor, ...]]


# ------------------------------------------------------------------ the peer
class _Conv(nn.Module):
    def __init__(self, inputs: int, filters: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, filters, kernel, stride, padding=kernel // 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.conv(x))
        return out


class _Inception(nn.Module):
    def __init__(self, inputs: int, row: InceptionRow) -> None:
        super().__init__()
        self.conv1 = _Conv(inputs, row.conv1, 1)
        self.reduce3, self.conv3 = _Conv(inputs, row.reduce3, 1), _Conv(row.reduce3, row.conv3, 3)
        self.reduce5, self.conv5 = _Conv(inputs, row.reduce5, 1), _Conv(row.reduce5, row.conv5, 5)
        self.pool, self.pool_proj = nn.MaxPool2d(3, 1, padding=1), _Conv(inputs, row.pool_proj, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.conv1(x), self.conv3(self.reduce3(x)), self.conv5(self.reduce5(x)), self.pool_proj(self.pool(x)),
        )  # fmt: skip
        return torch.cat(branches, 1)


class _Head(nn.Module):
    def __init__(self, inputs: int, classes: int, config: GoogLeNetConfig) -> None:
        super().__init__()
        filters, hidden = (
            scale_filters(googlenet.AUX_FILTERS, config.width),
            scale_filters(googlenet.AUX_HIDDEN, config.width),
        )
        side = 14 * config.image_size // 224
        self.pool = nn.AvgPool2d(min(5, side), 3)
        self.conv = _Conv(inputs, filters, 1)
        self.hidden = nn.Linear(filters * ((side - min(5, side)) // 3 + 1) ** 2, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = functional.relu(self.hidden(self.conv(self.pool(x)).flatten(1)))
        out: Tensor = self.classifier(x * mask)
        return out


class Plain(nn.Module):
    """The network as one would write it down from the paper; its weights have the names of GoogLeNet's."""

    def __init__(self, config: GoogLeNetConfig, classes: int) -> None:
        super().__init__()
        self.stages, self.norms, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        channels = 3
        for row in googlenet.TABLE_1:
            if isinstance(row, MaxPoolRow):
                self.stages[row.name] = nn.MaxPool2d(3, 2, ceil_mode=True)
            elif isinstance(row, ConvolutionRow):
                reduce, filters = scale_filters(row.reduce, config.width), scale_filters(row.filters, config.width)
                last = _Conv(reduce if row.reduce else channels, filters, row.kernel, row.stride)
                self.stages[row.name] = nn.Sequential(_Conv(channels, reduce, 1), last) if row.reduce else last
                channels = filters
            else:
                widened = InceptionRow(row.name, *(scale_filters(filters, config.width) for filters in row[1:]))
                self.stages[row.name] = _Inception(channels, widened)
                channels = widened.conv1 + widened.conv3 + widened.conv5 + widened.pool_proj
            if config.lrn and row.name in googlenet.LRN_AFTER:
                self.norms[row.name] = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
            if row.name in googlenet.AUX_AFTER:
                self.heads[row.name] = _Head(channels, classes, config)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor, masks: DropoutMasks) -> tuple[Tensor, ...]:
        """N x 3 x S x S -> N x classes of the classifier and, while training, of each auxiliary head."""
        auxiliary = []
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.norms:
                x = self.norms[name](x)
            if self.training and name in self.heads:
                auxiliary.append(self.heads[name](x, masks[name]))
        x = self.pool(x).flatten(1)
        return self.classifier(x * masks["main"] if self.training else x), *auxiliary


# ------------------------------------------------------------------ steps
@dataclass(frozen=True)
class Inputs:
    """A batch: N x 3 x S x S float32 in the default layout, N labels, masks."""

    images: Tensor
    labels: Tensor
    masks: DropoutMasks


@dataclass(frozen=True)
class Steps:
    """Forward pass of a network; returns all of its outputs."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    backward: Step
    infer: Step

    def train(self) -> tuple[Tensor, ...]:
        """One training step."""
        outputs = self.backward()
        self.optimizer.step()
        return outputs


def ours(recipe: Recipe, inputs: Inputs) -> Steps:
    """As training/train_step.py does it, from images on the device to the update."""
    made = train_state.create_initial_state(recipe, CLASSES, 1, torch.device("cpu"))
    made.model.to(inputs.images.dtype)
    sgd.set_lr(made.optimizer, RATE)
    images = inputs.images.contiguous(memory_format=torch.channels_last)
    weights = torch.ones(len(images))

    def backward() -> tuple[Tensor, ...]:
        made.optimizer.zero_grad()
        logits = made.model.train()(images, inputs.masks)
        (loss.compute_loss_sum(logits, inputs.labels, weights, recipe.loss) / len(images)).backward()  # type: ignore[no-untyped-call]
        return logits.main, *logits.auxiliary

    def infer() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (made.model.eval()(images).main,)

    return Steps(made.model, made.optimizer, backward, infer)


def plain(recipe: Recipe, inputs: Inputs, weights: Mapping[str, Tensor]) -> Steps:
    """The peer, with these weights."""
    assert isinstance(recipe.model, GoogLeNetConfig)
    network = Plain(recipe.model, CLASSES).to(inputs.images.dtype)
    network.load_state_dict(weights)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=2e-4)
    criterion = nn.CrossEntropyLoss()

    def backward() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        outputs: tuple[Tensor, ...] = network.train()(inputs.images, inputs.masks)
        main, *auxiliary = (criterion(output, inputs.labels) for output in outputs)
        (main + 0.3 * sum(auxiliary)).backward()
        return outputs

    def infer() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            outputs: tuple[Tensor, ...] = network.eval()(inputs.images, inputs.masks)
            return outputs

    return Steps(network, optimizer, backward, infer)


def inputs_of(recipe: Recipe, batch: int, dtype: torch.dtype) -> Inputs:
    """Random images and labels, and the recipe's own masks."""
    side, generator = recipe.model.image_size, torch.Generator().manual_seed(SEED)
    images = torch.randn(batch, 3, side, side, generator=generator) * PIXEL_DEVIATION * recipe.preprocessing.scale
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    model = train_state.create_initial_state(recipe, CLASSES, 1, torch.device("cpu")).model
    masks = train_step.make_dropout_masks(model, SEED, 0, torch.arange(batch))
    return Inputs(images.to(dtype), labels, {place: mask.to(dtype) for place, mask in masks.items()})


def pair(recipe: Recipe, batch: int, lrn: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Steps, Steps]:
    """Ours and the peer, with the same weights and inputs."""
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lrn": lrn})})
    inputs = inputs_of(recipe, batch, dtype)
    first = ours(recipe, inputs)
    return first, plain(recipe, inputs, first.network.state_dict())


def differences(one: Steps, other: Steps) -> tuple[float, float]:
    """The largest difference of an output and of a gradient between two networks.

    Each is the norm of a tensor's difference, relative to the norm of the other network's tensor.
    """
    outputs = [_difference(got, wanted) for got, wanted in zip(one.backward(), other.backward(), strict=True)]
    wanted = {name: parameter.grad for name, parameter in other.network.named_parameters()}
    gradients = [_difference(parameter.grad, wanted[name]) for name, parameter in one.network.named_parameters()]
    return max(outputs), max(gradients)


def _difference(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None and wanted is not None
    return float((got - wanted).detach().norm() / wanted.detach().norm())


# ------------------------------------------------------------------ figures
def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-step`."""
    torch.set_num_threads(THREADS)
    with frame.pinned(frame.cores(THREADS)):
        yield from _large(presets.googlenet_imagenet())
        yield from _small(presets.googlenet_digits())


def _large(recipe: Recipe) -> Iterator[Figure]:
    one, other = pair(recipe, BATCH)
    # The peer's own float32 gradients are up to 1.3e-3 off its float64 ones: float64 is the sharp test.
    outputs, gradients = differences(one, other)
    yield Figure("step.difference.outputs", outputs, at_most=1e-5)
    yield Figure("step.difference.gradients", gradients, at_most=5e-3)
    outputs, gradients = differences(*pair(recipe, 2, dtype=torch.float64))
    yield Figure("step.difference.outputs.float64", outputs, at_most=1e-12)
    # The recipe's loss is taken in float32 whatever the network computes in.
    yield Figure("step.difference.gradients.float64", gradients, at_most=1e-6)
    bare, other_bare = pair(recipe, BATCH, lrn=False)
    parts = {"ours": one, "plain": other, "ours_without_lrn": bare, "plain_without_lrn": other_bare}
    costs = _measured({name: steps.train for name, steps in parts.items()}, ROUNDS)
    for name, found in costs.items():
        yield Figure(f"step.{name}.images_per_s", BATCH / median(taken.wall for taken in found))
    yield Figure("step.ours/plain", _speedup(costs, "ours"), at_least=1.6)
    yield Figure("step.ours/plain.by_cpu", frame.ratio(*([taken.cpu for taken in costs[n]] for n in ("plain", "ours"))))
    for name in ("ours_without_lrn", "plain_without_lrn"):
        yield Figure(f"step.{name}/plain", _speedup(costs, name))
    for name in ("ours", "plain"):
        yield Figure(f"step.{name}.share_of_lrn", 1 - 1 / _speedup(costs, f"{name}_without_lrn", name))
    costs = _measured({"ours": one.infer, "plain": other.infer}, ROUNDS)
    yield Figure("step.inference.ours/plain", _speedup(costs, "ours"))


def _small(recipe: Recipe) -> Iterator[Figure]:
    one, other = pair(recipe, recipe.batch_size)
    costs = _measured({"ours": one.train, "plain": other.train}, SMALL_ROUNDS)
    yield Figure("step.digits.ours.milliseconds", 1e3 * median(taken.wall for taken in costs["ours"]))
    yield Figure("step.digits.ours/plain", _speedup(costs, "ours"), at_least=1)


def _measured(parts: Mapping[str, Step], rounds: int) -> dict[str, list[Cost]]:
    for part in parts.values():
        part()  # the first pays for memory and for the choice of kernels
    return frame.interleaved(parts, rounds)


def _speedup(costs: Mapping[str, list[Cost]], name: str, than: str = "plain") -> float:
    return frame.ratio(*([taken.wall for taken in costs[part]] for part in (than, name)))
