"""Networks of finished runs, and their class probabilities: the only way in which images are scored.

Squares of an image that is square itself (as all digits are) are equal: such views go through the networks once and
count three times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.backends import cudnn

from orchestrator.checkpoint import weights
from orchestrator.data.config import PreprocessingConfig
from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import Image
from orchestrator.evaluation.scoring_task import WeightsVariant
from orchestrator.models.network import Network
from orchestrator.models.registry import create_model
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.normalize import Normalizer

# float32 bytes of the views of one forward pass. On CPU the activations between two layers then stay in the cache, and
# small networks still see hundreds of views together. GPUs prefer larger batches; at 64 MiB GoogLeNet's activations
# take about 2 GiB.
MAX_CPU_BATCH_BYTES = 8 * 2**20
MAX_CUDA_BATCH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CropViews:
    """The D distinct ones of an image's unmirrored crops."""

    pixels: Tensor  # D x 3 x S x S uint8 in channels_last memory
    view_indices: Tensor  # int64: each crop's row among the D views and, from D on, their mirror images

    def pin_memory(self) -> CropViews:
        """Return the same in pinned memory, from which a GPU copies asynchronously."""
        return CropViews(self.pixels.pin_memory(), self.view_indices)


def build_views(image: Image, size: int, count: int = multi_crop.NUM_CROPS) -> CropViews:
    """Cut the views of an image (H x W x 3 uint8) for networks of size x size input.

    count: of crops, 1, 10 or 144. A single crop has no mirror image.
    """
    crops, view_indices = _find_distinct_crops(image.shape[1], image.shape[0], size, count)
    pixels = np.empty((len(crops), size, size, 3), dtype=np.uint8)
    multi_crop.cut_crops(image, size, crops, pixels)
    return CropViews(torch.from_numpy(pixels).permute(0, 3, 1, 2), view_indices)


@lru_cache(maxsize=4096)
def _find_distinct_crops(width: int, height: int, size: int, count: int) -> tuple[tuple[int, ...], Tensor]:
    """Return the numbers of the unmirrored crops that equal no earlier one, and `CropViews.view_indices`."""
    boxes = [
        (side, box)
        for side in multi_crop.compute_scale_sides(size)
        for box in multi_crop.compute_boxes(*multi_crop.compute_resized_size(width, height, side), size)
    ]
    subset = multi_crop.CROP_SUBSETS[count]
    first = {boxes[crop]: crop for crop in reversed(subset) if crop < len(boxes)}
    crops = sorted(first.values())
    rows = {boxes[crop]: row for row, crop in enumerate(crops)}
    mirrored = [crop >= len(boxes) for crop in subset]
    indices = [rows[boxes[crop % len(boxes)]] + len(crops) * flip for crop, flip in zip(subset, mirrored, strict=True)]
    return tuple(crops), torch.tensor(indices)


@dataclass(frozen=True)
class InferenceModel:
    """A network in inference mode on its device, without auxiliary heads, with its recipe and classes."""

    model: Network
    recipe: Recipe
    classes: tuple[str, ...]  # names in label order
    digest: str  # of the final weights' averaged ones, whichever were loaded
    device: torch.device

    @property
    def size(self) -> int:
        """Side of its input in pixels."""
        return self.recipe.model.image_size


def load_inference_model(url: str, which: WeightsVariant = "averaged") -> InferenceModel:
    """Load the network of a folder of final weights; nothing is unpickled.

    Raises FileNotFoundError (no committed weights there) or CheckpointError.
    """
    final = weights.load(url)
    state = final.averaged if which == "averaged" else final.raw
    return make_inference_model(Recipe.from_dict(final.recipe), final.classes, state, final.digest)


def make_inference_model(
    recipe: Recipe, classes: tuple[str, ...], state: Mapping[str, Tensor], digest: str
) -> InferenceModel:
    """Make the network with these weights (without auxiliary heads) on this process's GPU, else the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model(recipe.model, len(classes), 0)
    model.drop_auxiliary()
    model.load_state_dict(state)
    model = model.to(device=device, memory_format=model.memory_format)  # type: ignore[call-overload]
    return InferenceModel(model.eval(), recipe, classes, digest, device)


def compute_batch_size(size: int, device: torch.device) -> int:
    """Return how many views of size x size pixels go through a network in one forward pass."""
    max_bytes = MAX_CUDA_BATCH_BYTES if device.type == "cuda" else MAX_CPU_BATCH_BYTES
    return max(1, max_bytes // (3 * size * size * 4))


def predict_images(models: Sequence[InferenceModel], images: Sequence[CropViews], mirrored: bool) -> list[list[Tensor]]:
    """Return for each model, of one size on one device, the class probabilities of each image's views.

    Each D x C float32 or, with `mirrored`, 2D x C: the softmax of the main classifier for those of the views, then of
    their mirror images. Views are copied to the device once, and normalized once for all models with the same
    preprocessing. Full float32 on a GPU, too (no TF32): scores must not depend on the device.
    """
    views = images[0].pixels if len(images) == 1 else torch.cat([image.pixels for image in images])
    groups: dict[PreprocessingConfig, list[int]] = {}
    for number, model in enumerate(models):
        groups.setdefault(model.recipe.preprocessing, []).append(number)
    normalizers = [(Normalizer(config, models[0].device), numbers) for config, numbers in groups.items()]
    parts: list[list[Tensor]] = [[] for _ in models]
    with torch.inference_mode(), cudnn.flags(enabled=True, allow_tf32=False):
        for batch in _iter_batches(views, models[0], mirrored):
            for normalize, numbers in normalizers:
                normalized = normalize(batch)
                for number in numbers:
                    parts[number].append(models[number].model(normalized).main.float().softmax(dim=1))
        answers = []
        for part in parts:
            # All views, then all their mirror images.
            sides = torch.split(torch.cat(part), len(views))
            by_image = zip(*(torch.split(side, [len(image.pixels) for image in images]) for side in sides), strict=True)
            answers.append([torch.cat(both) for both in by_image])
        return answers


def _iter_batches(views: Tensor, model: InferenceModel, mirrored: bool) -> Iterator[Tensor]:
    """Yield equal parts of the views on the device, then their mirror images."""
    passes = -(-len(views) // compute_batch_size(model.size, model.device))
    for flipped in (False, True) if mirrored else (False,):
        for part in torch.tensor_split(views, max(1, passes)):
            batch = part.to(model.device, non_blocking=True)
            yield batch.flip(3) if flipped else batch
