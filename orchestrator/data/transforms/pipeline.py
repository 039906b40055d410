"""Transforms of training samples and batches, built in and one's own.

A sample transform is called as WebDataset's map() has it: a dict in, a dict out. `decode`, `crop` and perhaps
`photometric` alone run as one that decodes no more than the crop needs. One's own is a function, called with the dict
and its args, or a class, created with its args; a parameter `augmentation` gets the AugmentationConfig. The dict has

- `__key__`, `__url__`: the sample's key and its tar; `__id__`, `__epoch__`: whole numbers
- `__seed__`: 64 bits that depend on seed, epoch and sample alone, for `numpy.random.default_rng(sample["__seed__"])`
- `image`: the encoded bytes, after `decode` an H x W x 3 uint8 RGB array, after `crop` an S x S x 3 one, as at the end
- `cls`: the label; `size`: S, the side of the network's input; `draws`: the uniform draws that `crop` uses, and after
  them those of `photometric`.

A transform of a batch mixes each sample with a partner of the same lane, which is on the same worker however many there
are, and draws random numbers that depend on (seed, epoch, step) alone: any number of workers mixes the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageOps

from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import Plugin, create_plugin, load_plugin, register
from orchestrator.data import rng
from orchestrator.data.config import NO_PHOTOMETRIC, AugmentationConfig
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.dataset import Sample
from orchestrator.data.sampler import Int64Array
from orchestrator.data.transforms import decode, photometric, random_resized_crop
from orchestrator.data.transforms.decode import Image
from orchestrator.data.transforms.photometric import Draws  # here those of the crop, then those of photometric

# (sample, its id, its draws, S x S x 3 uint8 to fill) -> label
FillImage = Callable[[Sample, int, Draws, Image], int]
Images = NDArray[np.uint8]  # N x S x S x 3
Targets = NDArray[np.float32]  # N x classes, rows that sum to 1

_FUSIBLE_STAGES = (("decode", "crop"), ("decode", "crop", "photometric"))
_CROP_DRAWS, _PHOTOMETRIC_DRAWS = slice(random_resized_crop.DRAWS), slice(random_resized_crop.DRAWS, None)


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
    after = f"augmentation.stages: after {stages[-1][0]!r}"
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
        image, label = values.get("image"), values.get("cls")
        where = f"of sample {sample.key!r} of {sample.source} is"
        if not isinstance(image, np.ndarray) or image.shape != out.shape or image.dtype != np.uint8:
            kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(f"{after} the image {where} {kind}: must be uint8 {out.shape}")
        if not isinstance(label, int | np.integer) or not 0 <= label < classes:
            raise DataError(f"{after} the label {where} {label!r}: must be a whole number in 0 .. {classes - 1}")
        out[:] = image
        return int(label)

    return fill


def build_batch_mixer(config: AugmentationConfig, seed: int, epoch: int, classes: int) -> Callable[..., Targets] | None:
    """Return a function that applies the batch transforms to images in place and returns soft labels; None without any.

    It takes N images, labels, whether each is good, its lane, and the step. Samples that are not good neither mix nor
    are mixed in. It raises DataError when a transform fails, this function as `build_fill` does.
    """
    stages = [_create_stage(stage, config, "batch_stages", parameters=4) for stage in config.batch_stages]

    def mix(images: Images, labels: Int64Array, is_good: NDArray[np.bool_], lanes: Int64Array, step: int) -> Targets:
        targets = np.eye(classes, dtype=np.float32)[labels]
        for number, (name, transform) in enumerate(stages):
            key = rng.derive_key(seed, "batch-stage", epoch, step, number)
            partners = find_partners(lanes, is_good, key)
            try:
                mixed, targets = transform(images.copy(), targets, partners, np.random.default_rng(key))
                images[:] = mixed
                targets = np.asarray(targets, dtype=np.float32).reshape(len(labels), classes)
            except Exception as error:  # the user's own code may raise anything
                raise DataError(
                    f"augmentation.batch_stages: {name!r} failed in step {step} of epoch {epoch}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return targets

    return mix if stages else None


def find_partners(lanes: Int64Array, is_good: NDArray[np.bool_], key: int) -> Int64Array:
    """Return the row of each sample's partner: another one of its lane, itself if it has none or one is broken."""
    partners = np.arange(len(lanes), dtype=np.int64)
    for lane in np.unique(lanes).tolist():
        rows = np.flatnonzero(lanes == lane)
        if len(rows) > 1:
            partners[rows] = np.roll(rows, 1 + key % (len(rows) - 1))
    return np.where(is_good & is_good[partners], partners, np.arange(len(lanes)))


