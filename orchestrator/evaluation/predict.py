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

from orchestrator.data import crops, manifest, read_plan
from orchestrator.data.decode import decode
from orchestrator.data.errors import BadSampleError, DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.read_ahead import ReadAhead
from orchestrator.data.reader import STREAMED, SampleReader
from orchestrator.evaluation import forward, views
from orchestrator.evaluation.forward import Member
from orchestrator.evaluation.score_store import Part
from orchestrator.evaluation.score_task import MOST_SCORERS, Scored, Scorer, ScoreShard, Which
from orchestrator.evaluation.views import Views

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """A sample ready for the networks, or why it is not."""

    id: int
    label: int
    views: Views | None
    bad: str = ""


def score_shard(raw: dict[str, Any]) -> dict[str, Any]:
    """Score and commit a ScoreShard; the Scored. Runs as a task on any node, again after any death.

    Raises DataError when the data, or a model for it, is not what was asked for; FileNotFoundError or CheckpointError
    for weights that are missing or damaged.
    """
    task = ScoreShard.from_dict(raw)
    torch.set_num_threads(task.threads)
    found = manifest.load(task.data, allow_elsewhere=task.allow_elsewhere)
    members = members_of(task.scorers, found)
    samples = found.shards(task.split)[task.shard].samples
    parts = [Part(samples, len(found.classes)) for _ in members]
    bad: list[str] = []
    images = 0
    with closing(prepared(task, found, members[0])) as ready:
        for group in _groups(ready, forward.at_once(members[0].size, members[0].device)):
            bad += [one.bad for one in group if one.views is None]
            good = [(one.id, one.label, one.views) for one in group if one.views is not None]
            if not good:
                continue
            ids, labels = (np.array([one[at] for one in good], dtype=np.int64) for at in (0, 1))
            for scorer, part, rows in zip(task.scorers, parts, scores(members, [one[2] for one in good]), strict=True):
                _add(scorer, part, ids, labels, rows)
            images += len(good)
    assert images + len(bad) == samples, f"{images} scored and {len(bad)} bad images of {samples}"
    for scorer, part in zip(task.scorers, parts, strict=True):
        part.save(scorer.scores, task.shard, len(bad))
    return Scored(images=images, bad=tuple(bad)).to_dict()


def members_of(scorers: Sequence[Scorer], found: Manifest) -> list[Member]:
    """The networks, ready. Raises DataError naming one that is not for this dataset or not the one asked for."""
    members = []
    for scorer in scorers:
        member = _member(scorer.weights, scorer.which, str(forward.best_device()))
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


@lru_cache(maxsize=MOST_SCORERS)  # the next shard is for the same ones
def _member(url: str, which: Which, device: str) -> Member:
    return forward.load(url, which, torch.device(device))


def prepared(task: ScoreShard, found: Manifest, first: Member) -> Generator[Prepared]:
    """The samples of the shard in order, read, decoded and cut in threads while the caller runs networks.

    A GPU leaves the CPU's threads to this; beside networks on the CPU, one is enough and keeps out of their way.
    """
    shards = found.shards(task.split)
    counts = [shard.samples for shard in shards]
    start, samples = sum(counts[: task.shard]), counts[task.shard]
    cuda = first.device.type == "cuda"
    ahead = max(2, 2 * forward.at_once(first.size, first.device) // crops.UNMIRRORED)
    reader = SampleReader(task.data, found, task.split, task.reading)
    with (
        closing(reader),
        reader.along(read_plan.of_ids(counts, start, start + samples, STREAMED)) as along,
        ThreadPoolExecutor(task.threads if cuda else 1, thread_name_prefix="crops") as pool,
    ):
        waiting: deque[Future[Prepared]] = deque()
        try:
            for number in range(samples):
                if number % STREAMED == 0:
                    along.advance(number // STREAMED)
                waiting.append(pool.submit(_prepare, along, task.shard, number, start + number, first.size, cuda))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


def _prepare(along: ReadAhead, shard: int, number: int, sample_id: int, size: int, pin: bool) -> Prepared:
    sample = along.take(shard, number)
    try:
        found = views.cut(decode(sample.image), size)
    except BadSampleError as error:
        return Prepared(sample_id, sample.label, None, f"{sample.key!r} of {sample.source}: {error}")
    return Prepared(sample_id, sample.label, found.pinned() if pin else found)


def _groups(ready: Iterator[Prepared], at_once: int) -> Iterator[list[Prepared]]:
    """Samples whose views together fill a forward pass: one photo, or many small pictures."""
    group: list[Prepared] = []
    held = 0
    for one in ready:
        group.append(one)
        held += 0 if one.views is None else len(one.views.pixels)
        if held >= at_once:
            yield group
            group, held = [], 0
    if group:
        yield group


def scores(members: Sequence[Member], images: Sequence[Views]) -> list[Tensor]:
    """The stored rows of images, N x 8 x C float32 on the CPU, for each of several members of one size and device."""
    pixels = images[0].pixels if len(images) == 1 else torch.cat([one.pixels for one in images])
    counts = [len(one.pixels) for one in images]
    rows = []
    for both in forward.of_all(members, pixels, mirrored=True):
        unmirrored, mirrored = (torch.split(half, counts) for half in (both[: len(pixels)], both[len(pixels) :]))
        pairs = zip(unmirrored, mirrored, images, strict=True)
        rows.append(torch.stack([views.reduced(torch.cat(pair), one.row_of) for *pair, one in pairs]).cpu())
    return rows


def _add(scorer: Scorer, part: Part, ids: Ints, labels: Ints, rows: Tensor) -> None:
    try:
        part.add(ids, labels, rows.numpy())
    except ValueError as error:
        raise DataError(
            f"{scorer.name}: image {ids[0]} of the split or one of the {len(ids) - 1} after it: {error}: its training "
            "diverged? leave it out"
        ) from None
