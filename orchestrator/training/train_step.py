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
from orchestrator.data import rng
from orchestrator.data.dataloader import Batch
from orchestrator.models.config import has_batch_norm
from orchestrator.models.network import DropoutMasks, Network
from orchestrator.recipe import loss
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.recipe.normalize import Normalizer
from orchestrator.recipe.weight_averaging import get_averaged_tensors
from orchestrator.training.config import (
    MIN_BATCH_NORM_IMAGES,
    Execution,
    check_batch_norm,
    compute_largest_pass,
    count_passes,
)
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.epoch_meter import StepSums
from orchestrator.training.train_state import TrainState

# DDP rebuilds its gradient buckets after the first step, so that from 3 ranks on a resumed first step would sum in
# another order than the run that was not interrupted; two passes that are thrown away settle the buckets.
DDP_WARMUP_PASSES = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COMPILERS = ("c++", "g++", "clang++")


class ModelTooLargeError(ConfigError):
    """Not even one image at a time fits the device's memory; to try again would only repeat it."""


class TrainStep:
    """Makes steps on a state; `network` is the model or its DDP wrapper.

    Raises ConfigError when this device, or this machine, cannot do what the recipe or `execution` asks for.
    """

    def __init__(
        self,
        recipe: Recipe,
        state: TrainState,
        network: nn.Module,
        world: DistributedContext,
        execution: Execution | None = None,
    ) -> None:
        execution = execution or Execution()
        _check_device_support(recipe, execution, world)
        self._recipe, self._state, self._world = recipe, state, world
        self._ddp = network if isinstance(network, DistributedDataParallel) else None
        self._network = torch.compile(network) if execution.compile else network
        self.micro_batch = execution.micro_batch
        self._normalises = has_batch_norm(recipe.model)
        self.normalize = Normalizer(recipe.preprocessing, world.device)
        self._copied: torch.cuda.Event | None = None  # when the last batch was on the device
        self._averaging_from = compute_averaging_start_step(recipe, state.progress.steps_per_epoch)
        parameters = {id(parameter) for parameter in state.model.parameters()}
        self._statistics = [one for one in get_averaged_tensors(state.model).values() if id(one) not in parameters]

    def __call__(self, batch: Batch) -> StepSums:
        """Train on this rank's part of the next global batch; return its sums, still on the device."""
        state, recipe, progress = self._state, self._recipe, self._state.progress
        rate = compute_lr(recipe.schedule, progress.samples, progress.samples_per_epoch, recipe.epochs)
        sgd.set_lr(state.optimizer, rate)
        sums = self._compute_gradients(batch, progress.epoch)
        if recipe.optimizer.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            sgd.clip_gradients(state.model, recipe.optimizer)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        self._average_batch_norm_stats(len(batch.ids))
        if progress.step >= self._averaging_from:
            state.average.update()
        state.progress = progress.advance()
        return sums

    def warm_up_ddp(self) -> None:
        """Run the passes that make the next gradients of a fresh process equal to those of an old one."""
        with self._restore_buffers_after():
            for _ in range(DDP_WARMUP_PASSES):
                self._compute_gradients(make_blank_batch(2, self._recipe.model.image_size), 0)

    def find_micro_batch(self, images: int) -> int | None:
        """Halve the micro-batch until a pass fits the device's memory; the micro-batch, None for all at once.

        images: the largest part of a global batch on any rank. All ranks must call it with the same arguments, and
        come to the same answer. Raises DoesNotFitError, on every rank alike, when one image is too large.
        """
        tried, least = min(images, self.micro_batch or images), MIN_BATCH_NORM_IMAGES if self._normalises else 1
        while self._world.is_any(self._runs_out_of_memory(compute_largest_pass(images, tried, self._normalises))):
            if tried <= least:
                fewest = "one image fits" if least == 1 else f"{compute_largest_pass(images, tried, True)} images fit"
                raise ModelTooLargeError(
                    f"model.image_size {self._recipe.model.image_size} is refused: not even {fewest} the memory "
                    f"of {self._world.device}; take a smaller image or network, precision float16 or bfloat16, or a "
                    "larger device"
                )
            tried = max(least, (tried + 1) // 2)
            self.micro_batch = tried
        return self.micro_batch

    def _runs_out_of_memory(self, images: int) -> bool:
        """Whether a pass over so many images runs out of the device's memory here; no rank waits for another."""
        found = False
        try:
            with self._restore_buffers_after(), self._skip_gradient_sync():
                self._run_backward(make_blank_batch(images, self._recipe.model.image_size), 0)
                # Made later, and there to stay: the average.
                _spare = [torch.empty_like(one) for one in get_averaged_tensors(self._state.model).values()]
        except torch.OutOfMemoryError:
            found = True
        if found and self._world.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _compute_gradients(self, batch: Batch, epoch: int) -> StepSums:
        """Leave the mean gradient over the global batch in the parameters; return this rank's sums."""
        self._state.optimizer.zero_grad()
        if len(batch.ids) == 0:
            # A part without a sample: the other ranks still wait for this one's gradients, which are 0.
            batch = make_blank_batch(2, batch.images.shape[-1])
        elif len(batch.ids) == 1 and self._normalises:
            batch = _duplicate_single_image(batch)
        parts = self._copy_to_device(batch)
        num_parts = count_passes(len(batch.ids), self.micro_batch, self._normalises)
        chunks = list(zip(*(tensor.tensor_split(num_parts) for tensor in parts), strict=True))
        device = self._world.device
        total_loss = torch.zeros((), device=device)
        total_correct = torch.zeros((), dtype=torch.int64, device=device)
        for number, chunk in enumerate(chunks, 1):
            # Only the last pass brings gradients together, so ranks may differ in their number of passes.
            with nullcontext() if number == num_parts else self._skip_gradient_sync():
                sums = self._run_backward(Batch(*chunk), epoch)
            total_loss += sums.loss
            total_correct += sums.correct
        return StepSums(total_loss, total_correct)

    def _run_backward(self, batch: Batch, epoch: int) -> StepSums:
        """Add the gradients of a batch that is on the device; return its sums."""
        device, recipe, scaler = self._world.device, self._recipe, self._state.scaler
        images = self.normalize(batch.images.to(device))
        labels, weights, ids = (tensor.to(device) for tensor in (batch.labels, batch.weights, batch.ids))
        dropped = make_dropout_masks(self._state.model, recipe.seeds.dropout, epoch, ids)
        with torch.autocast(device.type, _DTYPES[recipe.precision], enabled=recipe.precision != "float32"):
            logits = self._network(images, dropped)
        summed = loss.compute_loss_sum(logits, labels, weights, recipe.loss)
        # DDP averages gradients over the W ranks: W / B makes them the mean over the global batch however
        # unequal the ranks' parts, and the passes of each, are.
        scaler.scale(summed * (self._world.workers / recipe.batch_size)).backward()  # type: ignore[no-untyped-call]
        correct = ((logits.main.detach().argmax(dim=1) == labels) & (weights > 0)).sum()
        return StepSums(summed.detach(), correct)

    def _copy_to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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

    def _average_batch_norm_stats(self, images: int) -> None:
        """Give batch norms on all ranks the mean of their statistics, each rank counting for its images.

        So the state stays equal on all ranks, and a rank without a sample adds nothing.
        """
        if not self._statistics or self._world.workers == 1:
            return
        flat = torch.cat([one.flatten() for one in self._statistics] + [torch.ones(1, device=self._world.device)])
        flat *= images
        self._world.all_reduce_tensor(flat)
        flat /= flat[-1].clone()
        means = torch.split(flat[:-1], [one.numel() for one in self._statistics])
        for one, mean in zip(self._statistics, means, strict=True):
            one.copy_(mean.view_as(one))

    def _skip_gradient_sync(self) -> AbstractContextManager[None]:
        """No gradients are brought together in here."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    @contextmanager
    def _restore_buffers_after(self) -> Iterator[None]:
        """What passes leave behind, gradients and statistics of blanks, is gone afterwards."""
        buffers = list(self._state.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
            self._state.optimizer.zero_grad()


def compute_averaging_start_step(recipe: Recipe, steps_per_epoch: int) -> int:
    """The step from which weights are averaged; at least the last one is."""
    total = recipe.epochs * steps_per_epoch
    return min(math.floor(recipe.averaging.start * total), total - 1)


def compute_max_rank_batch(batch_size: int, lanes: int, workers: int) -> int:
    """Most samples of any global batch on any of the workers, or slightly more (see data.order.batch_positions)."""
    own = math.ceil(lanes / workers)
    whole, rest = divmod(batch_size, lanes)
    # The rest are neighbouring lanes, which may run over the last one to the first.
    return min(batch_size, whole * own + min(own, math.ceil(rest / workers) + 1, rest))


def make_blank_batch(images: int, size: int) -> Batch:
    """Return black images of weight 0; batch norms over maps of 1 x 1 need at least two."""
    pixels = torch.zeros((images, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    zeros = torch.zeros(images, dtype=torch.int64)
    return Batch(pixels, zeros, torch.zeros(images), zeros)


def _duplicate_single_image(batch: Batch) -> Batch:
    """A part of one image, and its copy of weight 0: a batch norm's statistics, and gradients, are those of the image.

    Over maps of 1 x 1, where torch raises ValueError for a single image, the image teaches the layers below nothing.
    """
    images, labels, ids = (torch.cat([tensor, tensor]) for tensor in (batch.images, batch.labels, batch.ids))
    return Batch(images, labels, torch.cat([batch.weights, torch.zeros_like(batch.weights)]), ids)


def _check_device_support(recipe: Recipe, execution: Execution, world: DistributedContext) -> None:
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


def _to_signed_int64(value: int) -> int:
    """The same 64 bits as a signed integer, which is what torch computes with (it wraps around)."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _to_signed_int64(0x9E3779B97F4A7C15)
_MIX1 = _to_signed_int64(0xBF58476D1CE4E5B9)
_MIX2 = _to_signed_int64(0x94D049BB133111EB)


def _splitmix64(values: Tensor) -> Tensor:
    """data.keyed.mix on int64 tensors; torch shifts arithmetically, so the shifted-in sign bits are cleared."""
    z = values + _GAMMA
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def make_dropout_mask(base: int, ids: Tensor, units: int, probability: float) -> Tensor:
    """N x units float32: 0 with `probability`, else 1 / (1 - probability). ids: N int64."""
    rows = _splitmix64(ids ^ _to_signed_int64(base))
    counters = rows[:, None] + torch.arange(units, device=ids.device)[None, :] * _GAMMA
    # The low 24 bits of the mixed counter as a fraction: exact in float32 on every device.
    uniform = (_splitmix64(counters) & ((1 << 24) - 1)).float() * 2.0**-24
    return (uniform >= probability).float() / (1.0 - probability)


def make_dropout_masks(model: Network, seed: int, epoch: int, ids: Tensor) -> DropoutMasks:
    """The masks of a batch for every place of the network that drops units."""
    return {
        place: make_dropout_mask(rng.derive_key(seed, "dropout/" + place, epoch), ids, units, probability)
        for place, (units, probability) in model.get_dropout_units().items()
    }
