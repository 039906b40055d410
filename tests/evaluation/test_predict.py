from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data import crops, manifest
from orchestrator.data.decode import decode
from orchestrator.data.manifest import Manifest
from orchestrator.data.packer import RawSample, pack
from orchestrator.data.reader import SampleReader
from orchestrator.evaluation import predict, score_store
from orchestrator.evaluation.predict import Scorer, ScoreShard, models_by_size, score_shard
from orchestrator.models.googlenet import GoogLeNet
from orchestrator.models.network import Network
from orchestrator.recipe.config import Recipe
from tests.support import finals, shards

PER_SHARD = 3


@pytest.fixture(autouse=True)
def _own_models_and_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    predict._model.cache_clear()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def packed(tmp_path: Path) -> Manifest:
    """5 images of several shapes in two shards; the second of the first shard is broken."""
    samples = shards.samples(5)
    samples[1] = RawSample(samples[1].key, b"\xff\xd8 no picture", 1)
    pack(str(tmp_path / "data"), "tiny", shards.CLASSES, {"validation": samples}, PER_SHARD)
    return manifest.load(str(tmp_path / "data"))


def score(folder: Path, shard: int, *scorers: tuple[str, str]) -> int:
    task = ScoreShard(
        data=str(folder / "data"),
        split="validation",
        shard=shard,
        scorers=tuple(Scorer(final=final, scores=scores) for final, scores in scorers),
        threads=1,
    )
    return score_shard(task.to_dict())


def alone(folder: Path, found: Manifest, model: Network, recipe: Recipe, shard: int, number: int) -> np.ndarray:
    """144 x classes: the probabilities of each crop, one forward pass a crop."""
    image = decode(SampleReader(str(folder / "data"), found, "validation").read(shard, number).image)
    size = recipe.model.image_size
    views = np.empty((72, size, size, 3), dtype=np.uint8)
    crops.cut(image, size, views)
    mean = np.array(recipe.preprocessing.mean, dtype=np.float32)
    rows = []
    with torch.inference_mode():
        for view in [*views, *(view[:, ::-1] for view in views)]:
            pixels = (view.astype(np.float32) - mean) * np.float32(recipe.preprocessing.scale)
            logits = model(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]).main
            rows.append(logits.softmax(dim=1)[0].numpy())
    return np.stack(rows)


def test_stored_scores_are_those_of_a_plain_computation(packed: Manifest, tmp_path: Path) -> None:
    recipes = [finals.small(width=0.05), finals.small(width=0.08)]
    made = [finals.save(tmp_path / str(n), of, packed.classes, seed=n) for n, of in enumerate(recipes)]
    where = [str(tmp_path / str(n) / "scores") for n in range(2)]
    targets = [(final, scores) for (final, _), scores in zip(made, where, strict=True)]
    assert [score(tmp_path, shard, *targets) for shard in (0, 1)] == [2, 2]
    for (_, model), recipe, scores in zip(made, recipes, where, strict=True):
        for shard, ids in ((0, [0, 2]), (1, [3, 4])):
            stored = score_store.load(scores, shard)
            assert stored.ids.tolist() == ids
            assert stored.labels.tolist() == [number % 3 for number in ids]
            assert stored.bad == (1 if shard == 0 else 0)
            for row, image in enumerate(ids):
                each = alone(tmp_path, packed, model, recipe, shard, image - PER_SHARD * shard)
                # In the order of crops.cut: four scales of three squares of six views; then their mirror images.
                scales = each.reshape(2, 4, 18, 3)
                centre = each.reshape(2, 4, 3, 6, 3)[:, 0, 1]
                for got, expected in (
                    (stored.means[1][row], centre[0, 4]),
                    (stored.means[10][row], centre[:, :5].mean(axis=(0, 1))),
                    (stored.means[144][row], each.mean(axis=0)),
                    (stored.per_scale[row], scales.mean(axis=(0, 2))),
                    (stored.maximum[row], each.max(axis=0)),
                ):
                    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-4)
                assert np.ptp(each) > 0.01  # the crops differ, or the test would show nothing


def test_a_bound_on_memory_changes_nothing(packed: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = finals.small()
    final, _ = finals.save(tmp_path / "m", recipe, packed.classes, seed=0)
    score(tmp_path, 1, (final, str(tmp_path / "whole")))
    calls: list[int] = []
    forward = GoogLeNet.forward

    def counted(self: GoogLeNet, images: torch.Tensor, masks: None = None) -> object:
        calls.append(len(images))
        return forward(self, images, masks)

    monkeypatch.setattr(GoogLeNet, "forward", counted)
    monkeypatch.setattr(predict, "FORWARD_BYTES", 50 * 3 * 16 * 16 * 4)
    score(tmp_path, 1, (final, str(tmp_path / "parts")))
    assert calls == [50, 50, 44] * 2
    whole, parts = (score_store.load(str(tmp_path / name), 1) for name in ("whole", "parts"))
    for count in (1, 10, 144):
        np.testing.assert_allclose(parts.means[count], whole.means[count], rtol=2e-3, atol=1e-6)
    monkeypatch.setattr(predict, "FORWARD_BYTES", 1)
    calls.clear()
    score(tmp_path, 1, (final, str(tmp_path / "single")))
    assert calls == [1] * 288


def test_the_averaged_weights_are_scored(packed: Manifest, tmp_path: Path) -> None:
    final, model = finals.save(tmp_path / "m", finals.small(), packed.classes, seed=3)
    loaded, _ = predict._model(final, "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert not loaded.training


def test_a_shard_of_broken_images_is_stored_as_such(tmp_path: Path) -> None:
    broken = [RawSample(f"b-{n}", b"nothing", 0) for n in range(2)]
    found = pack(str(tmp_path / "data"), "broken", shards.CLASSES, {"validation": broken}, 2)
    final, _ = finals.save(tmp_path / "m", finals.small(), found.classes, seed=0)
    assert score(tmp_path, 0, (final, str(tmp_path / "scores"))) == 0
    stored = score_store.load(str(tmp_path / "scores"), 0)
    assert (stored.bad, stored.means[10].shape, stored.per_scale.shape) == (2, (0, 3), (0, 4, 3))


def test_models_of_one_size_share_their_crops() -> None:
    recipes = [finals.small(16), finals.small(32), finals.small(16)]
    assert models_by_size(recipes) == {16: [0, 2], 32: [1]}