def _create_stage(
    stage: str | Plugin, config: AugmentationConfig, field: str = "stages", parameters: int = 1
) -> tuple[str, Callable[..., Any]]:
    """Return name and callable of a transform: a class's object, or a function with its args."""
    kind, args = (stage, {}) if isinstance(stage, str) else (stage.kind, stage.args)
    try:
        transform = load_plugin("transform", kind)
        keywords = {"augmentation": config, **args} if _takes_augmentation(transform) else args
        if isinstance(transform, type):
            transform, keywords = create_plugin("transform", kind, keywords), {}
        if not callable(transform):
            raise ConfigError(f"transform {kind!r} must be callable, got {type(transform).__name__}")
        with suppress(ValueError):  # a built-in of C has no signature
            inspect.signature(transform).bind(*range(parameters), **keywords)
    except ConfigError as error:
        raise DataError(f"augmentation.{field}: {error}") from None
    except TypeError as error:
        what = "a sample" if parameters == 1 else "images, targets, partners and a generator"
        problem = f"transform {kind!r} does not take {what} and these arguments: {error}"
        raise DataError(f"augmentation.{field}: {problem}") from None
    return kind, partial(transform, **keywords) if keywords else transform


def _takes_augmentation(loaded: Any) -> bool:
    with suppress(TypeError, ValueError):  # it cannot be called, or is a built-in of C, which has no signature
        return "augmentation" in inspect.signature(loaded).parameters
    return False


def _build_fused(config: AugmentationConfig, is_whole: bool) -> FillImage:
    colours = config.photometric
    distorts = "photometric" in config.stages and colours != NO_PHOTOMETRIC

    def fill(sample: Sample, _id: int, draws: Draws, out: Image) -> int:
        random_resized_crop.decode_and_crop(sample.image, config, draws[_CROP_DRAWS], out, is_whole)
        if distorts:
            photometric.distort_image(out, colours, draws[_PHOTOMETRIC_DRAWS])
        return sample.label

    return fill


def _apply_stage(stage: Callable[..., Any], name: str, values: dict[str, Any], sample: Sample) -> dict[str, Any]:
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


@register("transform", "decode")
def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode the image."""
    return sample | {"image": decode.decode_image(sample["image"])}


@register("transform", "crop")
def crop_sample(sample: dict[str, Any], augmentation: AugmentationConfig) -> dict[str, Any]:
    """Crop a decoded image at random, to the size of the network's input."""
    out = np.empty((sample["size"], sample["size"], 3), dtype=np.uint8)
    random_resized_crop.crop_image(sample["image"], augmentation, sample["draws"][_CROP_DRAWS], out)
    return sample | {"image": out}


def _require_rgb(image: object) -> NDArray[np.uint8]:
    """Return an H x W x 3 uint8 RGB image. Raises TypeError for anything else."""
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise TypeError("it needs an H x W x 3 uint8 RGB array, as it is after 'decode'")
    return image


@register("transform", "photometric")
def distort_sample(sample: dict[str, Any], augmentation: AugmentationConfig) -> dict[str, Any]:
    """Distort brightness, contrast, saturation and lighting of a copy: another transform may have kept the image."""
    image = _require_rgb(sample["image"]).copy()
    photometric.distort_image(image, augmentation.photometric, sample["draws"][_PHOTOMETRIC_DRAWS])
    return sample | {"image": image}


# (image, strength in 0 .. 1, sign) -> image, with the ranges that torchvision has.
Operation = Callable[[Pillow.Image, float, int], Pillow.Image]


def _shift(image: Pillow.Image, matrix: tuple[float, ...]) -> Pillow.Image:
    return image.transform(image.size, Pillow.Transform.AFFINE, matrix, Pillow.Resampling.NEAREST)


