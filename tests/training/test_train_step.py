"""Steps: micro-batches, clipping, precision, and the search for what fits a device's memory."""

import math
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import apply_overrides
from orchestrator.data.dataloader import Batch
from orchestrator.data.sampler import select_rank_positions
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.optimizer import WeightAverager
from orchestrator.training import train_state as states
from orchestrator.training.config import Execution, check_batch_norm
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.train_state import TrainState
from orchestrator.training.train_step import (
    TrainStep,
    _duplicate_single_image,
    compute_max_rank_batch,
    count_passes,
)
from tests.support.ranks import Ranks
from tests.support.runs import ALONE, CPU, recipe

CLASSES = 3


def batch(images: int = 8, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    ids = torch.arange(first, first + images)
    return Batch(pixels, ids % CLASSES, torch.ones(images), ids)


def part(of: Batch, start: int, end: int) -> Batch:
    return Batch(of.images[start:end], of.labels[start:end], of.weights[start:end], of.ids[start:end])


def stepper(
    of: Recipe | None = None, world: DistributedContext = ALONE, execution: Execution | None = None
) -> tuple[TrainStep, TrainState]:
    state = states.create_initial_state(of or recipe(), CLASSES, 6, CPU)
    return TrainStep(of or recipe(), state, states.wrap_in_ddp(state.model, world.workers), world, execution), state


def after(of: Recipe, execution: Execution | None = None, num_steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    step, state = stepper(of, execution=execution)
    losses = [float(step(batch(first=8 * number)).loss) for number in range(num_steps)]
    return losses, state.snapshot()["model"]


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ------------------------------------------------------------------ micro-batches
@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8, 100])
def test_micro_batches_keep_the_global_batch(micro_batch: int) -> None:
    whole, weights = after(recipe())
    losses, found = after(recipe(), Execution(micro_batch=micro_batch))
    assert losses == pytest.approx(whole, rel=1e-5)
    assert farthest(weights, found) < 1e-6
    assert farthest(weights, after(recipe(), num_steps=2)[1]) > 1e-4, "or the tolerance would tell nothing"


@pytest.mark.parametrize(("images", "sizes"), [(8, [3, 3, 2]), (6, [3, 3]), (3, [3]), (4, [2, 2])])
def test_passes_are_of_nearly_equal_size(images: int, sizes: list[int]) -> None:
    step, state = stepper(execution=Execution(micro_batch=3))
    seen: list[int] = []
    state.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    step(batch(images))
    assert seen == sizes


def _unequal(rank: int, workers: int, sizes: list[int]) -> dict[str, Tensor]:
    """Two steps on batches of 8, of which each rank has `sizes[rank]` images, in micro-batches of 2."""
    step, state = stepper(world=DistributedContext(rank, workers, CPU), execution=Execution(micro_batch=2))
    step.warm_up_ddp()
    start = sum(sizes[:rank])
    for first in (0, 8):
        step(part(batch(first=first), start, start + sizes[rank]))
    found: dict[str, Tensor] = state.snapshot()["model"]
    return found


@pytest.mark.process
@pytest.mark.parametrize("sizes", [[5, 3], [8, 0], [1, 7]])
def test_ranks_may_differ_in_their_number_of_passes(ranks: Ranks, sizes: list[int]) -> None:
    expected = after(recipe(), num_steps=2)[1]
    for found in ranks.run(_unequal, 2, sizes):
        assert not isinstance(found, Exception), found
        assert farthest(expected, found) < 1e-6


def _statistics(rank: int, workers: int, sizes: list[int]) -> list[float]:
    """A batch norm's statistic, on rank r of value r, after a step; of the model and of the average."""
    world, of = DistributedContext(rank, workers, CPU), apply_overrides(recipe(), {"averaging.start": 0.0})
    state = states.create_initial_state(of, CLASSES, 6, CPU)
    network = states.wrap_in_ddp(state.model, workers)
    state.model.register_buffer("running", torch.full((2,), float(rank)))
    state.average = WeightAverager(state.model, of.averaging, 6)
    step = TrainStep(of, state, network, world)
    start = sum(sizes[:rank])
    step(part(batch(), start, start + sizes[rank]))
    return [*state.model.get_buffer("running").tolist(), *state.average.mean["running"].tolist()]


