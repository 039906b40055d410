"""Networks of finished runs, and their class probabilities: the only way in which images are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.backends import cudnn

from orchestrator.checkpoint import checkpoint
from orchestrator.data.config import PreprocessingConfig
from orchestrator.evaluation.crop_views import CropViews
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


def select_device() -> torch.device:
    """Return the GPU assigned to this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_inference_model(
    url: str, which: WeightsVariant = "averaged", device: torch.device | None = None
) -> InferenceModel:
    """Load the network of a folder of final weights (nothing is unpickled), by default on `select_device()`.

    Raises FileNotFoundError (no committed weights there) or CheckpointError.
    """
    final = checkpoint.load_final_weights(url)
    state = final.averaged if which == "averaged" else final.raw
    return make_inference_model(Recipe.from_dict(final.recipe), final.classes, state, final.digest, device)


def make_inference_model(
    recipe: Recipe, classes: tuple[str, ...], state: Mapping[str, Tensor], digest: str,
    device: torch.device | None = None,
) -> InferenceModel:  # fmt: skip
    """Make the network with these weights (without auxiliary heads), by default on `select_device()`."""
    model = create_model(recipe.model, len(classes), 0)
    model.drop_auxiliary()
    model.load_state_dict(state)
    target = device or select_device()
    model = model.to(device=target, memory_format=model.memory_format)  # type: ignore[call-overload]
    return InferenceModel(model.eval(), recipe, classes, digest, target)


def compute_batch_size(size: int, device: torch.device) -> int:
    """Return how many views of size x size pixels go through a network in one forward pass."""
    max_bytes = MAX_CUDA_BATCH_BYTES if device.type == "cuda" else MAX_CPU_BATCH_BYTES
    return max(1, max_bytes // (3 * size * size * 4))


def predict_images(models: Sequence[InferenceModel], images: Sequence[CropViews], mirrored: bool) -> list[list[Tensor]]:
    """Return for each model, of one size on one device, the class probabilities of each image's views.

    Each D x C float32 or, with `mirrored`, 2D x C: those of the views, then of their mirror images.
    """
    pixels = images[0].pixels if len(images) == 1 else torch.cat([image.pixels for image in images])
    counts = [len(image.pixels) for image in images]
    answers = []
    for probabilities in predict_models(models, pixels, mirrored):
        halves = [torch.split(half, counts) for half in torch.split(probabilities, len(pixels))]
        answers.append([torch.cat(parts) for parts in zip(*halves, strict=True)])
    return answers


def predict_models(models: Sequence[InferenceModel], views: Tensor, mirrored: bool = False) -> list[Tensor]:
    """Return the softmax of each model's main classifier, N x C float32 on the device, for N x 3 x S x S uint8 views.

    With `mirrored` 2N x C: all views, then their mirror images. The models have one size and device; views are copied
    there once, and normalized once for all models with the same preprocessing. Full float32 on a GPU, too (no TF32):
    scores must not depend on the device.
    """
    answers: list[list[Tensor]] = [[] for _ in models]
    groups: dict[PreprocessingConfig, list[int]] = {}
    for number, model in enumerate(models):
        groups.setdefault(model.recipe.preprocessing, []).append(number)
    normalizers = [(Normalizer(config, models[0].device), numbers) for config, numbers in groups.items()]
    with torch.inference_mode(), cudnn.flags(enabled=True, allow_tf32=False):
        for batch in _iter_batches(views, models[0], mirrored):
            for normalize, numbers in normalizers:
                images = normalize(batch)
                for number in numbers:
                    answers[number].append(models[number].model(images).main.float().softmax(dim=1))
        return [torch.cat(parts) for parts in answers]


def _iter_batches(views: Tensor, model: InferenceModel, mirrored: bool) -> Iterator[Tensor]:
    """Yield equal parts of the views on the device, then their mirror images."""
    passes = -(-len(views) // compute_batch_size(model.size, model.device))
    for flipped in (False, True) if mirrored else (False,):
        for part in torch.tensor_split(views, max(1, passes)):
            batch = part.to(model.device, non_blocking=True)
            yield batch.flip(3) if flipped else batch
