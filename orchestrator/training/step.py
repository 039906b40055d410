"""One training step: normalise, forward, loss, backward, update, average."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.config.errors import ConfigError
from orchestrator.data.loader import Batch
from orchestrator.models.config import normalises_batches
from orchestrator.recipe import loss
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.normalise import Normaliser
from orchestrator.recipe.polyak import averaged_of
from orchestrator.recipe.schedule import rate_at
from orchestrator.training.dropout import masks
from orchestrator.training.execution import (
    LEAST_NORMALISED,
    Execution,
    check_batch_norm,
    count_passes,
    largest_pass,
)
from orchestrator.training.profiler import Profiler
from orchestrator.training.state import TrainState
from orchestrator.training.world import World

# DDP rebuilds its gradient buckets after the first step, so that from 3 ranks on a resumed first step would sum in
# another order than the run that was not interrupted; two passes that are thrown away settle the buckets.
SETTLING_PASSES = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COMPILERS = ("c++", "g++", "clang++")


class DoesNotFitError(ConfigError):
    """Not even one image at a time fits the device's memory; to try again would only repeat it."""


class Stepper:
    """Makes steps on a state; `network` is the model or its DDP wrapper.

    Raises ConfigError when this device, or this machine, cannot do what the recipe or `execution` asks for.
    """

    def __init__(
        self, recipe: Recipe, state: TrainState, network: nn.Module, world: World, execution: Execution | None = None
    ) -> None:
        execution = execution or Execution()
        _check(recipe, execution, world)
        self._recipe, self._state, self._world = recipe, state, world
        self._ddp = network if isinstance(network, DistributedDataParallel) else None
        self._network = torch.compile(network) if execution.compile else network
        self._micro_batch = execution.micro_batch
        self._normalises = normalises_batches(recipe.model)
        self.profiler: Profiler | None = None
        self.normalise = Normaliser(recipe.preprocessing, world.device)
        self._copied: torch.cuda.Event | None = None  # when the last batch was on the device
        self._averaging_from = averaging_from(recipe, state.progress.steps_per_epoch)
        parameters = {id(parameter) for parameter in state.model.parameters()}
        self._statistics = [one for one in averaged_of(state.model).values() if id(one) not in parameters]

    def __call__(self, batch: Batch) -> Tensor:
        """Train on this rank's part of the next global batch; its summed loss, still on the device."""
        state, recipe, progress = self._state, self._recipe, self._state.progress
        if self.profiler is not None:
            self.profiler.before_step()
        rate = rate_at(recipe.schedule, progress.samples, progress.samples_per_epoch, recipe.epochs)
        sgd.set_rate(state.optimizer, rate)
        summed = self._gradients(batch, progress.epoch)
        if recipe.optimizer.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            sgd.clip(state.model, recipe.optimizer)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        self._share_statistics(len(batch.ids))
        if progress.step >= self._averaging_from:
            state.average.update()
        state.progress = progress.advance()
        return summed

    def close(self) -> None:
        """Write what was profiled, if that is not done yet."""
        if self.profiler is not None:
            self.profiler.close()

    def settle(self, blank: Batch) -> None:
        """Run the passes that make the next gradients of a fresh process equal to those of an old one."""
        with self._without_a_trace():
            for _ in range(SETTLING_PASSES):
                self._gradients(_blank(blank, 2), 0)

    def fit(self, blank: Batch, images: int) -> int | None:
        """Halve the micro-batch until a pass fits the device's memory; the micro-batch, None for all at once.

        images: the largest part of a global batch on any rank. All ranks must call it with the same arguments, and
        come to the same answer. Raises DoesNotFitError, on every rank alike, when one image is too large.
        """
        tried, least = min(images, self._micro_batch or images), LEAST_NORMALISED if self._normalises else 1
        while self._world.sum([float(self._too_large(blank, largest_pass(images, tried, self._normalises)))])[0]:
            if tried <= least:
                fewest = "one image fits" if least == 1 else f"{largest_pass(images, tried, True)} images fit"
                raise DoesNotFitError(
                    f"model.image_size {self._recipe.model.image_size} is refused: not even {fewest} the memory "
                    f"of {self._world.device}; take a smaller image or network, precision float16 or bfloat16, or a "
                    "larger device"
                )
            tried = max(least, (tried + 1) // 2)
            self._micro_batch = tried
        return self._micro_batch

    def _too_large(self, blank: Batch, images: int) -> bool:
        """Whether a pass over so many images runs out of the device's memory here; no rank waits for another."""
        found = False
        try:
            with self._without_a_trace(), self._apart():
                self._backward(_blank(blank, images), 0)
                # Made later, and there to stay: the average.
                _spare = [torch.empty_like(one) for one in averaged_of(self._state.model).values()]
        except torch.OutOfMemoryError:
            found = True
        if found and self._world.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _gradients(self, batch: Batch, epoch: int) -> Tensor:
        """Leave the mean gradient over the global batch in the parameters; this rank's summed loss."""
        self._state.optimizer.zero_grad()
        if len(batch.ids) == 0:
            # A part without a sample: the other ranks still wait for this one's gradients, which are 0.
            batch = _blank(batch, 2)
        elif len(batch.ids) == 1 and self._normalises:
            batch = _doubled(batch)
        parts = self._on_device(batch)
        num_parts = count_passes(len(batch.ids), self._micro_batch, self._normalises)
        chunks = list(zip(*(tensor.tensor_split(num_parts) for tensor in parts), strict=True))
        total = torch.zeros((), device=self._world.device)
        for number, chunk in enumerate(chunks, 1):
            # Only the last pass brings gradients together, so ranks may differ in their number of passes.
            with nullcontext() if number == num_parts else self._apart():
                total += self._backward(Batch(*chunk), epoch)
        return total

    def _backward(self, batch: Batch, epoch: int) -> Tensor:
        """Add the gradients of a batch that is on the device; its summed loss."""
        device, recipe, scaler = self._world.device, self._recipe, self._state.scaler
        images = self.normalise(batch.images.to(device))
        labels, weights, ids = (tensor.to(device) for tensor in (batch.labels, batch.weights, batch.ids))
        dropped = masks(self._state.model, recipe.seeds.dropout, epoch, ids)
        with torch.autocast(device.type, _DTYPES[recipe.precision], enabled=recipe.precision != "float32"):
            logits = self._network(images, dropped)
        summed = loss.summed(logits, labels, weights, recipe.loss)
        # DDP averages gradients over the W ranks: W / B makes them the mean over the global batch however
        # unequal the ranks' parts, and the passes of each, are.
        scaler.scale(summed * (self._world.workers / recipe.batch_size)).backward()  # type: ignore[no-untyped-call]
        return summed.detach()

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, labels, weights and ids on the device."""
        if self._copied is not None:
            # A batch's memory is filled anew two batches later, and copies from pinned memory return before they end.
            self._copied.synchronize()
        device = self._world.device
        images, labels, weights, ids = (
            tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.labels, batch.weights, batch.ids)
        )
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return images, labels, weights, ids

    def _share_statistics(self, images: int) -> None:
        """Give batch norms on all ranks the mean of their statistics, each rank counting for its images.

        So the state stays equal on all ranks, and a rank without a sample adds nothing.
        """
        if not self._statistics or self._world.workers == 1:
            return
        flat = torch.cat([one.flatten() for one in self._statistics] + [torch.ones(1, device=self._world.device)])
        flat *= images
        self._world.add_up(flat)
        flat /= flat[-1].clone()
        means = torch.split(flat[:-1], [one.numel() for one in self._statistics])
        for one, mean in zip(self._statistics, means, strict=True):
            one.copy_(mean.view_as(one))

    def _apart(self) -> AbstractContextManager[None]:
        """No gradients are brought together in here."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    @contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """What passes leave behind, gradients and statistics of blanks, is gone afterwards."""
        buffers = list(self._state.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
            self._state.optimizer.zero_grad()


def averaging_from(recipe: Recipe, steps_per_epoch: int) -> int:
    """The step from which weights are averaged; at least the last one is."""
    total = recipe.epochs * steps_per_epoch
    return min(math.floor(recipe.averaging.start * total), total - 1)


def largest_part(batch_size: int, lanes: int, workers: int) -> int:
    """Most samples of any global batch on any of the workers, or slightly more (see data.order.batch_positions)."""
    own = math.ceil(lanes / workers)
    whole, rest = divmod(batch_size, lanes)
    # The rest are neighbouring lanes, which may run over the last one to the first.
    return min(batch_size, whole * own + min(own, math.ceil(rest / workers) + 1, rest))


def _blank(like: Batch, images: int) -> Batch:
    """Black images of weight 0, of the size that `like` has; batch norms over maps of 1 x 1 need at least two."""
    size = like.images.shape[-1]
    pixels = torch.zeros((images, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    whole = torch.zeros(images, dtype=torch.int64)
    return Batch(pixels, whole, torch.zeros(images), whole)


def _doubled(batch: Batch) -> Batch:
    """A part of one image, and its copy of weight 0: a batch norm's statistics, and gradients, are those of the image.

    Over maps of 1 x 1, where torch raises ValueError for a single image, the image teaches the layers below nothing.
    """
    images, labels, ids = (torch.cat([tensor, tensor]) for tensor in (batch.images, batch.labels, batch.ids))
    return Batch(images, labels, torch.cat([batch.weights, torch.zeros_like(batch.weights)]), ids)


def _check(recipe: Recipe, execution: Execution, world: World) -> None:
    device = world.device
    if recipe.precision == "float16" and device.type == "cpu":
        raise ConfigError(
            "precision: 'float16' is refused on a CPU, which has no arithmetic for it: give float32 or bfloat16, or "
            "workers with a GPU (--placement.gpus-per-worker 1)"
        )
    try:
        check_batch_norm(recipe, execution, world.workers)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if execution.compile and not (os.environ.get("CXX") or any(shutil.which(name) for name in _COMPILERS)):
        raise ConfigError(
            f"execution.compile: True is refused: this worker's machine has no C++ compiler ({', '.join(_COMPILERS)}); "
            "install one, name it in CXX, or leave it off"
        )
