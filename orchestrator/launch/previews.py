"""What a run is going to do, in two pictures: its learning rate, and its augmented images. Drawn in drivers only."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from orchestrator.data import order
from orchestrator.data.manifest import Manifest
from orchestrator.data.reader import SampleReader
from orchestrator.data.shown import Shown, shown
from orchestrator.launch.config import RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.schedule import rate_at
from orchestrator.storage import files
from orchestrator.tracking.tracker import Tracker, TrackerUnreachable

_log = logging.getLogger(__name__)

SPLIT = "train"
SCHEDULE, SHEET = "schedule.png", "contact_sheet.png"
FOLDER = "previews"  # of a run's folder
SHEET_SAMPLES, SHEET_EPOCHS = 8, 6
DRAWN_RATES = 2000
LONGEST_CAPTION = 22


def rates(recipe: Recipe, steps_per_epoch: int, most: int) -> list[tuple[int, float]]:
    """Samples seen and learning rate at about `most` steps, evenly spaced, the first and the last among them."""
    steps = recipe.epochs * steps_per_epoch
    chosen = sorted({(steps - 1) * number // max(1, most - 1) for number in range(most)})
    return [(step * recipe.batch_size, rate_of(recipe, steps_per_epoch, step)) for step in chosen]


def rate_of(recipe: Recipe, steps_per_epoch: int, step: int) -> float:
    """The learning rate of a step (0: the first)."""
    per_epoch = steps_per_epoch * recipe.batch_size
    return rate_at(recipe.schedule, step * recipe.batch_size, per_epoch, recipe.epochs)


def draw_schedule(recipe: Recipe, steps_per_epoch: int, path: str) -> None:
    """Draw the learning rate into a PNG at `path`."""
    per_epoch = steps_per_epoch * recipe.batch_size
    points = [(samples / per_epoch, rate) for samples, rate in rates(recipe, steps_per_epoch, DRAWN_RATES)]
    title = f"{recipe.name}: {recipe.schedule.kind} schedule"
    _plots().schedule(points, per_epoch, title, path)


def draw_sheet(recipe: Recipe, url: str, dataset: Manifest, path: str) -> bool:
    """Draw some images of the training split at `url` and what the first epochs make of them into a PNG at `path`.

    False, and no picture, when none of the images can be decoded. Raises DataError and StorageError.
    """
    epochs = min(recipe.epochs, SHEET_EPOCHS)
    counts = [shard.samples for shard in dataset.shards(SPLIT)]
    reader = SampleReader(url, dataset, SPLIT)
    try:
        found = shown(
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
    rows = [(_caption(one, dataset), [one.original, *one.epochs]) for one in found]
    columns = ["original", *(f"epoch {epoch + 1}" for epoch in range(epochs))]
    _plots().contact_sheet(rows, columns, f"{recipe.name}: images of {dataset.name} as training sees them", path)
    return True


@dataclass
class PreviewRequest:
    """For a replayer: draws a run's previews once and stores them with its MLflow run.

    A copy goes to the run's folder; when it is there already, nothing is done. Trouble becomes a warning.
    run_id: tells the tracker's id of the run.
    """

    spec: RunSpec
    dataset: Manifest
    run_id: Callable[[], str]
    _drawn: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, tracker: Tracker) -> None:
        """Draw and store. Raises TrackerUnreachable, to be called again; the pictures are kept until then."""
        folder = files.join(self.spec.folder, FOLDER)
        try:
            if files.exists(files.join(folder, SCHEDULE)):
                return
            with tempfile.TemporaryDirectory(prefix="previews-") as temporary:
                if not self._drawn:
                    self._draw(temporary)
                self._store(tracker, temporary)
            # The schedule last: it says that all is there.
            for name in sorted(self._drawn, key=lambda name: name == SCHEDULE):
                files.write_bytes(files.join(folder, name), self._drawn[name])
        except TrackerUnreachable:
            raise
        except Exception as error:  # a picture is not worth a run
            _log.warning("%s: no previews: %s: %s", self.spec.name, type(error).__name__, error)

    def _draw(self, folder: str) -> None:
        recipe, path = self.spec.recipe, Path(folder)
        draw_schedule(
            recipe, order.steps_per_epoch(self.dataset.samples(SPLIT), recipe.batch_size), str(path / SCHEDULE)
        )
        self._drawn[SCHEDULE] = (path / SCHEDULE).read_bytes()
        try:
            if draw_sheet(recipe, self.spec.destination.data, self.dataset, str(path / SHEET)):
                self._drawn[SHEET] = (path / SHEET).read_bytes()
        except (ValueError, OSError) as error:
            # The run itself tells what is wrong with its data; the schedule is there all the same.
            _log.warning("%s: no contact sheet: %s", self.spec.name, error)

    def _store(self, tracker: Tracker, folder: str) -> None:
        for name, picture in self._drawn.items():
            path = Path(folder, name)
            path.write_bytes(picture)
            tracker.log_file(self.run_id(), str(path))


def _caption(one: Shown, dataset: Manifest) -> str:
    """Class and key, a line each, cut to what fits."""
    names = dataset.titles or dataset.classes
    texts = (names[one.label], one.key.rpartition("/")[2])
    return "\n".join(text if len(text) <= LONGEST_CAPTION else text[: LONGEST_CAPTION - 1] + "…" for text in texts)


def _plots() -> Any:
    """The room's plots, imported when a picture is due: matplotlib's 0.3 s would hold up the start of every run."""
    return import_module("orchestrator.tracking.plots")