def _enhance(kind: Callable[[Pillow.Image], Any]) -> Operation:
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, sign: image,
    "shear_x": lambda image, strength, sign: _shift(image, (1, sign * 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": lambda image, strength, sign: _shift(image, (1, 0, 0, sign * 0.3 * strength, 1, 0)),
    "translate_x": lambda image, strength, sign: _shift(image, (1, 0, sign * 0.45 * strength * image.width, 0, 1, 0)),
    "translate_y": lambda image, strength, sign: _shift(image, (1, 0, 0, 0, 1, sign * 0.45 * strength * image.height)),
    "rotate": lambda image, strength, sign: image.rotate(sign * 30 * strength),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, round(255 * (1 - strength))),
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
}


@register("transform", "rand_augment")
class RandAugment:
    """RandAugment (arXiv 1909.13719): `num_ops` of OPERATIONS, each at `magnitude` of `num_magnitudes`."""

    def __init__(
        self, num_ops: int = 2, magnitude: int = 9, num_magnitudes: int = 31, operations: list[str] | None = None
    ) -> None:
        self._operations = [*OPERATIONS] if operations is None else operations
        if unknown := [name for name in self._operations if name not in OPERATIONS]:
            raise ValueError(f"operations must be of {', '.join(OPERATIONS)}, got {unknown[0]!r}")
        if num_ops < 1 or not self._operations or not 0 <= magnitude < num_magnitudes or num_magnitudes < 2:
            raise ValueError(
                f"num_ops must be >= 1 and magnitude in 0 .. num_magnitudes - 1, got {num_ops}, {magnitude} of "
                f"{num_magnitudes}"
            )
        self._num_ops, self._strength = num_ops, magnitude / (num_magnitudes - 1)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Distort the image, H x W x 3 uint8."""
        generator = np.random.default_rng(sample["__seed__"])
        image = Pillow.fromarray(_require_rgb(sample["image"]))
        for _ in range(self._num_ops):
            name = self._operations[generator.integers(len(self._operations))]
            sign = 1 if generator.random() < 0.5 else -1
            image = OPERATIONS[name](image, self._strength, sign)
        return sample | {"image": np.array(image, dtype=np.uint8)}


@register("transform", "mixup")
@dataclass
class Mixup:
    """Weighted mean of each image and its partner's (arXiv 1710.09412), by a share drawn from Beta(alpha, alpha)."""

    alpha: float = 0.2
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha > 0 or not 0 <= self.probability <= 1:
            raise ValueError(f"alpha must be > 0 and probability in 0 .. 1, got {self.alpha} and {self.probability}")

    def __call__(self, images: Images, targets: Targets, partners: Int64Array, generator: Generator) -> Any:
        """Return mixed images and targets; with `probability` less than 1 they may be the given ones."""
        is_mixed, share = generator.random() < self.probability, generator.beta(self.alpha, self.alpha)
        if not is_mixed:
            return images, targets
        mixed, own = self._mix(images, images[partners], float(share), generator)
        return mixed, np.asarray(own * targets + (1 - own) * targets[partners], dtype=np.float32)

    def _mix(self, images: Images, others: Images, share: float, generator: Generator) -> tuple[Images, float]:
        """Return mixed images, and the share of a sample's own image in them."""
        return np.asarray(cv2.addWeighted(images, share, others, 1 - share, 0), dtype=np.uint8), share


@register("transform", "cutmix")
@dataclass
class CutMix(Mixup):
    """A box of each image replaced by the partner's (arXiv 1905.04899)."""

    alpha: float = 1.0

    def _mix(self, images: Images, others: Images, share: float, generator: Generator) -> tuple[Images, float]:
        sides = images.shape[1:3]
        centre = [int(generator.integers(side)) for side in sides]
        half = [round(side * math.sqrt(1 - share)) // 2 for side in sides]
        rows, columns = (
            slice(max(0, at - reach), min(side, at + reach))
            for at, reach, side in zip(centre, half, sides, strict=True)
        )
        mixed = images.copy()
        mixed[:, rows, columns] = others[:, rows, columns]
        return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (sides[0] * sides[1])
