"""Pictures of what a run will do, for `simulate`: its learning rate and its augmented images."""

from __future__ import annotations

from contextlib import closing
from typing import NamedTuple

import numpy as np
from PIL import Image as Pillow

from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import decode, pipeline
from orchestrator.data.transforms.decode import Image
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import compute_lr

TRAIN_SPLIT = "train"
SCHEDULE_FILE, CONTACT_SHEET_FILE = "schedule.png", "contact_sheet.png"
SHEET_SAMPLES, SHEET_EPOCHS = 8, 6
SCHEDULE_POINTS = 2000
MAX_CAPTION_LENGTH = 22
MAX_ORIGINAL_SIDE = 512  # longer side to which an untouched image is reduced: a photo may have 100 million pixels


class AugmentedSample(NamedTuple):
    """A sample as it is (H x W x 3 uint8) and as each epoch augments it (S x S x 3 uint8; black: left out there)."""

    key: str
    label: int
    original: Image
    epochs: list[Image]


def draw_schedule(recipe: Recipe, steps_per_epoch: int, path: str) -> None:
    """Draw the learning rate into a PNG at `path`."""
    title = f"{recipe.name}: {recipe.schedule.kind} schedule"
    total, rates = recipe.epochs * steps_per_epoch, []
    for step in np.unique(np.linspace(0, total - 1, SCHEDULE_POINTS, dtype=np.int64)).tolist():
        rate = compute_lr(recipe.schedule, step, steps_per_epoch, recipe.epochs)
        rates.append((step / steps_per_epoch, rate))
    from orchestrator.plotting import canvas  # matplotlib takes 0.3 s to import

    canvas.plot_lr_schedule(rates, steps_per_epoch * recipe.batch_size, title, path)


def draw_contact_sheet(recipe: Recipe, url: str, dataset: Manifest, path: str) -> bool:
    """Draw some training images of the dataset at `url`, as they are and as the first epochs augment them, into a PNG.

    Return False, without a picture, when none of them can be decoded. Raises DataError and StorageError.
    """
    epochs = min(recipe.epochs, SHEET_EPOCHS)
    samples = render_augmented(recipe, url, dataset, SHEET_SAMPLES, epochs)
    if not samples:
        return False
    names = dataset.titles or dataset.classes
    rows = [
        (
            f"{names[each.label][:MAX_CAPTION_LENGTH]}\n{each.key.rpartition('/')[2][:MAX_CAPTION_LENGTH]}",
            [each.original, *each.epochs],
        )
        for each in samples
    ]
    columns = ["original", *(f"epoch {epoch + 1}" for epoch in range(epochs))]
    from orchestrator.plotting import canvas  # matplotlib takes 0.3 s to import

    canvas.draw_contact_sheet(rows, columns, f"{recipe.name}: images of {dataset.name} as training sees them", path)
    return True


def render_augmented(recipe: Recipe, url: str, dataset: Manifest, samples: int, epochs: int) -> list[AugmentedSample]:
    """Return `samples` training images, evenly spread over the split, as epochs 0 .. `epochs` - 1 augment them.

    Images that cannot be decoded are left out. Raises DataError and StorageError as the loader does.
    """
    seed, size = recipe.seeds.augmentation, recipe.model.image_size
    fills = [pipeline.build_fill(recipe.augmentation, seed, epoch, len(dataset.classes)) for epoch in range(epochs)]
    ends = np.cumsum([shard.samples for shard in dataset.shards(TRAIN_SPLIT)])
    total = int(ends[-1])
    parts = min(total, samples)
    rendered = []
    with closing(SampleReader(url, dataset, TRAIN_SPLIT)) as reader:
        for id in (total * (2 * part + 1) // (2 * parts) for part in range(parts)):
            shard = int(np.searchsorted(ends, id, side="right"))
            sample = reader.read(shard, id - int(ends[shard]) + dataset.shards(TRAIN_SPLIT)[shard].samples)
            try:
                original = Pillow.fromarray(decode.decode_image(sample.image))
            except BadSampleError:
                continue
            original.thumbnail((MAX_ORIGINAL_SIDE, MAX_ORIGINAL_SIDE))
            images = [np.zeros((size, size, 3), dtype=np.uint8) for _ in fills]
            for epoch, (fill, image) in enumerate(zip(fills, images, strict=True)):
                try:
                    fill(sample, id, pipeline.draw_uniforms(seed, epoch, np.array([id], dtype=np.int64))[0], image)
                except BadSampleError:
                    image[:] = 0
            rendered.append(AugmentedSample(sample.key, sample.label, np.asarray(original), images))
    return rendered
