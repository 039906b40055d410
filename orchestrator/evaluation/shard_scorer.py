"""Score a shard: decode each image once, cut its 144 crops once, run every model on them."""

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
from torch import Tensor

from orchestrator.data import manifest, sampler
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.dataset import Prefetcher, SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import decode_image
from orchestrator.evaluation import inference
from orchestrator.evaluation.inference import CropViews, InferenceModel
from orchestrator.evaluation.score_store import ShardScoreWriter
from orchestrator.evaluation.scoring_task import MAX_MODELS_PER_TASK, ScoringTarget, ShardScoringTask

STREAM_SAMPLES = 64  # samples of a shard that are read ahead


@dataclass(frozen=True)
class PreparedSample:
    """A sample ready for the networks, or the reason why it is not."""

    id: int
    label: int
    views: CropViews | None
    bad: str = ""


def score_shard(arguments: dict[str, Any]) -> list[str]:
    """Score and commit a ShardScoringTask; return key and reason of each image that cannot be decoded.

    Safe to repeat on any node after a crash. Raises DataError when the data or a model does not match the task;
    FileNotFoundError or CheckpointError for weights that are missing or damaged.
    """
    task = ShardScoringTask.from_dict(arguments)
    torch.set_num_threads(task.threads)
    dataset = manifest.load(task.data, allow_elsewhere=task.allow_elsewhere)
    models = load_models(task.scorers, dataset)
    num_samples = dataset.shards(task.split)[task.shard].samples
    writers = [ShardScoreWriter(num_samples, len(dataset.classes)) for _ in models]
    bad: list[str] = []
    with closing(iter_samples(task, dataset, models[0])) as samples:
        for group in _batch_samples(samples, inference.compute_batch_size(models[0].size, models[0].device)):
            bad += [sample.bad for sample in group if sample.views is None]
            good = [(sample.id, sample.label, sample.views) for sample in group if sample.views is not None]
            if not good:
                continue
            ids, labels = (np.array([sample[field] for sample in good], dtype=np.int64) for field in (0, 1))
            views = [sample[2] for sample in good]
            answers = inference.predict_images(models, views, mirrored=True)
            for target, writer, by_image in zip(task.scorers, writers, answers, strict=True):
                rows = [reduce_crops(found, view.view_indices) for found, view in zip(by_image, views, strict=True)]
                try:
                    writer.add(ids, labels, torch.stack(rows).cpu().numpy())
                except ValueError as error:
                    where = f"{target.name}: image {ids[0]} of the split or one of the {len(ids) - 1} after it"
                    raise DataError(f"{where}: {error}; if its training diverged, leave it out") from None
    for target, writer in zip(task.scorers, writers, strict=True):
        writer.save(target.scores, task.shard, len(bad))
    return bad


_load_cached_model = lru_cache(maxsize=MAX_MODELS_PER_TASK)(inference.load_inference_model)  # for the next shard


def load_models(targets: Sequence[ScoringTarget], dataset: Manifest) -> list[InferenceModel]:
    """Load the networks. Raises DataError naming one of other classes than the dataset's or of another digest."""
    models = []
    for target in targets:
        model = _load_cached_model(target.weights, target.which)
        if model.digest != target.digest:
            what = f"its weights must have digest {target.digest}, got {model.digest}"
            raise DataError(f"{target.name}: {what}: they were replaced; run the same command again")
        if model.classes != dataset.classes:
            what = f"was trained on {len(model.classes)} classes that are not the {len(dataset.classes)}"
            raise DataError(f"{target.name}: {what} of {dataset.name}; leave it out, or set its own dataset")
        models.append(model)
    return models


def iter_samples(task: ShardScoringTask, dataset: Manifest, model: InferenceModel) -> Generator[PreparedSample]:
    """Yield the samples of the shard in order, read, decoded and cut in threads while the caller runs networks.

    With a GPU all CPU threads do this; beside networks on the CPU a single one is enough.
    """
    counts = [shard.samples for shard in dataset.shards(task.split)]
    start, num_samples = sum(counts[: task.shard]), counts[task.shard]
    cuda = model.device.type == "cuda"
    ahead = max(2, 2 * inference.compute_batch_size(model.size, model.device) // multi_crop.NUM_UNMIRRORED)
    with (
        closing(SampleReader(task.data, dataset, task.split, task.reading)) as reader,
        reader.open_prefetcher(sampler.plan_id_range(counts, start, start + num_samples, STREAM_SAMPLES)) as prefetcher,
        ThreadPoolExecutor(task.threads if cuda else 1, thread_name_prefix="crops") as pool,
    ):
        pending: deque[Future[PreparedSample]] = deque()
        try:
            for number in range(num_samples):
                if number % STREAM_SAMPLES == 0:
                    prefetcher.advance(number // STREAM_SAMPLES)
                pending.append(
                    pool.submit(_prepare_sample, prefetcher, task.shard, number, start + number, model.size, cuda)
                )
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_sample(
    prefetcher: Prefetcher, shard: int, number: int, sample_id: int, size: int, pin: bool
) -> PreparedSample:
    sample = prefetcher.get_sample(shard, number)
    try:
        views = inference.build_views(decode_image(sample.image), size)
    except BadSampleError as error:
        return PreparedSample(sample_id, sample.label, None, f"{sample.key!r} of {sample.source}: {error}")
    return PreparedSample(sample_id, sample.label, views.pin_memory() if pin else views)


def _batch_samples(samples: Iterator[PreparedSample], batch_size: int) -> Iterator[list[PreparedSample]]:
    """Group samples whose views together fill a forward pass: one photo, or many small pictures."""
    group: list[PreparedSample] = []
    num_views = 0
    for sample in samples:
        group.append(sample)
        num_views += 0 if sample.views is None else len(sample.views.pixels)
        if num_views >= batch_size:
            yield group
            group, num_views = [], 0
    if group:
        yield group


def _build_mean_weights() -> Tensor:
    """Return 7 x 144 weights of the crops in the means, in the order of the stored rows."""
    numbers = torch.arange(multi_crop.NUM_CROPS)
    rows = [torch.isin(numbers, torch.tensor(chosen)) for chosen in multi_crop.CROP_SUBSETS.values()]
    scale_of = numbers % multi_crop.NUM_UNMIRRORED // multi_crop.CROPS_PER_SCALE
    rows += [scale_of == scale for scale in range(len(multi_crop.PAPER_SCALES))]
    return torch.stack([row.float() / row.sum() for row in rows])


_MEAN_WEIGHTS = _build_mean_weights()


def reduce_crops(probabilities: Tensor, view_indices: Tensor) -> Tensor:
    """Return 8 x C float32: means over 1, 10 and 144 crops and over each of the four scales, and the maximum of all.

    probabilities: 2D x C float32 of an image's views, then of their mirror images.
    """
    device = probabilities.device
    counts = torch.zeros(len(_MEAN_WEIGHTS), len(probabilities)).index_add_(1, view_indices, _MEAN_WEIGHTS)
    return torch.cat((counts.to(device) @ probabilities, probabilities.amax(dim=0, keepdim=True)))
