"""One worker of benchmarks/scaling.py: python -m benchmarks.scaling_rank RANK WORKERS URL."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from orchestrator.data.dataloader import Batch
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.presets import googlenet_digits
from orchestrator.training import train_state as states
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.train_step import TrainStep

BATCH = 96  # of all workers
CLASSES = 10
STEPS, ROUNDS, WARM = 2, 5, 2
CPU = torch.device("cpu")
# Large images on a narrow network: as with GoogLeNet itself, there is much to compute for each byte of gradients.
IMAGE_SIZE, WIDTH = 64, 0.5


def recipe(workers: int) -> Recipe:
    """A GoogLeNet whose work is split among so many."""
    base = googlenet_digits()
    model = base.model.model_copy(update={"image_size": IMAGE_SIZE, "width": WIDTH})
    return Recipe.from_dict(base.model_copy(update={"model": model, "batch_size": BATCH // workers}).to_dict())


def part(workers: int, rank: int) -> Batch:
    """This rank's images of a global batch: noise, which takes as long as photographs."""
    images, size = BATCH // workers, IMAGE_SIZE
    generator = torch.Generator().manual_seed(rank)
    pixels = torch.randint(256, (images, size, size, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    return Batch(pixels, labels, torch.ones(images), torch.arange(images) + rank * images)


def stepper(workers: int, world: DistributedContext) -> TrainStep:
    """Steps as training makes them, with the exchange of gradients where the world has more than one."""
    of = recipe(workers)
    state = states.create_initial_state(of, CLASSES, 1000, CPU)
    return TrainStep(of, state, states.wrap_in_ddp(state.model, world.workers), world)


def gradients(workers: int) -> torch.Tensor:
    """As many numbers as a step exchanges."""
    model = states.create_initial_state(recipe(workers), CLASSES, 1, CPU).model
    return torch.zeros(sum(one.numel() for one in model.parameters() if one.requires_grad))


def timed(steps: int, work: Callable[[], object]) -> float:
    """Seconds of each of some steps that all ranks begin together."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    return (time.perf_counter() - began) / steps


def main(rank: int, workers: int, url: str) -> None:
    """Measure, and print what was found as the last line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=workers)
    batch, flat = part(workers, rank), gradients(workers)
    together, apart = (
        stepper(workers, DistributedContext(rank, workers, CPU)),
        stepper(workers, DistributedContext(0, 1, CPU)),
    )
    kinds: dict[str, Callable[[], object]] = {
        "step": lambda: together(batch),
        "alone": lambda: apart(batch),
        "exchange": lambda: dist.all_reduce(flat),
    }
    for work in kinds.values():
        timed(WARM, work)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, work in kinds.items():
            found[kind].append(timed(STEPS, work))
    print(json.dumps({**found, "bytes": flat.numel() * flat.element_size()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
