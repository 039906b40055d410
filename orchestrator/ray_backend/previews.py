"""Pictures of what a run will do: its learning rate and its augmented images. Drawn in drivers only."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orchestrator.data import sampler
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import decode, multi_crop, pipeline
from orchestrator.data.transforms.decode import Image
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.storage import file_io
from orchestrator.tracking.tracker import Tracker, TrackerUnreachableError

_log = logging.getLogger(__name__)

TRAIN_SPLIT = "train"
SCHEDULE_FILE, CONTACT_SHEET_FILE = "schedule.png", "contact_sheet.png"
FOLDER = "previews"  # of a run's folder
SHEET_SAMPLES, SHEET_EPOCHS = 8, 6
SCHEDULE_POINTS = 2000
MAX_CAPTION_LENGTH = 22


def sample_learning_rates(recipe: Recipe, steps_per_epoch: int, most: int) -> list[tuple[int, float]]:
    """Return (samples seen, learning rate) at about `most` steps, evenly spaced, with the first and the last."""
    steps = recipe.epochs * steps_per_epoch
    sampled = sorted({(steps - 1) * number // max(1, most - 1) for number in range(most)})
    return [(step * recipe.batch_size, compute_learning_rate(recipe, steps_per_epoch, step)) for step in sampled]


def compute_learning_rate(recipe: Recipe, steps_per_epoch: int, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    per_epoch = steps_per_epoch * recipe.batch_size
    return compute_lr(recipe.schedule, step * recipe.batch_size, per_epoch, recipe.epochs)


def draw_schedule(recipe: Recipe, steps_per_epoch: int, path: str) -> None:
    """Draw the learning rate into a PNG at `path`."""
    per_epoch = steps_per_epoch * recipe.batch_size
    points = [
        (samples / per_epoch, rate) for samples, rate in sample_learning_rates(recipe, steps_per_epoch, SCHEDULE_POINTS)
    ]
    title = f"{recipe.name}: {recipe.schedule.kind} schedule"
    from orchestrator.plotting import canvas  # matplotlib takes 0.3 s to import

    canvas.plot_lr_schedule(points, per_epoch, title, path)


def draw_contact_sheet(recipe: Recipe, url: str, dataset: Manifest, path: str) -> bool:
    """Draw some training images of the dataset at `url`, as they are and as the first epochs augment them, into a PNG.

    Return False, without a picture, when none of them can be decoded. Raises DataError and StorageError.
    """
    epochs = min(recipe.epochs, SHEET_EPOCHS)
    counts = [shard.samples for shard in dataset.shards(TRAIN_SPLIT)]
    reader = SampleReader(url, dataset, TRAIN_SPLIT)
    try:
        found = render_augmented(
            reader,
            counts,
            recipe.augmentation,
            recipe.seeds.augmentation,
            recipe.model.image_size,
            SHEET_SAMPLES,
            epochs,
        )
    finally:
        reader.close()
    if not found:
        return False
    rows = [(_format_caption(one, dataset), [one.original, *one.epochs]) for one in found]
    columns = ["original", *(f"epoch {epoch + 1}" for epoch in range(epochs))]
    from orchestrator.plotting import canvas  # matplotlib takes 0.3 s to import

    canvas.draw_contact_sheet(rows, columns, f"{recipe.name}: images of {dataset.name} as training sees them", path)
    return True


@dataclass
class PreviewRequest:
    """A task of a JournalReplayer that draws a run's previews once and stores them with its MLflow run.

    A copy goes to the run's folder; when there is one already, nothing is done. Errors become warnings. run_id: returns
    the tracker's id of the run.
    """

    spec: RunSpec
    dataset: Manifest
    run_id: Callable[[], str]
    _drawn: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, tracker: Tracker) -> None:
        """Draw and store. Raises TrackerUnreachableError, to be called again; the pictures are kept until then."""
        folder = file_io.join(self.spec.folder, FOLDER)
        try:
            if file_io.exists(file_io.join(folder, SCHEDULE_FILE)):
                return
            with tempfile.TemporaryDirectory(prefix="previews-") as temporary:
                if not self._drawn:
                    self._draw(temporary)
                self._store(tracker, temporary)
            # The schedule last: it shows that all are there.
            for name in sorted(self._drawn, key=lambda name: name == SCHEDULE_FILE):
                file_io.write_bytes(file_io.join(folder, name), self._drawn[name])
        except TrackerUnreachableError:
            raise
        except Exception as error:  # a picture is not worth a run
            _log.warning("%s: no previews: %s: %s", self.spec.name, type(error).__name__, error)

    def _draw(self, folder: str) -> None:
        recipe, path = self.spec.recipe, Path(folder)
        draw_schedule(
            recipe,
            sampler.count_steps(self.dataset.count_samples(TRAIN_SPLIT), recipe.batch_size),
            str(path / SCHEDULE_FILE),
        )
        self._drawn[SCHEDULE_FILE] = (path / SCHEDULE_FILE).read_bytes()
        try:
            if draw_contact_sheet(recipe, self.spec.destination.data, self.dataset, str(path / CONTACT_SHEET_FILE)):
                self._drawn[CONTACT_SHEET_FILE] = (path / CONTACT_SHEET_FILE).read_bytes()
        except (ValueError, OSError) as error:
            # The run itself reports what is wrong with its data; the schedule is still drawn.
            _log.warning("%s: no contact sheet: %s", self.spec.name, error)

    def _store(self, tracker: Tracker, folder: str) -> None:
        for name, picture in self._drawn.items():
            path = Path(folder, name)
            path.write_bytes(picture)
            tracker.log_file(self.run_id(), str(path))


def _format_caption(sample: AugmentedSample, dataset: Manifest) -> str:
    """Return class and key, a line each, cut to what fits."""
    names = dataset.titles or dataset.classes
    texts = (names[sample.label], sample.key.rpartition("/")[2])
    return "\n".join(
        text if len(text) <= MAX_CAPTION_LENGTH else text[: MAX_CAPTION_LENGTH - 1] + "…" for text in texts
    )


MAX_ORIGINAL_SIDE = 512  # longer side to which an untouched image is reduced: a photo may have 100 million pixels


@dataclass(frozen=True)
class AugmentedSample:
    """A sample as it is (H x W x 3 uint8) and as each epoch augments it (S x S x 3 uint8; black: left out there)."""

    key: str
    label: int
    original: Image
    epochs: tuple[Image, ...]


def render_augmented(
    reader: SampleReader, counts: Sequence[int], config: AugmentationConfig, seed: int, size: int, samples: int,
    epochs: int,
) -> list[AugmentedSample]:  # fmt: skip
    """Return `samples` images, evenly spread over a split, as epochs 0 .. `epochs` - 1 augment them.

    counts: samples of each shard. size: S. Images that cannot be decoded are left out. Raises DataError and
    StorageError as the loader does.
    """
    fills = [pipeline.build_fill(config, seed, epoch, reader.classes) for epoch in range(epochs)]
    found = []
    for id in pick_spread_ids(sum(counts), samples):
        shard, number = _locate_sample(counts, id)
        ids = np.array([id], dtype=np.int64)
        sample = reader.read(shard, number)
        try:
            original = _shrink_image(decode.decode_image(sample.image))
        except BadSampleError:
            continue
        images = []
        for epoch, fill in enumerate(fills):
            image = np.zeros((size, size, 3), dtype=np.uint8)
            try:
                fill(sample, id, pipeline.draw_uniforms(seed, epoch, ids)[0], image)
            except BadSampleError:
                image[:] = 0
            images.append(image)
        found.append(AugmentedSample(sample.key, sample.label, original, tuple(images)))
    return found


def pick_spread_ids(total: int, samples: int) -> list[int]:
    """Return the ids in the middle of `samples` equal parts of 0 .. total - 1; all when there are fewer."""
    parts = min(total, samples)
    return [total * (2 * part + 1) // (2 * parts) for part in range(parts)]


def _locate_sample(counts: Sequence[int], id: int) -> tuple[int, int]:
    """Return the shard of a sample, and its index in it."""
    ends = np.cumsum(counts)
    shard = int(np.searchsorted(ends, id, side="right"))
    return shard, id - int(ends[shard] - counts[shard])


def _shrink_image(image: Image) -> Image:
    height, width = image.shape[:2]
    longer = max(height, width)
    if longer <= MAX_ORIGINAL_SIDE:
        return image.copy()
    share = MAX_ORIGINAL_SIDE / longer
    return multi_crop.resize_image(image, (max(1, round(width * share)), max(1, round(height * share))))