@pytest.mark.process
@pytest.mark.parametrize(("sizes", "mean"), [([6, 2], 0.25), ([8, 0], 0.0)])
def test_statistics_are_equal_on_all_ranks_and_count_images(ranks: Ranks, sizes: list[int], mean: float) -> None:
    assert ranks.run(_statistics, 2, sizes) == [[mean] * 4] * 2


def test_settling_leaves_no_trace() -> None:
    step, state = stepper()
    state.model.register_buffer("seen", torch.zeros(1))

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        module.get_buffer("seen").add_(1)

    state.model.register_forward_pre_hook(count)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    step.warm_up_ddp()
    assert step.find_micro_batch(4) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())
    assert all(one.grad is None for one in state.model.parameters())


# ------------------------------------------------------------------ the search for what fits
def _fitting(rank: int, workers: int, limits: list[int]) -> Any:
    """Return the micro-batch for parts of 24 on a rank whose device holds `limits[rank]` images."""
    step, state = stepper(world=DistributedContext(rank, workers, CPU))
    tried: list[int] = []

    def full(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tried.append(len(inputs[0]))
        if len(inputs[0]) > limits[rank]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    state.model.register_forward_pre_hook(full)
    try:
        found = step.find_micro_batch(24)
    except ConfigError as error:
        return str(error), tried
    step.warm_up_ddp()
    tried.clear()
    step(batch(24))
    return found, tried


@pytest.mark.process
def test_all_ranks_take_the_smallest_micro_batch(ranks: Ranks) -> None:
    assert ranks.run(_fitting, 2, [24, 24]) == [(None, [24])] * 2
    assert ranks.run(_fitting, 2, [24, 7]) == [(6, [6, 6, 6, 6])] * 2
    assert ranks.run(_fitting, 2, [1, 24]) == [(1, [1] * 24)] * 2


@pytest.mark.process
def test_what_does_not_fit_at_all_is_reported_on_all_ranks(ranks: Ranks) -> None:
    (one, tried), (other, _) = ranks.run(_fitting, 2, [0, 24])
    assert one == other
    assert one.startswith("model.image_size must be smaller, got 32: 1 image(s) exceed the memory of cpu")
    assert tried == [24, 12, 6, 3, 2, 1]


def test_a_micro_batch_that_was_given_is_where_the_search_begins() -> None:
    step, state = stepper(execution=Execution(micro_batch=4))
    tried: list[int] = []
    state.model.register_forward_pre_hook(lambda module, inputs: tried.append(len(inputs[0])))
    assert step.find_micro_batch(24) == 4
    assert tried == [4]


@pytest.mark.parametrize(("batch_size", "lanes"), [(8, 8), (32, 8), (30, 7), (5, 8), (256, 64), (3, 8)])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_no_part_is_larger_than_the_largest(batch_size: int, lanes: int, workers: int) -> None:
    most = max(
        len(select_rank_positions(number, batch_size, lanes, rank, workers))
        for number in range(lanes)
        for rank in range(workers)
    )
    assert most <= compute_max_rank_batch(batch_size, lanes, workers) <= min(batch_size, most + 1 + lanes // workers)


# ------------------------------------------------------------------ batch norm, which needs more than one image
def normed() -> Recipe:
    """Over maps of 1 x 1 at its end, where torch raises ValueError for a pass of one image."""
    return apply_overrides(recipe(), {"model.batch_norm": True, "model.lrn": False, "model.image_size": 32})


def seen_by(state: TrainState) -> list[int]:
    sizes: list[int] = []
    state.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


@given(st.integers(2, 4096), st.integers(2, 300) | st.none())
def test_no_pass_of_a_batch_norm_holds_a_single_image(images: int, micro_batch: int | None) -> None:
    passes = count_passes(images, micro_batch, True)
    assert images // passes >= 2
    assert math.ceil(images / passes) <= max(micro_batch or images, 3)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 100), st.integers(2, 9))
def test_every_part_of_every_batch_is_cut_so(lanes: int, workers: int, batch_size: int, micro_batch: int) -> None:
    for number in range(lanes):
        for rank in range(min(workers, lanes)):
            images = len(select_rank_positions(number, batch_size, lanes, rank, workers))
            passes = count_passes(images, micro_batch, True)
            assert passes == 1 or images // passes >= 2
            assert math.ceil(images / passes) <= max(micro_batch, 3)


