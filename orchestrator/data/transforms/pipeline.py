"""What is done to a training sample, as WebDataset's map() has it: a dict in, a dict out.

The built-in stages are `decode`, `crop` and `photometric`; in that order, with nothing between and nothing after (the
last one may be left out), they run as one that decodes no more than the crop needs. Another stage is named
`package.module:function` in the recipe. It finds

- `__key__`, `__url__`: the sample's key and its tar; `__id__`, `__epoch__`: whole numbers;
- `__seed__`: 64 bits that depend on seed, epoch and sample alone: `numpy.random.default_rng(sample["__seed__"])` draws
  the same on any worker and after any restart;
- `image`: the encoded bytes, after `decode` an H x W x 3 uint8 RGB array, after `crop` an S x S x 3 one
- `cls`: the label; `size`: S, the side of the network's input; `draws`: the uniform draws that `crop` uses, and after
  them those of `photometric`

and returns the dict with what it changed. What comes out last must be S x S x 3 uint8.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import rng
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.prefetch import Sample
from orchestrator.data.sampler import Int64Array
from orchestrator.data.transforms import decode, photometric, random_resized_crop
from orchestrator.data.transforms.decode import Image

Draws = NDArray[np.float64]  # those of augment, then those of photometric
Transform = Callable[[dict[str, Any]], dict[str, Any]]
# (sample, its id, its draws, S x S x 3 uint8 to fill)
FillImage = Callable[[Sample, int, Draws, Image], int]

_FUSIBLE_STAGES = (("decode", "crop"), ("decode", "crop", "photometric"))
_CROP_DRAWS, _PHOTOMETRIC_DRAWS = (
    slice(0, random_resized_crop.DRAWS),
    slice(random_resized_crop.DRAWS, random_resized_crop.DRAWS + photometric.DRAWS),
)


def draw_uniforms(seed: int, epoch: int, ids: Int64Array) -> Draws:
    """A row of draws for each sample; `crop` and `photometric` draw apart, so that neither moves the other's."""
    purposes = (("augment", random_resized_crop.DRAWS), ("photometric", photometric.DRAWS))
    return np.hstack([rng.uniform(rng.derive_key(seed, name, epoch), ids, number) for name, number in purposes])


def build_fill(config: AugmentationConfig, seed: int, epoch: int, classes: int, is_whole: bool = False) -> FillImage:
    """A function that fills one image of a batch and returns its label.

    is_whole: that every image was decoded when the dataset was packed. Raises DataError when a stage's name means
    nothing.
    """
    if config.stages in _FUSIBLE_STAGES:
        return _build_fused(config, is_whole)
    stages = [(name, _BUILT_IN[name](config) if name in _BUILT_IN else _import_stage(name)) for name in config.stages]
    base = rng.derive_key(seed, "stages", epoch)

    def fill(sample: Sample, id: int, draws: Draws, out: Image) -> int:
        made: dict[str, Any] = {
            "__key__": sample.key,
            "__url__": sample.source,
            "__id__": id,
            "__epoch__": epoch,
            "__seed__": int(rng.mix_bits(np.array([id ^ base], dtype=np.uint64))[0]),
            "draws": draws,
            "size": out.shape[0],
            "image": sample.image,
            "cls": sample.label,
        }
        for name, stage in stages:
            made = _apply_stage(stage, name, made, sample)
        _check_image(made, config.stages[-1], sample, out)
        label = made.get("cls")
        if not isinstance(label, int | np.integer) or not 0 <= label < classes:
            raise DataError(
                f"augmentation.stages: after {config.stages[-1]!r} the label of sample {sample.key!r} of "
                f"{sample.source} is {label!r}: must be a whole number in 0 .. {classes - 1}"
            )
        out[:] = made["image"]
        return int(label)

    return fill


def _build_fused(config: AugmentationConfig, is_whole: bool) -> FillImage:
    colours = config.photometric
    distorted = "photometric" in config.stages and not photometric.is_off(colours)

    def fill(sample: Sample, _id: int, draws: Draws, out: Image) -> int:
        random_resized_crop.decode_and_crop(sample.image, config, draws[_CROP_DRAWS], out, is_whole)
        if distorted:
            photometric.distort_image(out, colours, draws[_PHOTOMETRIC_DRAWS])
        return sample.label

    return fill


def _build_decode(_config: AugmentationConfig) -> Transform:
    return lambda sample: sample | {"image": decode.decode_image(sample["image"])}


def _build_crop(config: AugmentationConfig) -> Transform:
    def crop(sample: dict[str, Any]) -> dict[str, Any]:
        out: NDArray[np.uint8] = np.empty((sample["size"], sample["size"], 3), dtype=np.uint8)
        random_resized_crop.crop_image(sample["image"], config, sample["draws"][_CROP_DRAWS], out)
        return sample | {"image": out}

    return crop


def _build_photometric(config: AugmentationConfig) -> Transform:
    def distort(sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"]
        if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise TypeError("it needs an H x W x 3 uint8 RGB array, as it is after 'decode'")
        image = image.copy()  # another stage may have kept it
        photometric.distort_image(image, config.photometric, sample["draws"][_PHOTOMETRIC_DRAWS])
        return sample | {"image": image}

    return distort


_BUILT_IN = {"decode": _build_decode, "crop": _build_crop, "photometric": _build_photometric}


def _import_stage(name: str) -> Transform:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"augmentation.stages: {name!r} is refused: must be {', '.join(map(repr, _BUILT_IN))} or "
            f"'package.module:function' that every worker can import ({error})"
        ) from None
    if not callable(found):
        raise DataError(f"augmentation.stages: {name!r} is refused: it is no function")
    return found  # type: ignore[no-any-return]


def _apply_stage(stage: Transform, name: str, made: dict[str, Any], sample: Sample) -> dict[str, Any]:
    try:
        found = stage(made)
    except BadSampleError:
        raise
    except BaseException as error:  # SystemExit and its like would end a thread without a word
        raise DataError(
            f"augmentation.stages: {name!r} failed on sample {sample.key!r} of {sample.source} at byte "
            f"{sample.offset}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"augmentation.stages: {name!r} returned {type(found).__name__} for sample {sample.key!r}: a stage returns "
            "the sample's dict (raise BadSampleError to leave a sample out)"
        )
    return found


def _check_image(made: dict[str, Any], last: str, sample: Sample, out: Image) -> None:
    image = made.get("image")
    if not isinstance(image, np.ndarray) or image.shape != out.shape or image.dtype != np.uint8:
        told = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(
            f"augmentation.stages: after {last!r} the image of sample {sample.key!r} is {told}: "
            f"must be uint8 {out.shape}"
        )
