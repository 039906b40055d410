"""One training step: normalise, forward, loss, backward, update, average."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orchestrator.data.loader import Batch
from orchestrator.recipe import loss
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.normalise import Normaliser
from orchestrator.recipe.schedule import rate_at
from orchestrator.training.dropout import masks
from orchestrator.training.state import TrainState
from orchestrator.training.world import World

# DDP rebuilds its gradient buckets after the first step, so that from 3 ranks on a resumed first step would sum in
# another order than the run that was not interrupted; two passes that are thrown away settle the buckets.
SETTLING_PASSES = 2


class Stepper:
    """Makes steps on a state; `network` is the model or its DDP wrapper."""

    def __init__(self, recipe: Recipe, state: TrainState, network: nn.Module, world: World) -> None:
        self._recipe, self._state, self._network, self._world = recipe, state, network, world
        self.normalise = Normaliser(recipe.preprocessing, world.device)
        self._copied: torch.cuda.Event | None = None  # when the last batch was on the device
        self._averaging_from = averaging_from(recipe, state.progress.steps_per_epoch)

    def __call__(self, batch: Batch) -> Tensor:
        """Train on this rank's part of the next global batch; its summed loss, still on the device."""
        state = self._state
        rate = rate_at(self._recipe.schedule, state.progress.epochs_done, self._recipe.epochs)
        sgd.set_rate(state.optimizer, rate)
        summed = self._backward(batch, state.progress.epoch)
        state.optimizer.step()
        if state.progress.step >= self._averaging_from:
            state.average.update()
        state.progress = state.progress.advance()
        return summed.detach()

    def settle(self, batch: Batch) -> None:
        """Run the passes that make the next gradients of a fresh process equal to those of an old one."""
        for _ in range(SETTLING_PASSES):
            self._backward(batch, 0)
        self._state.optimizer.zero_grad()

    def _backward(self, batch: Batch, epoch: int) -> Tensor:
        device, recipe = self._world.device, self._recipe
        if self._copied is not None:
            # A batch's memory is filled anew two batches later, and copies from pinned memory return before they end.
            self._copied.synchronize()
        images = self.normalise(batch.images.to(device, non_blocking=True))
        labels, weights, ids = (
            tensor.to(device, non_blocking=True) for tensor in (batch.labels, batch.weights, batch.ids)
        )
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        dropped = masks(self._state.model, recipe.seeds.dropout, epoch, ids)
        self._state.optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            logits = self._network(images, dropped)
        summed = loss.summed(logits, labels, weights, recipe.loss)
        # DDP averages gradients over the W ranks: W / B makes them the mean over the global batch however
        # unequal the ranks' parts are.
        (summed * (self._world.workers / recipe.batch_size)).backward()  # type: ignore[no-untyped-call]
        return summed


def averaging_from(recipe: Recipe, steps_per_epoch: int) -> int:
    """The step from which weights are averaged; at least the last one is."""
    total = recipe.epochs * steps_per_epoch
    return min(math.floor(recipe.averaging.start * total), total - 1)
