"""Trained networks as one classifier of encoded images: the networks and the views are those of scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors import torch as safe
from torch import Tensor

from orchestrator.checkpoint import weights
from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.config import redaction
from orchestrator.config.json_text import parse_json, parse_object
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import Image, decode_image
from orchestrator.data.transforms.image_format import EncodedImage
from orchestrator.evaluation import crop_views, inference
from orchestrator.evaluation.crop_views import CropViews
from orchestrator.evaluation.inference import InferenceModel
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io

EXPORT_SUFFIX = ".safetensors"
# Views of images that go through a network together: with one crop, an image alone would leave a network half idle.
MAX_VIEWS_PER_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """A class and how likely it is."""

    label: int
    class_name: str
    probability: float


class Classifier:
    """The mean over networks of the mean over crops of their class probabilities (arXiv 1409.4842, section 7)."""

    def __init__(self, members: Sequence[InferenceModel], titles: Sequence[str] = ()) -> None:
        """titles: a readable name of each class, where the classes' own are ids.

        Raises DataError for no members, and for members or titles of other classes than the first member's.
        """
        if not members:
            raise DataError("members: none: give the final weights of at least one model")
        self.classes = members[0].classes
        for number, member in enumerate(members, start=1):
            if member.classes != self.classes:
                raise DataError(
                    f"members: model {number} knows {_describe_classes(member.classes)}, model 1 "
                    f"{_describe_classes(self.classes)}: only "
                    "models of the same classes make one classifier"
                )
        if titles and len(titles) != len(self.classes):
            raise DataError(f"titles: {len(titles)} for {len(self.classes)} classes")
        self.names = tuple(titles) or self.classes
        self._members = tuple(members)

    @classmethod
    def load(cls, finals: Sequence[str], titles: Sequence[str] = (), device: torch.device | None = None) -> Classifier:
        """The classifier of these weights, each the URL of a run's final folder or of a .safetensors file of one.

        Nothing is unpickled. Raises FileNotFoundError, CheckpointError, StorageError, or DataError as __init__ does.
        """
        return cls([_load_model(url, device) for url in finals], titles)

    def __len__(self) -> int:
        """How many networks there are."""
        return len(self._members)

    def classify(
        self, images: Sequence[EncodedImage], count: int, top: int = 5, members: Sequence[int] = ()
    ) -> list[list[Prediction] | BadSampleError]:
        """The `top` likeliest classes of each JPEG or PNG, likeliest first, or why it cannot be decoded.

        count: crops of each image, 1, 10 or 144. members: numbers of the networks, from 1; all of them by default.
        Raises ValueError for what is impossible. Memory is bounded: one decoded image and some views at a time.
        """
        if top < 1:
            raise ValueError(f"top: {top} is refused: at least 1")
        chosen = self._select_models(members)
        found: list[list[Prediction] | BadSampleError] = []
        for part in _iter_batches(images, count):
            cut = [_decode_views(data, chosen, count) for data in part]
            rows = iter(_average_probabilities([one for one in cut if isinstance(one, dict)], chosen, count))
            found += [one if isinstance(one, BadSampleError) else self._rank_classes(next(rows), top) for one in cut]
        return found

    def predict_probabilities(
        self, images: Sequence[EncodedImage], count: int, members: Sequence[int] = ()
    ) -> NDArray[np.float32]:
        """N x C: what `classify` ranks. Raises BadSampleError, with the number of the image, for one that is broken."""
        chosen = self._select_models(members)
        rows = [np.zeros((0, len(self.classes)), dtype=np.float32)]
        for first, part in zip(
            range(0, len(images), compute_images_per_batch(count)), _iter_batches(images, count), strict=True
        ):
            cut = []
            for number, data in enumerate(part, start=first):
                one = _decode_views(data, chosen, count)
                if isinstance(one, BadSampleError):
                    raise BadSampleError(f"image {number}: {one}")
                cut.append(one)
            rows.append(_average_probabilities(cut, chosen, count))
        return np.concatenate(rows)

    def _select_models(self, numbers: Sequence[int]) -> list[InferenceModel]:
        if len(set(numbers)) < len(numbers) or not all(1 <= number <= len(self) for number in numbers):
            told = ",".join(map(str, numbers))
            raise ValueError(f"members: {told} is refused: numbers from 1 to {len(self)}, each once")
        return [self._members[number - 1] for number in numbers] or list(self._members)

    def _rank_classes(self, row: NDArray[np.float32], top: int) -> list[Prediction]:
        # Stable, so that of equal ones the first class stands first, everywhere.
        best = np.argsort(-row, kind="stable")[:top]
        return [Prediction(int(label), self.names[label], float(row[label])) for label in best]


def compute_images_per_batch(count: int) -> int:
    """How many images go through the networks together with so many crops each. Raises ValueError for other counts."""
    if count not in multi_crop.CROP_SUBSETS:
        raise ValueError(f"crops: {count} is refused: must be one of {', '.join(map(str, multi_crop.CROP_SUBSETS))}")
    return max(1, MAX_VIEWS_PER_BATCH // count)


def build_test_views(image: Image, size: int, count: int) -> CropViews:
    """The first half of an image's `count` crops as views; one crop has no mirror image, of the others each has one.

    The pixels are those of scoring. For 1 and 10 crops, which are of the first scale, no other scale is made.
    """
    if count == multi_crop.NUM_CROPS:
        return crop_views.build_views(image, size)
    target = multi_crop.compute_resized_size(image.shape[1], image.shape[0], multi_crop.compute_scale_sides(size)[0])
    scaled, boxes = multi_crop.resize_image(image, target), multi_crop.compute_boxes(*target, size)
    chosen = [boxes[number] for number in multi_crop.CROP_SUBSETS[count] if number < multi_crop.NUM_UNMIRRORED]
    pixels = np.stack([scaled[box.y : box.y + size, box.x : box.x + size] for box in chosen])
    return CropViews(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(count))


def _iter_batches(images: Sequence[EncodedImage], count: int) -> Iterator[Sequence[EncodedImage]]:
    step = compute_images_per_batch(count)
    return (images[first : first + step] for first in range(0, len(images), step))


def _decode_views(
    data: EncodedImage, members: Sequence[InferenceModel], count: int
) -> dict[int, CropViews] | BadSampleError:
    """The views of an image for each size of network, or what is wrong with it."""
    try:
        image = decode_image(data)
    except BadSampleError as error:
        return error
    return {size: build_test_views(image, size, count) for size in {member.size for member in members}}


def _average_probabilities(
    images: Sequence[dict[int, CropViews]], members: Sequence[InferenceModel], count: int
) -> NDArray[np.float32]:
    """N x C: of each image the mean over members of the mean over crops."""
    total = torch.zeros(len(images), len(members[0].classes))
    for size in sorted({member.size for member in members}) if images else ():
        alike = [member for member in members if member.size == size]
        each = [image[size] for image in images]
        ends = np.cumsum([len(one.pixels) for one in each])
        for answer in inference.predict_models(alike, torch.cat([one.pixels for one in each]), mirrored=count > 1):
            # The views and, but for one crop, their mirror images: 1 or 2 x views x C.
            halves = answer.cpu().reshape(-1, int(ends[-1]), answer.shape[1])
            for number, (one, end) in enumerate(zip(each, ends.tolist(), strict=True)):
                own: Tensor = halves[:, end - len(one.pixels) : end].flatten(0, 1)
                total[number] += own[one.view_indices].mean(dim=0)
    return (total / len(members)).numpy()


def _load_model(url: str, device: torch.device | None) -> InferenceModel:
    if not url.endswith(EXPORT_SUFFIX):
        return inference.load_inference_model(url, device=device)
    shown = redaction.redact(url)
    data = file_io.read_bytes(url)
    try:
        state = safe.load(data)
        # A safetensors file begins with the length of its header, in JSON, which holds what the writer said of it.
        about = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        recipe, classes, digest = parse_object(about["recipe"]), tuple(parse_json(about["classes"])), about["weights"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{shown}: no exported final weights: {type(error).__name__}: {error}") from None
    if weights.compute_digest(state) != digest:
        raise CheckpointError(f"{shown}: damaged: its weights are not those of {digest}")
    return inference.make_inference_model(Recipe.from_dict(recipe), classes, state, digest, device)


def _describe_classes(classes: Sequence[str]) -> str:
    more = ", ..." if len(classes) > 3 else ""
    return f"{len(classes)} classes ({', '.join(classes[:3])}{more})"
