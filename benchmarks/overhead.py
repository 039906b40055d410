"""Cost of the orchestrator per step: training through Ray against the bare loop, and what a checkpoint takes.

- One worker on one core, with journal, curves and a checkpoint each 30 s, Ray's other processes on another core;
  against Loader and Stepper alone on that core: same recipe, data, order. Paired windows of steady training.
- Checkpoints of the full GoogLeNet: how long training stands still for one, and how much slower steps are meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median

import torch

from benchmarks import frame
from benchmarks.frame import Figure
from orchestrator.data import manifest, sampler
from orchestrator.data.dataloader import Batch, BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.sampler import EpochOrder
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.presets import googlenet_imagenet
from orchestrator.training import train_state as states
from orchestrator.training.attempts import Attempt, Goodput
from orchestrator.training.callbacks.checkpointer import Checkpointer
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import Cadence, TrainJob
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.train_step import TrainStep
from tests.drills import recipes, stage
from tests.drills.stage import Run

ROUNDS = 3
CHECKPOINT_SECONDS = 30.0
# Two checkpoints in each window; and what a process needs to be steady.
WINDOW_SECONDS, WARM_SECONDS = 60.0, 5.0
# So large that steps are arithmetic: 64 px, half the width.
WORDS = (
    "googlenet-digits", "--epochs=1000", "--batch-size=32", "--model.image-size=64", "--model.width=0.5",
    "--placement.workers=1", f"--cadence.checkpoint-seconds={CHECKPOINT_SECONDS}", "--cadence.log-steps=10",
    "--cadence.validate-epochs=1000",
)  # fmt: skip
STALL_SHARE = 0.02
SAVES, STEPS_BETWEEN, SMALL_BATCH = 5, 8, 4
CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-overhead`."""
    mine, others = frame.cores(2)
    pairs = []
    with frame.pinned([others]), stage.cluster() as cluster:
        for number in range(ROUNDS):
            with recipes.submitted(cluster, Path(folder) / f"overhead-{number}", WORDS) as run:
                through_ray = _through_ray(run, mine)
            bare = float(frame.child("overhead", "bare", mine, run.folder, WINDOW_SECONDS))
            frame.progress(f"round {number + 1} of {ROUNDS}: {through_ray:.2f} images/s through Ray, {bare:.2f} bare")
            pairs.append((through_ray, bare))
    yield Figure("overhead.bare.images_per_s", median(bare for _, bare in pairs))
    yield Figure("overhead.through_ray/bare", frame.ratio(*zip(*pairs, strict=True)), at_least=0.98)
    yield from _checkpoints(mine)


# ------------------------------------------------------------------ through Ray, and bare
def _through_ray(run: Run, core: int) -> float:
    """Images/s of a run whose worker is held on one core, in a window of steady training."""
    run.wait(lambda: bool(run.workers()), "a worker")
    (worker,) = run.workers()
    run.await_samples(1)
    for thread in os.listdir(f"/proc/{worker}/task"):
        os.sched_setaffinity(int(thread), {core})
    since = time.time() + WARM_SECONDS
    # The journal is on disk a little later.
    run.wait(lambda: run.events("metrics")[-1].time > since + WINDOW_SECONDS, "the window", WINDOW_SECONDS * 2)
    points = [event for event in run.events("metrics") if since < event.time]
    samples = (points[-1].samples or 0) - (points[0].samples or 0)
    return samples / (points[-1].time - points[0].time)


