"""Scoring a shard: each image decoded once, its 144 crops cut once, every model run on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data import manifest, prefetch
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.dataset import STREAM_SAMPLES, SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.prefetch import Prefetcher
from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import decode_image
from orchestrator.evaluation import crop_views, inference
from orchestrator.evaluation.crop_views import CropViews
from orchestrator.evaluation.inference import InferenceModel
from orchestrator.evaluation.score_store import ShardScoreWriter
from orchestrator.evaluation.scoring_task import (
    MAX_MODELS_PER_TASK,
    ScoringTarget,
    ShardScoringResult,
    ShardScoringTask,
    WeightsVariant,
)

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class PreparedSample:
    """A sample ready for the networks, or why it is not."""

    id: int
    label: int
    views: CropViews | None
    bad: str = ""


def score_shard(raw: dict[str, Any]) -> dict[str, Any]:
    """Score and commit a ScoreShard; the Scored. Runs as a task on any node, again after any death.

    Raises DataError when the data, or a model for it, is not what was asked for; FileNotFoundError or CheckpointError
    for weights that are missing or damaged.
    """
    task = ShardScoringTask.from_dict(raw)
    torch.set_num_threads(task.threads)
    found = manifest.load(task.data, allow_elsewhere=task.allow_elsewhere)
    members = load_models(task.scorers, found)
    samples = found.shards(task.split)[task.shard].samples
    parts = [ShardScoreWriter(samples, len(found.classes)) for _ in members]
    bad: list[str] = []
    images = 0
    with closing(iter_samples(task, found, members[0])) as ready:
        for group in _batch_samples(ready, inference.compute_batch_size(members[0].size, members[0].device)):
            bad += [one.bad for one in group if one.views is None]
            good = [(one.id, one.label, one.views) for one in group if one.views is not None]
            if not good:
                continue
            ids, labels = (np.array([one[at] for one in good], dtype=np.int64) for at in (0, 1))
            for scorer, part, rows in zip(
                task.scorers, parts, score_images(members, [one[2] for one in good]), strict=True
            ):
                _append_scores(scorer, part, ids, labels, rows)
            images += len(good)
    assert images + len(bad) == samples, f"{images} scored and {len(bad)} bad images of {samples}"
    for scorer, part in zip(task.scorers, parts, strict=True):
        part.save(scorer.scores, task.shard, len(bad))
    return ShardScoringResult(images=images, bad=tuple(bad)).to_dict()


def load_models(scorers: Sequence[ScoringTarget], found: Manifest) -> list[InferenceModel]:
    """The networks, ready. Raises DataError naming one that is not for this dataset or not the one asked for."""
    members = []
    for scorer in scorers:
        member = _load_cached_model(scorer.weights, scorer.which, str(inference.select_device()))
        if member.digest != scorer.digest:
            raise DataError(f"{scorer.name}: its weights are {member.digest}, not {scorer.digest}: they were replaced")
        if member.classes != found.classes:
            raise DataError(
                f"{scorer.name}: was trained on {len(member.classes)} classes that are not the {len(found.classes)} of "
                f"{found.name}; leave it out, or give its own dataset"
            )
        members.append(member)
    sizes = {member.size for member in members}
    assert len(sizes) == 1, f"models of one size share their crops; these have {sorted(sizes)}"
    return members


@lru_cache(maxsize=MAX_MODELS_PER_TASK)  # the next shard is for the same ones
def _load_cached_model(url: str, which: WeightsVariant, device: str) -> InferenceModel:
    return inference.load_inference_model(url, which, torch.device(device))


def iter_samples(task: ShardScoringTask, found: Manifest, first: InferenceModel) -> Generator[PreparedSample]:
    """The samples of the shard in order, read, decoded and cut in threads while the caller runs networks.

    A GPU leaves the CPU's threads to this; beside networks on the CPU, one is enough and keeps out of their way.
    """
    shards = found.shards(task.split)
    counts = [shard.samples for shard in shards]
    start, samples = sum(counts[: task.shard]), counts[task.shard]
    cuda = first.device.type == "cuda"
    ahead = max(2, 2 * inference.compute_batch_size(first.size, first.device) // multi_crop.NUM_UNMIRRORED)
    reader = SampleReader(task.data, found, task.split, task.reading)
    with (
        closing(reader),
        reader.open_prefetcher(prefetch.plan_id_range(counts, start, start + samples, STREAM_SAMPLES)) as along,
        ThreadPoolExecutor(task.threads if cuda else 1, thread_name_prefix="crops") as pool,
    ):
        waiting: deque[Future[PreparedSample]] = deque()
        try:
            for number in range(samples):
                if number % STREAM_SAMPLES == 0:
                    along.advance(number // STREAM_SAMPLES)
                waiting.append(
                    pool.submit(_prepare_sample, along, task.shard, number, start + number, first.size, cuda)
                )
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


def _prepare_sample(along: Prefetcher, shard: int, number: int, sample_id: int, size: int, pin: bool) -> PreparedSample:
    sample = along.get_sample(shard, number)
    try:
        found = crop_views.build_views(decode_image(sample.image), size)
    except BadSampleError as error:
        return PreparedSample(sample_id, sample.label, None, f"{sample.key!r} of {sample.source}: {error}")
    return PreparedSample(sample_id, sample.label, found.pin_memory() if pin else found)


def _batch_samples(ready: Iterator[PreparedSample], at_once: int) -> Iterator[list[PreparedSample]]:
    """Samples whose views together fill a forward pass: one photo, or many small pictures."""
    group: list[PreparedSample] = []
    held = 0
    for one in ready:
        group.append(one)
        held += 0 if one.views is None else len(one.views.pixels)
        if held >= at_once:
            yield group
            group, held = [], 0
    if group:
        yield group


def score_images(members: Sequence[InferenceModel], images: Sequence[CropViews]) -> list[Tensor]:
    """The stored rows of images, N x 8 x C float32 on the CPU, for each of several members of one size and device."""
    pixels = images[0].pixels if len(images) == 1 else torch.cat([one.pixels for one in images])
    counts = [len(one.pixels) for one in images]
    rows = []
    for both in inference.predict_models(members, pixels, mirrored=True):
        unmirrored, mirrored = (torch.split(half, counts) for half in (both[: len(pixels)], both[len(pixels) :]))
        pairs = zip(unmirrored, mirrored, images, strict=True)
        rows.append(
            torch.stack([crop_views.reduce_crops(torch.cat(pair), one.view_indices) for *pair, one in pairs]).cpu()
        )
    return rows


def _append_scores(
    scorer: ScoringTarget, part: ShardScoreWriter, ids: Int64Array, labels: Int64Array, rows: Tensor
) -> None:
    try:
        part.add(ids, labels, rows.numpy())
    except ValueError as error:
        raise DataError(
            f"{scorer.name}: image {ids[0]} of the split or one of the {len(ids) - 1} after it: {error}: its training "
            "diverged? leave it out"
        ) from None