@pytest.mark.parametrize(("images", "sizes"), [(33, [3] + [2] * 15), (3, [3]), (2, [2]), (1, [2])])
def test_batch_norm_trains_on_parts_of_any_size(images: int, sizes: list[int]) -> None:
    step, state = stepper(normed(), execution=Execution(micro_batch=2))
    seen = seen_by(state)
    assert math.isfinite(float(step(batch(images)).loss))
    assert seen == sizes


def test_an_image_and_its_copy_are_normalised_as_the_image_alone() -> None:
    layer = nn.BatchNorm2d(3)
    image = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    one = Batch(image, torch.zeros(1), torch.ones(1), torch.zeros(1))
    both = _duplicate_single_image(one)
    assert both.weights.tolist() == [1, 0]
    gradients = []
    for images, weights in ((one.images, one.weights), (both.images, both.weights)):
        pixels = images.clone().requires_grad_()
        (layer(pixels).pow(3).sum((1, 2, 3)) * weights).sum().backward()
        assert pixels.grad is not None
        gradients.append(pixels.grad.sum(0))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


@pytest.mark.parametrize(("limit", "found"), [(24, None), (7, 6), (3, 3)])
def test_the_search_ends_above_a_single_image(limit: int, found: int | None) -> None:
    step, state = stepper(normed())
    sizes = seen_by(state)

    def full(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = state.model.register_forward_pre_hook(full)
    assert step.find_micro_batch(24) == found
    handle.remove()
    sizes.clear()
    step(batch(23))
    assert 2 <= min(sizes) <= max(sizes) <= limit


def test_the_search_names_what_does_not_fit_of_a_batch_norm() -> None:
    step, state = stepper(normed())

    def full(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    state.model.register_forward_pre_hook(full)
    with pytest.raises(ConfigError, match=r"3 image\(s\) exceed the memory"):
        step.find_micro_batch(24)


@pytest.mark.parametrize(
    ("batch_size", "workers", "micro_batch", "words"),
    [
        (3, 2, None, "batch_size must be at least 2 for each worker .* got 3 for 2 workers; set --batch-size 4"),
        (1, 1, None, "got 1 for 1 workers"),
        (8, 1, 1, "execution.micro_batch must be at least 2 .* got 1; set --placement.execution.micro-batch 2"),
    ],
)
def test_workers_with_single_images_are_rejected(
    batch_size: int, workers: int, micro_batch: int | None, words: str
) -> None:
    of, execution = apply_overrides(normed(), {"batch_size": batch_size}), Execution(micro_batch=micro_batch)
    state = states.create_initial_state(of, CLASSES, 6, CPU)
    with pytest.raises(ConfigError, match=words):
        TrainStep(of, state, state.model, DistributedContext(0, workers, CPU), execution)
    check_batch_norm(
        apply_overrides(recipe(), {"batch_size": batch_size}), execution, workers
    )  # without batch norm it may


# ------------------------------------------------------------------ options
def test_clipped_gradients_make_smaller_steps() -> None:
    plain, loose = after(recipe()), after(apply_overrides(recipe(), {"optimizer.clip_norm": 1e6}))
    assert farthest(plain[1], loose[1]) < 1e-7
    tight = after(apply_overrides(recipe(), {"optimizer.clip_norm": 1e-3}), num_steps=1)[1]
    start = stepper()[1].snapshot()["model"]
    assert 0 < farthest(start, tight) < farthest(start, after(recipe(), num_steps=1)[1])


def test_bfloat16_trains_in_about_the_same_way() -> None:
    losses, weights = after(apply_overrides(recipe(), {"precision": "bfloat16"}))
    assert losses == pytest.approx(after(recipe())[0], rel=0.05)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_float16_is_rejected_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"precision must be float32 or bfloat16 on a CPU"):
        stepper(apply_overrides(recipe(), {"precision": "float16"}))


def test_compiling_without_a_compiler_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"execution\.compile"):
        stepper(execution=Execution(compile=True))


@pytest.mark.parametrize("bad", [{"micro_batch": 0}, {"profile": [3, 2]}, {"profile": [-1, 2]}, {"profile": [0, 5000]}])
def test_impossible_executions_are_rejected(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Execution.from_dict(bad)
