"""Transforms of training samples and batches, built in and one's own.

A sample transform is called as WebDataset's map() has it: a dict in, a dict out. The built-in ones are `decode`,
`crop`, `photometric` and `rand_augment`; `decode`, `crop` and perhaps `photometric` alone run as one that decodes no
more than the crop needs. One's own is a function, called with the dict and its args, or a class, created with its args.
It finds

- `__key__`, `__url__`: the sample's key and its tar; `__id__`, `__epoch__`: whole numbers; a class-balanced epoch has
  other ids where it repeats a sample;
- `__seed__`: 64 bits that depend on seed, epoch and sample alone: `numpy.random.default_rng(sample["__seed__"])` draws
  the same on any worker and after any restart;
- `image`: the encoded bytes, after `decode` an H x W x 3 uint8 RGB array, after `crop` an S x S x 3 one
- `cls`: the label; `size`: S, the side of the network's input; `draws`: the uniform draws that `crop` uses, and after
  them those of `photometric`

and returns the dict with what it changed. What comes out last must be S x S x 3 uint8. A class may take
`augmentation=`, the AugmentationConfig.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import Plugin, create_plugin, load_plugin, register
from orchestrator.data import rng
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.prefetch import Sample
from orchestrator.data.sampler import Int64Array
from orchestrator.data.transforms import decode, photometric, random_resized_crop
from orchestrator.data.transforms.batch_mixing import BatchMixer
from orchestrator.data.transforms.decode import Image
from orchestrator.data.transforms.rand_augment import RandAugment

Draws = NDArray[np.float64]  # those of the crop, then those of photometric
Transform = Callable[[dict[str, Any]], dict[str, Any]]
# (sample, its id, its draws, S x S x 3 uint8 to fill)
FillImage = Callable[[Sample, int, Draws, Image], int]

_FUSIBLE_STAGES = (("decode", "crop"), ("decode", "crop", "photometric"))
_CROP_DRAWS, _PHOTOMETRIC_DRAWS = (
    slice(0, random_resized_crop.DRAWS),
    slice(random_resized_crop.DRAWS, random_resized_crop.DRAWS + photometric.DRAWS),
)


def draw_uniforms(seed: int, epoch: int, ids: Int64Array) -> Draws:
    """Return a row of draws for each sample; those of `crop` and `photometric` do not depend on each other."""
    purposes = (("augment", random_resized_crop.DRAWS), ("photometric", photometric.DRAWS))
    return np.hstack([rng.uniform(rng.derive_key(seed, name, epoch), ids, number) for name, number in purposes])


def build_fill(config: AugmentationConfig, seed: int, epoch: int, classes: int, is_whole: bool = False) -> FillImage:
    """Return a function that fills one image of a batch and returns its label.

    is_whole: whether every image was decoded when the dataset was packed. Raises DataError when a transform cannot be
    loaded or does not take its arguments.
    """
    build_batch_mixer(config, seed, epoch, classes)
    if config.stages in _FUSIBLE_STAGES:
        return _build_fused(config, is_whole)
    stages = [_create_stage(stage, config) for stage in config.stages]
    base = rng.derive_key(seed, "stages", epoch)

    def fill(sample: Sample, id: int, draws: Draws, out: Image) -> int:
        values: dict[str, Any] = {
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
            values = _apply_stage(stage, name, values, sample)
        last = stages[-1][0]
        _check_image(values, last, sample, out)
        label = values.get("cls")
        if not isinstance(label, int | np.integer) or not 0 <= label < classes:
            raise DataError(
                f"augmentation.stages: after {last!r} the label of sample {sample.key!r} of {sample.source} is "
                f"{label!r}: must be a whole number in 0 .. {classes - 1}"
            )
        out[:] = values["image"]
        return int(label)

    return fill


def build_batch_mixer(config: AugmentationConfig, seed: int, epoch: int, classes: int) -> BatchMixer | None:
    """Return what applies the batch transforms, None when there is none. Raises DataError as `build_fill` does."""
    if not config.batch_stages:
        return None
    stages = []
    for stage in config.batch_stages:
        name, transform = _create_stage(stage, config, "batch_stages", parameters=4)
        stages.append((name, transform))
    return BatchMixer(stages, seed, epoch, classes)


def _create_stage(
    stage: str | Plugin, config: AugmentationConfig, field: str = "stages", parameters: int = 1
) -> tuple[str, Callable[..., Any]]:
    """Return name and callable of a transform: a class's object, or a function with its args."""
    kind, args = (stage, {}) if isinstance(stage, str) else (stage.kind, stage.args)
    try:
        loaded = load_plugin("transform", kind)
        if isinstance(loaded, type):
            given = {"augmentation": config} if "augmentation" in inspect.signature(loaded).parameters else {}
            transform = create_plugin("transform", kind, args, **given)
        else:
            transform = partial(loaded, **args) if args else loaded
        _check_callable(transform, kind, parameters)
    except ConfigError as error:
        raise DataError(f"augmentation.{field}: {error}") from None
    return kind, transform


