from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.transforms import decode as decode_module
from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import Image, decode_image
from orchestrator.evaluation import inference
from orchestrator.evaluation.classifier import Classifier
from orchestrator.models.network import Network
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.normalize import Normalizer
from tests.support import ensembles, finals, pictures, tiny_shards

IMAGES = [
    tiny_shards.jpeg(1, 60, 33),  # landscape
    tiny_shards.jpeg(2, 30, 71),  # portrait
    tiny_shards.jpeg(3, 40, 40),
    tiny_shards.encoded("L", "PNG", 4),
]
SIZES = ((16, 0.05), (24, 0.06), (16, 0.04))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with ensembles.one_thread():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Network, Recipe]]:
    folder = tmp_path_factory.mktemp("finals")
    made = []
    for number, (size, width) in enumerate(SIZES):
        recipe = finals.small(size, width, f"m{number}")
        url, network = finals.save(folder / str(number), recipe, tiny_shards.CLASSES, number)
        made.append((url, network, recipe))
    return made


@pytest.fixture(scope="module")
def known(trained: list[tuple[str, Network, Recipe]]) -> Classifier:
    return Classifier([url for url, _, _ in trained])


def by_hand(trained: Sequence[tuple[str, Network, Recipe]], image: bytes, count: int) -> NDArray[np.float32]:
    """C: the mean over networks and crops, every one of the 144 crops cut for itself."""
    means = []
    for _, network, recipe in trained:
        size = recipe.model.image_size
        cut = np.empty((multi_crop.NUM_UNMIRRORED, size, size, 3), dtype=np.uint8)
        multi_crop.cut_crops(decode_image(image), size, range(multi_crop.NUM_UNMIRRORED), cut)
        both = np.concatenate((cut, cut[:, :, ::-1]))[list(multi_crop.CROP_SUBSETS[count])]
        pixels = torch.from_numpy(both).permute(0, 3, 1, 2)
        with torch.inference_mode():
            said = network(Normalizer(recipe.preprocessing, torch.device("cpu"))(pixels)).main.softmax(dim=1)
        means.append(said.mean(dim=0))
    return np.asarray(torch.stack(means).mean(dim=0).numpy())


@pytest.mark.parametrize("count", [1, 10, 144])
def test_the_mean_over_networks_of_the_mean_over_crops(
    known: Classifier, trained: list[tuple[str, Network, Recipe]], count: int
) -> None:
    found = known.predict_probabilities(IMAGES, count)
    assert found.shape == (4, 3)
    assert found.dtype == np.float32
    wanted = np.stack([by_hand(trained, image, count) for image in IMAGES])
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.ptp(wanted, axis=0).max() > 1e-3  # the images differ


def test_crops_matter(known: Classifier) -> None:
    one, ten, all_of_them = (known.predict_probabilities(IMAGES, count) for count in (1, 10, 144))
    assert np.abs(one - ten).max() > 1e-4
    assert np.abs(ten - all_of_them).max() > 1e-4


def test_an_image_alone_gets_what_it_gets_among_many(known: Classifier) -> None:
    many = [tiny_shards.jpeg(number, 24 + number % 7, 40 - number % 5) for number in range(70)]
    together = known.predict_probabilities(many, 1, [2])  # in two parts
    alone = np.concatenate([known.predict_probabilities([image], 1, [2]) for image in many])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_some_of_the_networks(known: Classifier, trained: list[tuple[str, Network, Recipe]]) -> None:
    np.testing.assert_allclose(
        known.predict_probabilities(IMAGES[:1], 10, [3, 1])[0],
        by_hand([trained[0], trained[2]], IMAGES[0], 10),
        atol=1e-6,
    )
    for wrong in ([0], [4], [1, 1]):
        with pytest.raises(ValueError, match="members must be numbers from 1 to 3, each once, got "):
            known.classify(IMAGES, 10, 5, wrong)


def test_the_likeliest_classes_first(known: Classifier) -> None:
    row = known.predict_probabilities(IMAGES[:1], 10)[0]
    (guesses,) = known.classify(IMAGES[:1], 10, 2)
    assert isinstance(guesses, list)
    order = sorted(range(3), key=lambda label: -row[label])[:2]
    assert [(guess.label, guess.class_name) for guess in guesses] == [
        (label, tiny_shards.CLASSES[label]) for label in order
    ]
    assert [guess.probability for guess in guesses] == [float(row[label]) for label in order]
    (every,) = known.classify(IMAGES[:1], 1, 99)
    assert isinstance(every, list) and len(every) == 3


