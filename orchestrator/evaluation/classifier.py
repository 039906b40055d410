"""Classifier of encoded images made of trained networks; networks and crops are those of scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors import torch as safe

from orchestrator.checkpoint import checkpoint
from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.config import redaction
from orchestrator.config.json_text import parse_json, parse_object
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import decode_image
from orchestrator.data.transforms.image_format import EncodedImage
from orchestrator.evaluation import inference
from orchestrator.evaluation.inference import CropViews, InferenceModel
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io

# Views of images that go through a network together: with one crop, a single image would leave a network half idle.
MAX_VIEWS_PER_BATCH = 64

_Views = dict[int, CropViews]  # views of an image by the input size of networks


@dataclass(frozen=True)
class Prediction:
    """A class and its probability."""

    label: int
    class_name: str
    probability: float


class Classifier:
    """The mean over networks of the mean over crops of their class probabilities (arXiv 1409.4842, section 7)."""

    def __init__(self, finals: Sequence[str], titles: Sequence[str] = ()) -> None:
        """Load the networks; each weights are the URL of a run's final folder or of a .safetensors file of one.

        Nothing is unpickled. titles: a readable name of each class, where the classes' own are ids. Raises
        FileNotFoundError, CheckpointError, StorageError; DataError for no members, and for members or titles of other
        classes than the first member's.
        """
        members = [_load_model(url) for url in finals]
        if not members:
            raise DataError("members must be the final weights of at least one model, got none; add a model")
        self.classes = members[0].classes
        for number, member in enumerate(members, start=1):
            if member.classes != self.classes:
                own, first = (f"{len(names)} ({', '.join(names[:3])}, ...)" for names in (member.classes, self.classes))
                got = f"got {own} of model {number} and {first} of model 1"
                raise DataError(f"members must have the same classes, {got}; leave one out")
        if titles and len(titles) != len(self.classes):
            raise DataError(f"titles must be one for each of {len(self.classes)} classes, got {len(titles)}")
        self.names = tuple(titles) or self.classes
        self._members = members

    def __len__(self) -> int:
        """Return the number of networks."""
        return len(self._members)

    def classify(
        self, images: Sequence[EncodedImage], count: int, top: int = 5, members: Sequence[int] = ()
    ) -> list[list[Prediction] | BadSampleError]:
        """Return the `top` likeliest classes of each JPEG or PNG, likeliest first, or why it cannot be decoded.

        count: crops of each image, 1, 10 or 144. members: numbers of the networks, from 1; all of them by default.
        Raises ValueError for other values. Memory is bounded: one decoded image and some views at a time.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        rows = self._iter_rows(images, count, members)
        return [row if isinstance(row, BadSampleError) else self._rank_classes(row, top) for row in rows]

    def predict_probabilities(
        self, images: Sequence[EncodedImage], count: int, members: Sequence[int] = ()
    ) -> NDArray[np.float32]:
        """Return N x C, which `classify` ranks. Raises BadSampleError with the number of an image that is broken."""
        rows = []
        for number, row in enumerate(self._iter_rows(images, count, members)):
            if isinstance(row, BadSampleError):
                raise BadSampleError(f"image {number}: {row}")
            rows.append(row)
        return np.stack(rows) if rows else np.zeros((0, len(self.classes)), dtype=np.float32)

    def _iter_rows(
        self, images: Sequence[EncodedImage], count: int, numbers: Sequence[int]
    ) -> Iterator[NDArray[np.float32] | BadSampleError]:
        """Yield the C probabilities of each image, or what is wrong with it."""
        members, batch_size = self._select_members(numbers), compute_images_per_batch(count)
        for first in range(0, len(images), batch_size):
            decoded = [_decode_views(data, members, count) for data in images[first : first + batch_size]]
            good = [views for views in decoded if not isinstance(views, BadSampleError)]
            rows = iter(_average_probabilities(good, members, count))
            yield from (views if isinstance(views, BadSampleError) else next(rows) for views in decoded)

    def _select_members(self, numbers: Sequence[int]) -> list[InferenceModel]:
        if len(set(numbers)) < len(numbers) or not all(1 <= number <= len(self) for number in numbers):
            shown = ",".join(map(str, numbers))
            raise ValueError(f"members must be numbers from 1 to {len(self)}, each once, got {shown}")
        return [self._members[number - 1] for number in numbers] or self._members

    def _rank_classes(self, row: NDArray[np.float32], top: int) -> list[Prediction]:
        # Stable, so that of equal ones the first class comes first, everywhere.
        best = np.argsort(-row, kind="stable")[:top]
        return [Prediction(int(label), self.names[label], float(row[label])) for label in best]


def compute_images_per_batch(count: int) -> int:
    """Return how many images of so many crops go through the networks together. Raises ValueError for other counts."""
    if count not in multi_crop.CROP_SUBSETS:
        raise ValueError(f"crops must be one of {', '.join(map(str, multi_crop.CROP_SUBSETS))}, got {count}")
    return max(1, MAX_VIEWS_PER_BATCH // count)


def _decode_views(data: EncodedImage, members: Sequence[InferenceModel], count: int) -> _Views | BadSampleError:
    try:
        image = decode_image(data)
    except BadSampleError as error:
        return error
    return {size: inference.build_views(image, size, count) for size in {member.size for member in members}}


def _average_probabilities(
    images: Sequence[_Views], members: Sequence[InferenceModel], count: int
) -> NDArray[np.float32]:
    """Return N x C: of each image the mean over members of the mean over crops."""
    total = torch.zeros(len(images), len(members[0].classes))
    for size in sorted({member.size for member in members}) if images else ():
        same_size = [member for member in members if member.size == size]
        views = [image[size] for image in images]
        for answers in inference.predict_images(same_size, views, mirrored=count > 1):
            for number, (probabilities, image) in enumerate(zip(answers, views, strict=True)):
                total[number] += probabilities.cpu()[image.view_indices].mean(dim=0)
    return (total / len(members)).numpy()


def _load_model(url: str) -> InferenceModel:
    if not url.endswith(".safetensors"):
        return inference.load_inference_model(url)
    shown = redaction.redact(url)
    data = file_io.read_bytes(url)
    try:
        state = safe.load(data)
        # A safetensors file begins with the length of its header, in JSON, which holds the writer's metadata.
        metadata = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        recipe, digest = parse_object(metadata["recipe"]), metadata["weights"]
        classes = tuple(parse_json(metadata["classes"]))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{shown}: no exported final weights: {type(error).__name__}: {error}") from None
    if checkpoint.compute_digest(state) != digest:
        raise CheckpointError(f"{shown}: damaged: its weights are not those of {digest}")
    return inference.make_inference_model(Recipe.from_dict(recipe), classes, state, digest)
