"""The whole grid of Table 3, 7 models x 144 crops of every image, against the bare forward passes of those crops.

- Photos (500 x 375) at 224 pixels, 1,000 classes, in one thread on one core: what a task of scoring does, from tars on
  disk to committed scores, against the seven networks on crops that lie ready as normalised floats, as many at a time.
- The parts of it that are no forward pass, each by itself: reading, decoding and cutting; then reducing and storing.
- Digits, by the tiny network: decoding and cutting cost as much as ever while a forward pass takes 0.07 ms a crop, so
  they are no small share; but a digit is a square, whose 144 crops are 48 that differ, so the whole costs a third of
  the bare passes of all its crops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from benchmarks import frame, photos
from benchmarks.frame import Cost, Figure
from orchestrator.checkpoint import weights
from orchestrator.data import manifest
from orchestrator.data.build.sources.digits import pack_digits
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.transforms.multi_crop import NUM_UNMIRRORED
from orchestrator.evaluation import inference, shard_scorer
from orchestrator.evaluation.inference import CropViews, InferenceModel
from orchestrator.evaluation.score_store import NUM_ROWS, ShardScoreWriter
from orchestrator.evaluation.scoring_task import ScoringTarget, ShardScoringTask
from orchestrator.evaluation.shard_scorer import iter_samples, score_shard
from orchestrator.models.registry import create_model
from orchestrator.recipe import presets
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.normalize import Normalizer
from orchestrator.storage import file_io

MEMBERS, CLASSES, SPLIT = 7, 1000, "validation"
PHOTOS, ROUNDS = 2, 3
DIGITS_ROUNDS, PARTS_ROUNDS = 5, 5
MOST, MOST_BESIDE = 1.05, 0.05


@dataclass(frozen=True)
class Grid:
    """A task of scoring, the networks that it uses, and its images as they see them."""

    task: ShardScoringTask
    members: list[InferenceModel]
    images: list[CropViews]

    def whole(self) -> None:
        """Score the shard, from its tar to its committed scores."""
        score_shard(self.task.to_dict())

    def prepare(self) -> None:
        """Read, decode and cut, and no more."""
        for _ in iter_samples(self.task, manifest.load(self.task.data), self.members[0]):
            pass

    def store(self, rows: Tensor) -> None:
        """Store N x ROWS x C float32 for each of the models, and no more."""
        ids = np.arange(len(rows), dtype=np.int64)
        for number in range(MEMBERS):
            part = ShardScoreWriter(len(rows), rows.shape[2])
            part.add(ids, ids, rows.numpy())
            part.save(f"{self.task.scorers[number].scores}-spare", self.task.shard, 0)

    def passes(self, images: Tensor, at_once: int) -> None:
        """The bare forward passes of N x 3 x S x S float32 through all networks, at most so many at a time."""
        with torch.inference_mode():
            for part in torch.split(images, at_once):
                for member in self.members:
                    member.model(part)

    def floats(self, every: bool) -> Tensor:
        """The images' views that differ and their mirror images, or (`every`) their 144 crops, normalised."""
        normalise = Normalizer(self.members[0].recipe.preprocessing, torch.device("cpu"))
        found = [torch.cat((one.pixels, one.pixels.flip(3))) for one in self.images]
        if every:
            found = [both[one.view_indices] for both, one in zip(found, self.images, strict=True)]
        return normalise(torch.cat(found)).contiguous(memory_format=torch.channels_last)


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-grid`."""
    torch.set_num_threads(1)
    with frame.pinned(frame.cores(1)):
        yield from _photos(folder)
        yield from _digits(folder)


def _photos(folder: str) -> Iterator[Figure]:
    grid = _grid(folder, "photos", _photo_data(folder), presets.googlenet_imagenet(), CLASSES)
    crops = grid.floats(every=True)
    # As scoring cuts the 72 views of a photo into equal parts: no remainder that would be slower by the crop.
    at_once = NUM_UNMIRRORED // -(-NUM_UNMIRRORED // inference.compute_batch_size(224, torch.device("cpu")))
    parts: dict[str, Callable[[], object]] = {"forward": partial(grid.passes, crops, at_once), "whole": grid.whole}
    grid.passes(crops[:2], 2)
    costs = frame.interleaved(parts, ROUNDS)
    bare = median(_cpu(costs["forward"]))
    yield Figure("grid.whole/forward", frame.ratio(_cpu(costs["whole"]), _cpu(costs["forward"])), at_most=MOST)
    beside = _beside(grid, CLASSES)
    for name, seconds in beside.items():
        yield Figure(f"grid.{name}/forward", seconds / bare)
    yield Figure("grid.decode_crops_store/forward", sum(beside.values()) / bare, at_most=MOST_BESIDE)
    yield Figure("grid.forward.ms_a_crop", 1000 * bare / (MEMBERS * len(crops)))
    few = crops[:144]
    by_size: dict[str, Callable[[], object]] = {str(n): partial(grid.passes, few, n) for n in (at_once, len(few))}
    large, small = (_cpu(found) for found in reversed(frame.interleaved(by_size, 1).values()))
    yield Figure("grid.forward_144_at_once/forward", frame.ratio(large, small))


def _digits(folder: str) -> Iterator[Figure]:
    data = os.path.join(folder, "grid", "digits")
    pack_digits(data)
    grid = _grid(folder, "digits-runs", data, presets.googlenet_tiny(), 10)
    every, views = grid.floats(every=True), grid.floats(every=False)
    parts: dict[str, Callable[[], None]] = {
        "whole": grid.whole,
        "forward": partial(grid.passes, every, 144),
        "forward_of_views": partial(grid.passes, views, inference.compute_batch_size(32, torch.device("cpu"))),
    }
    for part in parts.values():
        part()
    costs = frame.interleaved(parts, DIGITS_ROUNDS)
    for name in ("forward", "forward_of_views"):
        yield Figure(f"grid.digits.whole/{name}", frame.ratio(_cpu(costs["whole"]), _cpu(costs[name])))
    for name, seconds in _beside(grid, 10).items():
        yield Figure(f"grid.digits.{name}/whole", seconds / median(_cpu(costs["whole"])))
    yield Figure("grid.digits.images_per_cpu_s", len(grid.images) / median(_cpu(costs["whole"])))


def _beside(grid: Grid, classes: int) -> dict[str, float]:
    """CPU seconds of what is no forward pass: all of it but mirroring and normalising, which only `whole` has."""
    rows = torch.rand(len(grid.images), NUM_ROWS, classes).softmax(dim=2)
    parts: dict[str, Callable[[], object]] = {"decode_crops": grid.prepare, "store": partial(grid.store, rows)}
    costs = frame.interleaved(parts, PARTS_ROUNDS)
    return {name: median(_cpu(found)) for name, found in costs.items()}


def _cpu(costs: list[Cost]) -> list[float]:
    return [cost.cpu for cost in costs]


def _grid(folder: str, name: str, data: str, recipe: Recipe, classes: int) -> Grid:
    """The task of the first shard of `data`, for seven networks with weights of their own."""
    found = manifest.load(data)
    scorers = []
    for number in range(MEMBERS):
        model = create_model(recipe.model, classes, number)
        model.drop_auxiliary()
        url = os.path.join(folder, "grid", name, f"m{number}")
        state = model.state_dict()
        digest = weights.save(f"{url}/final", state, state, recipe.to_dict(), found.classes)
        scorers.append(
            ScoringTarget(name=f"m{number}", weights=f"{url}/final", digest=digest, scores=f"{url}/scores/grid")
        )
    task = ShardScoringTask(data=data, split=SPLIT, shard=0, scorers=tuple(scorers), threads=1)
    members = shard_scorer.load_models(scorers, found)
    images = [one.views for one in iter_samples(task, found, members[0]) if one.views is not None]
    return Grid(task, members, images)


def _photo_data(folder: str) -> str:
    """A shard of photos of as many classes as ImageNet has."""
    url = os.path.join(folder, "grid", "photos-data")
    if not file_io.exists(file_io.join(url, manifest.FILE_NAME)):
        frame.progress("making photos")
        jpegs = [simplejpeg.encode_jpeg(photos.cut_out(n), quality=photos.QUALITY) for n in range(PHOTOS)]
        samples = [RawSample(f"photo-{n}", bytes(jpeg), n) for n, jpeg in enumerate(jpegs)]
        write_dataset(url, "photos", tuple(f"class-{n:04d}" for n in range(CLASSES)), {SPLIT: samples}, PHOTOS)
    return url