def test_broken_images_are_reported_in_their_place(known: Classifier) -> None:
    images = [IMAGES[0], b"no image", IMAGES[1], b"", IMAGES[2][:200]]
    found = known.classify(images, 10, 1)
    assert [isinstance(one, BadSampleError) for one in found] == [False, True, False, True, True]
    assert found[2] == known.classify([IMAGES[1]], 10, 1)[0]
    with pytest.raises(BadSampleError, match="image 1: no JPEG or PNG"):
        known.predict_probabilities(images, 144)
    assert known.classify([b"no image"], 10, 1)[0].args  # type: ignore[union-attr]
    assert known.classify([], 10) == []
    assert known.predict_probabilities([], 10).shape == (0, 3)


def test_impossible_arguments(known: Classifier) -> None:
    with pytest.raises(ValueError, match="crops must be one of 1, 10, 144, got 7"):
        known.classify(IMAGES, 7)
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        known.classify(IMAGES, 10, 0)


def test_titles_stand_for_ids(trained: list[tuple[str, Network, Recipe]]) -> None:
    titles = ("an ant", "a bee", "a cat")
    titled = Classifier([trained[0][0]], titles)
    (guesses,) = titled.classify(IMAGES[:1], 1)
    assert isinstance(guesses, list)
    assert {guess.label: guess.class_name for guess in guesses} == dict(enumerate(titles))
    with pytest.raises(DataError, match="titles must be one for each of 3 classes, got 2"):
        Classifier([trained[0][0]], titles[:2])


def test_only_models_of_the_same_classes(trained: list[tuple[str, Network, Recipe]], tmp_path: Path) -> None:
    other, _ = finals.save(tmp_path, finals.small(), ("ant", "bee"), 0)
    with pytest.raises(
        DataError, match=r"got 2 \(ant, bee, \.\.\.\) of model 2 and 3 \(ant, bee, cat, \.\.\.\) of model 1"
    ):
        Classifier([trained[0][0], other])
    with pytest.raises(DataError, match=r"members must be .* got none"):
        Classifier([])


# ------------------------------------------------------------------ exported weights
def test_exported_weights_say_the_same(known: Classifier, trained: list[tuple[str, Network, Recipe]]) -> None:
    exported = Classifier([f"{url}/averaged.safetensors" for url, _, _ in trained])
    assert exported.classes == tiny_shards.CLASSES
    np.testing.assert_array_equal(exported.predict_probabilities(IMAGES, 10), known.predict_probabilities(IMAGES, 10))


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain", "json"])
def test_damaged_weights_are_an_error(trained: list[tuple[str, Network, Recipe]], tmp_path: Path, damage: str) -> None:
    whole = bytearray(Path(trained[0][0], "averaged.safetensors").read_bytes())
    if damage == "flipped":
        whole[-2] ^= 1
    data = {"cut": bytes(whole[:-9]), "flipped": bytes(whole), "plain": b"hello", "json": b"\x02" + bytes(7) + b"{}"}
    (tmp_path / "damaged.safetensors").write_bytes(data[damage])
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: (damaged|no exported final weights)"):
        Classifier([str(tmp_path / "damaged.safetensors")])


def test_views_of_few_crops_are_cut_from_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    resize = multi_crop.resize_image

    def counted(image: Image, size: tuple[int, int]) -> Image:
        calls.append(size)
        return resize(image, size)

    monkeypatch.setattr(multi_crop, "resize_image", counted)
    image = decode_image(IMAGES[0])
    assert [len(inference.build_views(image, 16, count).pixels) for count in (1, 10)] == [1, 5]
    assert len(calls) == 2


def test_expensive_images_are_bad_samples_and_affect_no_other(known: Classifier) -> None:
    bodies = [
        pictures.many_scans(9_900, 9_900, 3_000),
        pictures.lying_length(tiny_shards.encoded("RGB", "PNG"), 2**30),
        b"\0\0\0\x18ftypheic" + bytes(90),
        IMAGES[0],
        pictures.flat_jpeg([(1, 4), (1, 1), (1, 1)]),
    ]
    scans, chunk, heic, plain, turned = known.classify(bodies, 1)
    assert "3000 scans" in str(scans)
    assert "has 1073741824 bytes by its header" in str(chunk)
    assert "HEIC" in str(heic)
    assert [type(one) for one in (scans, chunk, heic)] == [decode_module.ImageTooLargeError, *[BadSampleError] * 2]
    assert known.classify([IMAGES[0]], 1) == [plain]
    assert isinstance(turned, list)