def _check_callable(transform: Any, kind: str, parameters: int) -> None:
    if not callable(transform):
        raise ConfigError(f"transform {kind!r} must be callable, got {type(transform).__name__}")
    try:
        inspect.signature(transform).bind(*range(parameters))
    except TypeError as error:
        what = "a sample" if parameters == 1 else "images, targets, partners and a generator"
        raise ConfigError(f"transform {kind!r} does not take {what} and these arguments: {error}") from None
    except ValueError:  # a built-in of C has no signature
        pass


def _build_fused(config: AugmentationConfig, is_whole: bool) -> FillImage:
    colours = config.photometric
    distorts = "photometric" in config.stages and not photometric.is_off(colours)

    def fill(sample: Sample, _id: int, draws: Draws, out: Image) -> int:
        random_resized_crop.decode_and_crop(sample.image, config, draws[_CROP_DRAWS], out, is_whole)
        if distorts:
            photometric.distort_image(out, colours, draws[_PHOTOMETRIC_DRAWS])
        return sample.label

    return fill


@register("transform", "decode")
def decode_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Decode the image."""
    return {**sample, "image": decode.decode_image(sample["image"])}


@register("transform", "crop")
class Crop:
    """Random resized crop of a decoded image to the size of the network's input."""

    def __init__(self, augmentation: AugmentationConfig) -> None:
        self._config = augmentation

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Crop the image."""
        out: NDArray[np.uint8] = np.empty((sample["size"], sample["size"], 3), dtype=np.uint8)
        random_resized_crop.crop_image(sample["image"], self._config, sample["draws"][_CROP_DRAWS], out)
        return sample | {"image": out}


@register("transform", "photometric")
class Photometric:
    """Brightness, contrast, saturation and lighting noise."""

    def __init__(self, augmentation: AugmentationConfig) -> None:
        self._config = augmentation.photometric

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Distort a copy of the image: another transform may have kept it."""
        image = decode.require_rgb(sample["image"]).copy()
        photometric.distort_image(image, self._config, sample["draws"][_PHOTOMETRIC_DRAWS])
        return sample | {"image": image}


register("transform", "rand_augment")(RandAugment)


def _apply_stage(stage: Transform, name: str, values: dict[str, Any], sample: Sample) -> dict[str, Any]:
    try:
        result = stage(values)
    except BadSampleError:
        raise
    except BaseException as error:  # SystemExit and its like would end a thread without an error
        raise DataError(
            f"augmentation.stages: {name!r} failed on sample {sample.key!r} of {sample.source} at byte "
            f"{sample.offset}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, dict):
        raise DataError(
            f"augmentation.stages: {name!r} must return the sample's dict, got {type(result).__name__} for sample "
            f"{sample.key!r}; raise BadSampleError to leave a sample out"
        )
    return result


def _check_image(values: dict[str, Any], last: str, sample: Sample, out: Image) -> None:
    image = values.get("image")
    if not isinstance(image, np.ndarray) or image.shape != out.shape or image.dtype != np.uint8:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(
            f"augmentation.stages: after {last!r} the image of sample {sample.key!r} is {kind}: must be uint8 "
            f"{out.shape}"
        )
