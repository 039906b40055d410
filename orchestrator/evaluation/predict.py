"""Scoring a shard: each image decoded once, its 144 crops cut once, every model run on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.checkpoint import weights
from orchestrator.config.base import Config
from orchestrator.data import crops, manifest
from orchestrator.data.config import ReadingConfig
from orchestrator.data.decode import Image, decode
from orchestrator.data.errors import BadSampleError
from orchestrator.data.reader import SampleReader
from orchestrator.evaluation import score_store
from orchestrator.evaluation.score_store import Scores
from orchestrator.models.build import build
from orchestrator.models.network import Network
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.normalise import Normaliser

# float32 bytes of the crops of one forward pass: bounds the memory at any image size.
FORWARD_BYTES = 32 * 2**20
# Stored for each image: means over 1, 10 and 144 crops, over each of the four scales, and the maximum.
ROWS = len(crops.SUBSETS) + len(crops.PAPER_SCALES) + 1


class Scorer(Config):
    """One model to score: its final weights, and where its scores go."""

    final: str
    scores: str


class ScoreShard(Config):
    """One task: score these models, all of one image size, on one shard."""

    data: str
    split: str
    shard: int
    scorers: tuple[Scorer, ...]
    threads: int
    reading: ReadingConfig = ReadingConfig()


def score_shard(raw: dict[str, Any]) -> int:
    """Score and commit; the number of images. Runs as a task on any node, again after any death."""
    task = ScoreShard.from_dict(raw)
    torch.set_num_threads(task.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = manifest.load(task.data)
    shards = found.shards(task.split)
    first = sum(shard.samples for shard in shards[: task.shard])
    reader = SampleReader(task.data, found, task.split, task.reading)
    loaded = [_model(scorer.final, str(device)) for scorer in task.scorers]
    ids: list[int] = []
    labels: list[int] = []
    rows: list[list[NDArray[np.float32]]] = [[] for _ in loaded]
    for number, sample in enumerate(reader.stream(task.shard)):
        try:
            views = _crops(decode(sample.image), loaded[0][1].model.image_size)
        except BadSampleError:
            continue  # counted below: the shard's samples less those scored
        ids.append(first + number)
        labels.append(sample.label)
        for (model, recipe), found_rows in zip(loaded, rows, strict=True):
            found_rows.append(_reduced(_probabilities(model, recipe, views, device)))
    reader.close()
    bad = shards[task.shard].samples - len(ids)
    for scorer, found_rows in zip(task.scorers, rows, strict=True):
        stacked = np.stack(found_rows) if found_rows else np.zeros((0, ROWS, len(found.classes)), dtype=np.float32)
        scores = _scores(stacked, np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64), bad)
        score_store.save(scorer.scores, task.shard, scores)
    return len(ids)


@lru_cache(maxsize=16)
def _model(url: str, device: str) -> tuple[Network, Recipe]:
    """A model ready for inference; a task's process keeps those it used."""
    final = weights.load(url)
    recipe = Recipe.from_dict(final.recipe)
    model = build(recipe.model, len(final.classes), 0)
    model.drop_auxiliary()
    model.load_state_dict(final.averaged)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval(), recipe


def _crops(image: Image, size: int) -> Tensor:
    """144 x 3 x S x S uint8 in channels_last memory: the 72 views, then their mirror images."""
    views = np.empty((crops.UNMIRRORED, size, size, 3), dtype=np.uint8)
    crops.cut(image, size, views)
    both = np.concatenate((views, views[:, :, ::-1]))
    return torch.from_numpy(both).permute(0, 3, 1, 2)


def _probabilities(model: Network, recipe: Recipe, views: Tensor, device: torch.device) -> Tensor:
    """144 x C float32 on the CPU."""
    normalise = Normaliser(recipe.preprocessing, device)
    at_once = max(1, FORWARD_BYTES // (views[0].numel() * 4))
    with torch.inference_mode():
        parts = [
            model(normalise(part.to(device))).main.float().softmax(dim=1).cpu() for part in torch.split(views, at_once)
        ]
    return torch.cat(parts)


def _reduced(probabilities: Tensor) -> NDArray[np.float32]:
    """8 x C: means over 1, 10 and 144 crops, over each of the four scales, and the maximum."""
    scale_of = torch.arange(crops.NUM_CROPS) % crops.UNMIRRORED // crops.PER_SCALE
    rows = [probabilities[list(chosen)].mean(dim=0) for chosen in crops.SUBSETS.values()]
    rows += [probabilities[scale_of == scale].mean(dim=0) for scale in range(len(crops.PAPER_SCALES))]
    rows.append(probabilities.amax(dim=0))
    return torch.stack(rows).numpy()


def _scores(stacked: NDArray[np.float32], ids: NDArray[np.int64], labels: NDArray[np.int64], bad: int) -> Scores:
    means = {count: stacked[:, row] for row, count in enumerate(crops.SUBSETS)}
    return Scores(ids, labels, means, stacked[:, 3:7], stacked[:, 7], bad)


def models_by_size(recipes: Sequence[Recipe]) -> dict[int, list[int]]:
    """Numbers of the recipes grouped by image size: models of one size share their crops."""
    groups: dict[int, list[int]] = {}
    for number, recipe in enumerate(recipes):
        groups.setdefault(recipe.model.image_size, []).append(number)
    return groups
