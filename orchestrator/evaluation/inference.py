"""Networks of finished runs ready for inference, and what they say of views: the one way in which images are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.backends import cudnn

from orchestrator.checkpoint import weights
from orchestrator.data.config import PreprocessingConfig
from orchestrator.evaluation.scoring_task import WeightsVariant
from orchestrator.models.network import Network
from orchestrator.models.registry import create_model
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.normalize import Normalizer

# float32 bytes of the views of one forward pass. On CPU what is between two layers then stays in the cache (GoogLeNet
# at 224: 13 views; 72 at once take a quarter longer), and small networks still see hundreds of views at once (32
# pixels: 682; 48 at once take 1.7 times as long). A GPU wants more; GoogLeNet's activations then take about 2 GiB.
MAX_CPU_BATCH_BYTES = 8 * 2**20
MAX_CUDA_BATCH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class InferenceModel:
    """A network in inference mode on its device, without auxiliary heads, and what it was trained on."""

    model: Network
    recipe: Recipe
    classes: tuple[str, ...]  # names in label order
    digest: str  # of the final weights it comes from: of the averaged ones, whichever were loaded
    device: torch.device

    @property
    def size(self) -> int:
        """Pixels of a side of its input."""
        return self.recipe.model.image_size


def select_device() -> torch.device:
    """The GPU that this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_inference_model(
    url: str, which: WeightsVariant = "averaged", device: torch.device | None = None
) -> InferenceModel:
    """The network of a folder of final weights (weights_only: nothing is unpickled), on `best_device()` by default.

    Raises FileNotFoundError (no committed weights there) or checkpoint.format.CheckpointError.
    """
    final = weights.load(url)
    state = final.averaged if which == "averaged" else final.raw
    return make_inference_model(Recipe.from_dict(final.recipe), final.classes, state, final.digest, device)


def make_inference_model(
    recipe: Recipe, classes: tuple[str, ...], state: Mapping[str, Tensor], digest: str,
    device: torch.device | None = None,
) -> InferenceModel:  # fmt: skip
    """The network that has these weights, which hold no auxiliary heads, on `best_device()` by default."""
    model = create_model(recipe.model, len(classes), 0)
    model.drop_auxiliary()
    model.load_state_dict(state)
    where = device or select_device()
    model = model.to(device=where, memory_format=model.memory_format)  # type: ignore[call-overload]
    return InferenceModel(model.eval(), recipe, classes, digest, where)


def compute_batch_size(size: int, device: torch.device) -> int:
    """How many views of size x size pixels go through a network in one forward pass."""
    most = MAX_CUDA_BATCH_BYTES if device.type == "cuda" else MAX_CPU_BATCH_BYTES
    return max(1, most // (3 * size * size * 4))


def predict_probabilities(member: InferenceModel, views: Tensor) -> Tensor:
    """N x 3 x S x S uint8 -> N x C float32 on the member's device: the softmax of its main classifier."""
    return predict_models([member], views)[0]


def predict_models(members: Sequence[InferenceModel], views: Tensor, mirrored: bool = False) -> list[Tensor]:
    """The same of several members of one size on one device, in their order.

    With `mirrored` 2N x C: all views, then their mirror images, which are made on the device. What members share is
    done once: views travel once, and are normalised once for all that preprocess alike. In full float32 on a GPU, too
    (no TF32): scores must not depend on where they were made.
    """
    found: list[list[Tensor]] = [[] for _ in members]
    alike = _group_by_preprocessing(members)
    with torch.inference_mode(), cudnn.flags(enabled=True, allow_tf32=False):
        for part in _iter_batches(views, members[0], mirrored):
            for normalise, numbers in alike:
                images = normalise(part)
                for number in numbers:
                    found[number].append(members[number].model(images).main.float().softmax(dim=1))
        return [torch.cat(parts) for parts in found]


def _iter_batches(views: Tensor, first: InferenceModel, mirrored: bool) -> Iterator[Tensor]:
    """Equal parts of the views on the device, then their mirror images."""
    passes = -(-len(views) // compute_batch_size(first.size, first.device))
    for flipped in (False, True) if mirrored else (False,):
        for part in torch.tensor_split(views, max(1, passes)):
            moved = part.to(first.device, non_blocking=True)
            yield moved.flip(3) if flipped else moved


def _group_by_preprocessing(members: Sequence[InferenceModel]) -> list[tuple[Normalizer, list[int]]]:
    groups: dict[PreprocessingConfig, list[int]] = {}
    for number, member in enumerate(members):
        groups.setdefault(member.recipe.preprocessing, []).append(number)
    return [(Normalizer(config, members[numbers[0]].device), numbers) for config, numbers in groups.items()]
