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
from orchestrator.recipe.optimizer import get_averaged_tensors
from orchestrator.training.config import MIN_BATCH_NORM_IMAGES, Execution, check_batch_norm
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.rank_sync import StepSums
from orchestrator.training.train_state import TrainState

# DDP rebuilds its gradient buckets after the first step. Without these discarded passes the first step after a resume
# would sum in another order than in a run without interruption (from 3 ranks on).
DDP_WARMUP_PASSES = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COMPILERS = ("c++", "g++", "clang++")


class TrainStep:
    """The training step on a state; `network` is the model or its DDP wrapper. Raises ConfigError if it cannot run."""

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
        self._seeds_torch = state.model.has_stock_randomness
        self.normalize = Normalizer(recipe.preprocessing, world.device)
        self._copied: torch.cuda.Event | None = None  # the end of the last batch's copy to the device
        steps = recipe.epochs * state.progress.steps_per_epoch
        self.averaging_from = min(math.floor(recipe.averaging.start * steps), steps - 1)  # step; the last always is
        trained = dict(state.model.named_parameters())
        self._statistics = [each for name, each in get_averaged_tensors(state.model).items() if name not in trained]

    def __call__(self, batch: Batch) -> StepSums:
        """Train on this rank's part of the next global batch; return its sums, still on the device."""
        state, recipe, progress = self._state, self._recipe, self._state.progress
        rate = compute_lr(recipe.schedule, progress.samples, progress.samples_per_epoch, recipe.epochs)
        sgd.set_lr(state.optimizer, rate)
        if self._seeds_torch:
            # Seeds the generators of all devices, from which the model's stock modules draw.
            key = (progress.epoch, progress.step_in_epoch, self._world.rank)
            torch.manual_seed(rng.derive_key(recipe.seeds.dropout, "torch", *key))
        sums = self._compute_gradients(batch, progress.epoch)
        if recipe.optimizer.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            sgd.clip_gradients(state.model, recipe.optimizer)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        self._average_batch_norm_stats(len(batch.ids))
        if progress.step >= self.averaging_from:
            state.average.update()
        state.progress = progress.advance()
        return sums

    def warm_up_ddp(self) -> None:
        """Run the passes after which gradients of a new process equal those of one that has made steps."""
        with self._restore_buffers_after():
            for _ in range(DDP_WARMUP_PASSES):
                self._compute_gradients(make_blank_batch(2, self._recipe.model.image_size), 0)

    def find_micro_batch(self, images: int) -> int | None:
        """Halve the micro-batch until a pass fits the device's memory; return it, None for the whole part.

        images: the largest part of a global batch on any rank. Every rank must call it with the same value, and gets
        the same answer. Raises ConfigError, on every rank alike, when one image is too large.
        """
        # With batch norm, passes of 2 would leave one of 3.
        tried, least = min(images, self.micro_batch or images), MIN_BATCH_NORM_IMAGES + 1 if self._normalises else 1
        while self._world.is_any(self._runs_out_of_memory(tried)):
            if tried <= least:
                raise ConfigError(
                    f"model.image_size must be smaller, got {self._recipe.model.image_size}: {tried} image(s) exceed "
                    f"the memory of {self._world.device}; set a smaller image or network, precision float16 or "
                    "bfloat16, or use a larger device"
                )
            tried = max(least, (tried + 1) // 2)
            self.micro_batch = tried
        return self.micro_batch

    def _runs_out_of_memory(self, images: int) -> bool:
        """Return whether a pass over so many images exceeds the device's memory; no rank waits for another."""
        is_exceeded = False
        try:
            with self._restore_buffers_after(), self._skip_gradient_sync():
                self._run_backward(make_blank_batch(images, self._recipe.model.image_size), 0)
                # Room for the average, which is allocated later.
                _average = [torch.empty_like(tensor) for tensor in get_averaged_tensors(self._state.model).values()]
        except torch.OutOfMemoryError:
            is_exceeded = True
        if is_exceeded and self._world.device.type == "cuda":
            torch.cuda.empty_cache()
        return is_exceeded

    def _compute_gradients(self, batch: Batch, epoch: int) -> StepSums:
        """Leave the mean gradient over the global batch in the parameters; return this rank's sums."""
        self._state.optimizer.zero_grad()
        if len(batch.ids) == 0:
            # No sample in this part: the other ranks still wait for this rank's gradients, which are 0.
            batch = make_blank_batch(2, batch.images.shape[-1])
        elif len(batch.ids) == 1 and self._normalises:
            batch = _duplicate_single_image(batch)
        parts = self._copy_to_device(batch)
        num_parts = count_passes(len(batch.ids), self.micro_batch, self._normalises)
        device = self._world.device
        total_loss = torch.zeros((), device=device)
        total_correct = torch.zeros((), dtype=torch.int64, device=device)
        chunks = zip(*(tensor.tensor_split(num_parts) for tensor in parts), strict=True)
        for number, chunk in enumerate(chunks, 1):
            # Only the last pass reduces gradients, so ranks may differ in their number of passes.
            with nullcontext() if number == num_parts else self._skip_gradient_sync():
                sums = self._run_backward(Batch(*chunk), epoch)
            total_loss += sums.loss
            total_correct += sums.correct
        return StepSums(total_loss, total_correct)

    def _run_backward(self, batch: Batch, epoch: int) -> StepSums:
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
        targets = labels if labels.ndim == 1 else labels.argmax(dim=1)  # of soft labels the largest
        correct = ((logits.main.detach().argmax(dim=1) == targets) & (weights > 0)).sum()
        return StepSums(summed.detach(), correct)

    def _copy_to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._copied is not None:
            # A batch's memory is reused two batches later, and copies from pinned memory return before they end.
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
        """Set the statistics on all ranks to their mean, weighted by its images, so that the state stays equal."""
        if not self._statistics or self._world.workers == 1:
            return
        flat = torch.cat([each.flatten() for each in self._statistics] + [torch.ones(1, device=self._world.device)])
        flat *= images
        self._world.all_reduce_tensor(flat)
        flat /= flat[-1].clone()
        means = torch.split(flat[:-1], [each.numel() for each in self._statistics])
        for statistic, mean in zip(self._statistics, means, strict=True):
            statistic.copy_(mean.view_as(statistic))

    def _skip_gradient_sync(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    @contextmanager
    def _restore_buffers_after(self) -> Iterator[None]:
        """Restore buffers and clear gradients afterwards: passes over blank images leave no trace."""
        buffers = list(self._state.model.buffers())
        saved = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, before in zip(buffers, saved, strict=True):
                buffer.copy_(before)
            self._state.optimizer.zero_grad()


def compute_max_rank_batch(batch_size: int, lanes: int, workers: int) -> int:
    """Return an upper bound of the samples of a global batch on any worker (see data.sampler)."""
    own = math.ceil(lanes / workers)
    whole, rest = divmod(batch_size, lanes)
    # The rest are neighbouring lanes, which may wrap around from the last to the first.
    return min(batch_size, whole * own + min(own, math.ceil(rest / workers) + 1, rest))


def make_blank_batch(images: int, size: int) -> Batch:
    """Return black images of weight 0; batch norms over maps of 1 x 1 need at least two."""
    pixels = torch.zeros((images, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    zeros = torch.zeros(images, dtype=torch.int64)
    return Batch(pixels, zeros, torch.zeros(images), zeros)


def _duplicate_single_image(batch: Batch) -> Batch:
    """Return a part of one image with a copy of weight 0, which changes nothing: a batch norm of one value raises."""
    images, labels, ids = (torch.cat([tensor, tensor]) for tensor in (batch.images, batch.labels, batch.ids))
    return Batch(images, labels, torch.cat([batch.weights, torch.zeros_like(batch.weights)]), ids)


def _check_device_support(recipe: Recipe, execution: Execution, world: DistributedContext) -> None:
    device = world.device
    if recipe.precision == "float16" and device.type == "cpu":
        raise ConfigError(
            "precision must be float32 or bfloat16 on a CPU, got 'float16'; set one of them, or use workers with a GPU "
            "(--placement.gpus-per-worker 1)"
        )
    check_batch_norm(recipe, execution, world.workers)
    if execution.compile and not (os.environ.get("CXX") or any(shutil.which(name) for name in _COMPILERS)):
        raise ConfigError("execution.compile must be False without a C++ compiler, got True; install one or set CXX")


# data.rng's constants as signed integers, because torch has no unsigned arithmetic.
_GAMMA, _MIX1, _MIX2 = (bits - 2**64 for bits in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _splitmix64(values: Tensor) -> Tensor:
    """Compute data.rng.mix_bits on int64 tensors; clears the sign bits that torch's arithmetic shift brings in."""
    z = values + _GAMMA
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def make_dropout_mask(base: int, ids: Tensor, units: int, probability: float) -> Tensor:
    """Return N x units float32: 0 with `probability`, else 1 / (1 - probability). ids: N int64."""
    rows = _splitmix64(ids ^ (base - 2**64 if base >= 2**63 else base))
    counters = rows[:, None] + torch.arange(units, device=ids.device)[None, :] * _GAMMA
    # The low 24 bits of the mixed counter as a fraction: exact in float32 on every device.
    uniform = (_splitmix64(counters) & ((1 << 24) - 1)).float() * 2.0**-24
    return (uniform >= probability).float() / (1.0 - probability)


def make_dropout_masks(model: Network, seed: int, epoch: int, ids: Tensor) -> DropoutMasks:
    """Return the masks of a batch for every place of the network that drops units."""
    return {
        place: make_dropout_mask(rng.derive_key(seed, "dropout/" + place, epoch), ids, units, probability)
        for place, (units, probability) in model.get_dropout_units().items()
    }


def count_passes(images: int, micro_batch: int | None, normalises: bool) -> int:
    """Return the number of passes, of nearly equal size, for a worker's part of a batch; 1 for an empty part.

    A pass holds `micro_batch` images at most. With batch norm (`normalises`) none holds a single one, unless the part
    does: then a micro-batch of 2 leaves one pass of 3 in a part of odd size.
    """
    passes = max(1, math.ceil(images / (micro_batch or max(1, images))))
    return min(passes, max(1, images // MIN_BATCH_NORM_IMAGES)) if normalises else passes