def bare(core: int, folder: str, seconds: float) -> float:
    """Images/s of loader and steps alone on one core, for the recipe and data of a run."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    spec = RunSpec.from_dict(json.loads((Path(folder) / "spec.json").read_bytes()))
    recipe, data = spec.recipe, manifest.load(spec.destination.data)
    counts = tuple(shard.samples for shard in data.shards("train"))
    steps = sampler.count_steps(sum(counts), recipe.batch_size)
    state = states.create_initial_state(recipe, len(data.classes), steps, CPU)
    stepper = TrainStep(recipe, state, states.wrap_in_ddp(state.model, 1), ALONE)
    loader = BatchLoader(SampleReader(spec.destination.data, data, "train"), recipe.model.image_size, 1)
    try:
        return _rate(_batches(loader, recipe, counts, steps), stepper, seconds)
    finally:
        loader.close()


def _batches(loader: BatchLoader, recipe: Recipe, counts: tuple[int, ...], steps: int) -> Iterator[Batch]:
    """Epoch after epoch, as the loop has them."""
    for epoch in count():
        plan = EpochOrder(counts, recipe.seeds.order, epoch, recipe.order.lanes, recipe.order.window)
        seed = recipe.seeds.augmentation
        yield from loader.iter_training(plan, recipe.augmentation, seed, recipe.batch_size, range(steps))


def _rate(batches: Iterator[Batch], stepper: TrainStep, seconds: float) -> float:
    warm, began, images = time.monotonic() + WARM_SECONDS, 0.0, 0
    for batch in batches:
        stepper(batch)
        now = time.monotonic()
        if not began:
            began = now if now > warm else 0.0
            continue
        images += len(batch.ids)
        if now - began > seconds:
            return images / (now - began)
    raise AssertionError("the epochs ended")


# ------------------------------------------------------------------ checkpoints
def _checkpoints(core: int) -> Iterator[Figure]:
    """Measure what saves of the full GoogLeNet take of the training thread, by itself and by the writer beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with frame.pinned([core]), tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder:
            stalls, alone, beside = _saved(folder)
    finally:
        torch.set_num_threads(threads)
    usual = median(alone)
    extra = sum(max(0.0, seconds - usual) for seconds in beside) / SAVES
    yield Figure("overhead.checkpoint.stall_seconds", median(stalls))
    yield Figure("overhead.checkpoint.stall_share", max(stalls) / CHECKPOINT_SECONDS, at_most=STALL_SHARE)
    yield Figure("overhead.checkpoint.step_beside_writer/alone", median(beside) / usual)
    yield Figure("overhead.checkpoint.stall_and_slower_steps_share", (median(stalls) + extra) / CHECKPOINT_SECONDS)


def _saved(folder: str) -> tuple[list[float], list[float], list[float]]:
    """Seconds: that each save held training up, of steps without a writer, and of steps beside one."""
    recipe = googlenet_imagenet()
    size = recipe.model.image_size
    state = states.create_initial_state(recipe, 1000, 1000, CPU)
    stepper = TrainStep(recipe, state, state.model, ALONE)
    saver = _saver(recipe, folder)
    images = torch.randint(0, 256, (SMALL_BATCH, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    ids = torch.arange(SMALL_BATCH)
    batch = Batch(images, ids, torch.ones(SMALL_BATCH), ids)
    stepper(batch)  # makes momentum, which is saved too
    stalls, alone, beside = [], [], []
    for number in range(SAVES):
        for _ in range(STEPS_BETWEEN):
            alone.append(_seconds(stepper, batch))
        before = time.monotonic()
        saver.save(state)
        stalls.append(time.monotonic() - before)
        while any(thread.name == "checkpoint" for thread in threading.enumerate()):
            beside.append(_seconds(stepper, batch))
        saver.writer.wait()
        frame.progress(f"checkpoint {number + 1} of {SAVES}: training stood still for {stalls[-1]:.3f} s")
    return stalls, alone, beside


def _saver(recipe: Recipe, folder: str) -> Checkpointer:
    job = TrainJob(
        recipe=recipe, cadence=Cadence(), data=folder, dataset_digest="-", folder=folder, stop_flag=f"{folder}/stop"
    )
    attempt = Attempt(f"{folder}/attempts", 1, time.time())
    return Checkpointer(job, attempt, Goodput(attempt), Watchdog(job.cadence.limits, lambda *_: None))


def _seconds(stepper: TrainStep, batch: Batch) -> float:
    began = time.perf_counter()
    stepper(batch)
    return time.perf_counter() - began


if __name__ == "__main__":
    _, part, core, folder, seconds = sys.argv
    assert part == "bare", part
    print(json.dumps(bare(int(core), folder, float(seconds))))
