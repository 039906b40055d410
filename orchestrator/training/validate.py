"""Validation with exact counts: every sample of the split once, over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from orchestrator.data import audit
from orchestrator.data.errors import DataError
from orchestrator.data.loader import BadSample, Loader
from orchestrator.models.network import Logits, Network
from orchestrator.recipe.metrics import Counts, count
from orchestrator.recipe.normalise import Normaliser
from orchestrator.training.delivery import first_trouble
from orchestrator.training.world import World

BATCH = 256  # images of a forward pass; does not change the counts


def validate(
    model: Network, weights: dict[str, dict[str, Tensor]], loader: Loader, counts: tuple[int, ...],
    normalise: Normaliser, world: World, max_bad_share: float,
) -> dict[str, Counts]:  # fmt: skip
    """Centre-crop counts over the whole split for each named set of weights (empty set: the model's own).

    Every rank must call it. Images are decoded once for all sets. Raises RuntimeError when samples
    are missing; DataError, on every rank alike, when a rank cannot read its data or too many images are broken.
    """
    local = {name: Counts() for name in weights}
    bad: list[BadSample] = []
    trouble: str | None = None
    model.eval()
    try:
        with torch.inference_mode():
            for batch in loader.evaluation(counts, BATCH, world.rank, world.workers):
                images = normalise(batch.images.to(world.device, non_blocking=True))
                labels, sample_weights = batch.labels.to(world.device), batch.weights.to(world.device)
                bad += batch.bad
                for name, override in weights.items():
                    logits: Logits = functional_call(model, override, (images,))
                    local[name] = local[name] + count(logits, labels, sample_weights)
    except DataError as error:
        trouble = str(error)  # told below: the other ranks are on their way to that collective
    model.train()
    flat = [float(value) for each in local.values() for value in (each.samples, each.wrong_top1, each.wrong_top5)]
    *summed, all_bad, failed = world.sum([*flat, float(len(bad)), float(trouble is not None)])
    if failed:
        raise DataError(first_trouble(world, trouble))
    if all_bad > audit.most_bad(max_bad_share, sum(counts)):
        first = f"{bad[0].key!r} at byte {bad[0].offset} of {bad[0].source}: {bad[0].reason}" if bad else None
        raise DataError(
            f"data: {all_bad:g} of the {sum(counts)} images of the validation split cannot be read, more than "
            f"max_bad_share {max_bad_share:g} allows; the first: {first_trouble(world, first)}"
        )
    whole = iter(int(value) for value in summed)
    found = {name: Counts(next(whole), next(whole), next(whole)) for name in weights}
    for name, counted in found.items():
        if counted.samples + int(all_bad) != sum(counts):
            raise RuntimeError(f"validation of {name} saw {counted.samples} samples of {sum(counts)}")
        if counted.samples == 0:
            raise DataError(f"data: all {int(all_bad)} images of the validation split are broken")
    return found
