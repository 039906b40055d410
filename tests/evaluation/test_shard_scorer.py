"""Scoring a shard against the plain way: every crop by itself, one forward pass each."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data import index, manifest
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import multi_crop
from orchestrator.data.transforms.decode import decode_image
from orchestrator.evaluation import inference, score_store, shard_scorer
from orchestrator.evaluation.inference import CropViews, InferenceModel
from orchestrator.evaluation.score_store import Scores
from orchestrator.evaluation.scoring_task import ScoringTarget, ShardScoringTask, WeightsVariant
from orchestrator.models.googlenet import GoogLeNet
from orchestrator.models.network import Network
from orchestrator.recipe.config import Recipe
from tests.support import finals, stores, tiny_shards

PER_SHARD = 3


@pytest.fixture(autouse=True)
def _own_models_and_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    shard_scorer._load_cached_model.cache_clear()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def packed(tmp_path: Path) -> Manifest:
    """5 images of several shapes in two shards; the second of the first shard is broken, the fourth is a square."""
    samples = tiny_shards.samples(5)
    samples[1] = RawSample(samples[1].key, b"\xff\xd8 no picture", 1)
    samples[3] = RawSample(samples[3].key, tiny_shards.jpeg(3, 40, 40), 0)
    write_dataset(str(tmp_path / "data"), "tiny", tiny_shards.CLASSES, {"validation": samples}, PER_SHARD)
    return manifest.load(str(tmp_path / "data"))


def scorer(final: str, where: Path | str, which: WeightsVariant = "averaged") -> ScoringTarget:
    return ScoringTarget(
        name="one", weights=final, which=which, digest=inference.load_inference_model(final).digest, scores=str(where)
    )


def score(folder: Path, shard: int, *scorers: ScoringTarget) -> list[str]:
    """The images that cannot be decoded."""
    task = ShardScoringTask(data=str(folder / "data"), split="validation", shard=shard, scorers=scorers, threads=1)
    return shard_scorer.score_shard(task.to_dict())


def alone(folder: Path, found: Manifest, model: Network, recipe: Recipe, shard: int, number: int) -> np.ndarray:
    """144 x classes: the probabilities of each crop, one forward pass a crop."""
    image = decode_image(SampleReader(str(folder / "data"), found, "validation").read(shard, number).image)
    size = recipe.model.image_size
    views = np.empty((72, size, size, 3), dtype=np.uint8)
    multi_crop.cut_crops(image, size, range(multi_crop.NUM_UNMIRRORED), views)
    mean = np.array(recipe.preprocessing.mean, dtype=np.float32)
    rows = []
    with torch.inference_mode():
        for view in [*views, *(view[:, ::-1] for view in views)]:
            pixels = (view.astype(np.float32) - mean) * np.float32(recipe.preprocessing.scale)
            logits = model(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]).main
            rows.append(logits.softmax(dim=1)[0].numpy())
    return np.stack(rows)


def expected(each: np.ndarray) -> np.ndarray:
    """8 x classes of the stored rows, from 144 x classes in the order of crops.cut and then their mirror images."""
    scales = each.reshape(2, 4, 18, -1)
    centre = each.reshape(2, 4, 3, 6, -1)[:, 0, 1]  # of the first scale's middle square
    means = [centre[0, 4], centre[:, :5].mean(axis=(0, 1)), each.mean(axis=0)]
    return np.stack([*means, *scales.mean(axis=(0, 2)), each.max(axis=0)])


def rows(stored: Scores, image: int) -> np.ndarray:
    return np.asarray(stored.rows[image])


def test_stored_scores_are_those_of_a_plain_computation(packed: Manifest, tmp_path: Path) -> None:
    recipes = [finals.small(width=0.05), finals.small(width=0.08)]
    made = [finals.save(tmp_path / str(n), of, packed.classes, seed=n) for n, of in enumerate(recipes)]
    where = [str(tmp_path / str(n) / "scores") for n in range(2)]
    targets = [scorer(final, scores) for (final, _), scores in zip(made, where, strict=True)]
    came = [score(tmp_path, shard, *targets) for shard in (0, 1)]
    (bad,) = came[0]
    assert "'sample-001' of " in bad
    assert "no JPEG or PNG" in bad
    assert came[1] == []
    for (_, model), recipe, scores in zip(made, recipes, where, strict=True):
        for shard, ids in ((0, [0, 2]), (1, [3, 4])):
            stored = score_store.load_shard(scores, shard)
            assert stored.ids.tolist() == ids
            assert stored.labels.tolist() == [number % 3 for number in ids]
            assert stored.bad_images == (1 if shard == 0 else 0)
            for row, image in enumerate(ids):
                each = alone(tmp_path, packed, model, recipe, shard, image - PER_SHARD * shard)
                # float16's step, and rounding of forward passes of another size.
                np.testing.assert_allclose(rows(stored, row), expected(each), rtol=2**-10, atol=1e-5)
                assert np.ptp(each) > 0.01  # the crops differ, or the test would show nothing


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
def test_scores_do_not_depend_on_the_batch_size(
    packed: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    recipe = finals.small()
    final, model = finals.save(tmp_path / "m", recipe, packed.classes, seed=0)
    calls: list[int] = []
    plain = GoogLeNet.forward

    def counted(self: GoogLeNet, images: torch.Tensor, masks: None = None) -> object:
        calls.append(len(images))
        return plain(self, images, masks)

    monkeypatch.setattr(GoogLeNet, "forward", counted)
    monkeypatch.setattr(inference, "MAX_CPU_BATCH_BYTES", at_once * 3 * 16 * 16 * 4)
    score(tmp_path, 1, scorer(final, tmp_path / "scores"))
    # The square of 40 x 40 has 24 views that differ, the 40 x 28 after it 70 (at its second scale the right square's
    # left corners are the middle one's right corners); each is seen as it is, and mirrored.
    assert calls == {1: [1] * 188, 50: [47, 47] * 2, 10**6: [94] * 2}[at_once]
    stored = score_store.load_shard(str(tmp_path / "scores"), 1)
    for number in range(2):
        each = alone(tmp_path, packed, model, recipe, 1, number)
        np.testing.assert_allclose(rows(stored, number), expected(each), rtol=2**-10, atol=1e-5)


def test_raw_weights_are_scored(packed: Manifest, tmp_path: Path) -> None:
    final, model = finals.save(tmp_path / "m", finals.small(), packed.classes, seed=3)
    score(tmp_path, 1, scorer(final, tmp_path / "raw", "raw"))
    raw = {name: value + 1 for name, value in model.state_dict().items()}  # as finals.save has them
    model.load_state_dict(raw)
    each = alone(tmp_path, packed, model, finals.small(), 1, 0)
    np.testing.assert_allclose(
        rows(score_store.load_shard(str(tmp_path / "raw"), 1), 0), expected(each), rtol=2**-10, atol=1e-5
    )


def test_a_shard_of_broken_images_is_stored_empty(tmp_path: Path) -> None:
    broken = [RawSample(f"b-{n}", b"nothing", 0) for n in range(2)]
    found = write_dataset(str(tmp_path / "data"), "broken", tiny_shards.CLASSES, {"validation": broken}, 2)
    final, _ = finals.save(tmp_path / "m", finals.small(), found.classes, seed=0)
    came = score(tmp_path, 0, scorer(final, tmp_path / "scores"))
    assert len(came) == 2
    stored = score_store.load_shard(str(tmp_path / "scores"), 0)
    assert (stored.bad_images, stored.rows.shape) == (2, (0, 8, 3))


def test_a_model_of_other_data_is_an_error_with_its_name(packed: Manifest, tmp_path: Path) -> None:
    final, _ = finals.save(tmp_path / "m", finals.small(), ("ant", "bee", "cat", "dog"), seed=0)
    with pytest.raises(DataError, match=r"one: was trained on 4 classes that are not the 3 of tiny; leave it out"):
        score(tmp_path, 0, scorer(final, tmp_path / "scores"))
    good, _ = finals.save(tmp_path / "g", finals.small(), packed.classes, seed=0)
    of_others = scorer(good, tmp_path / "scores").model_copy(update={"digest": "0123"})
    with pytest.raises(DataError, match=r"one: its weights must have digest 0123, got \w+: they were replaced"):
        score(tmp_path, 0, of_others)
    assert stores.list_scored_shards(str(tmp_path / "scores")) == set()


def test_non_finite_scores_are_an_error_with_the_models_name(packed: Manifest, tmp_path: Path) -> None:
    final, _ = finals.save(tmp_path / "m", finals.small(), packed.classes, seed=0)
    model = shard_scorer._load_cached_model(final, "averaged").model
    assert isinstance(model, GoogLeNet)
    with torch.no_grad():
        model.classifier.bias[1] = float("inf")
    with pytest.raises(DataError, match=r"one: image 3 of the split.*non-finite values.*diverged"):
        score(tmp_path, 1, scorer(final, tmp_path / "scores"))
    assert stores.list_scored_shards(str(tmp_path / "scores")) == set()


def test_damaged_data_fails_a_task(packed: Manifest, tmp_path: Path) -> None:
    final, _ = finals.save(tmp_path / "m", finals.small(), packed.classes, seed=0)
    shard = packed.shards("validation")[1]
    tiny_shards.flip_byte(
        tmp_path / "data" / shard.name, int(index.load(str(tmp_path / "data"), shard).offsets[1]) + 100
    )
    with pytest.raises(DataError, match="does not have the checksum"):
        score(tmp_path, 1, scorer(final, tmp_path / "scores"))


def test_with_a_gpu_all_threads_prepare_images_in_order(
    packed: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (member,) = members(tmp_path, packed.classes, finals.small())
    on_gpu = dataclasses.replace(member, device=torch.device("cuda"))  # none is there: only what is prepared for it
    threads: set[str] = set()

    def pinned(self: CropViews) -> CropViews:
        threads.add(threading.current_thread().name)
        time.sleep(0.1)  # so that one thread alone does not do it all
        return self

    monkeypatch.setattr(CropViews, "pin_memory", pinned)
    task = ShardScoringTask(
        data=str(tmp_path / "data"), split="validation", shard=0, threads=3,
        scorers=(scorer(f"{tmp_path}/m0/final", tmp_path / "scores"),),
    )  # fmt: skip
    found = list(shard_scorer.iter_samples(task, packed, on_gpu))
    assert [(one.id, one.label, one.views is None) for one in found] == [(0, 0, False), (1, 1, True), (2, 2, False)]
    assert len(threads) == 2


def test_images_without_labels_are_scored(packed: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, _ = finals.save(tmp_path / "m", finals.small(), packed.classes, seed=0)
    score(tmp_path, 1, scorer(final, tmp_path / "labelled"))
    # No dataset of ours lacks labels so far: the reader refuses them. What is read is altered here.
    prepare = shard_scorer._prepare_sample

    def unlabelled(*arguments: object) -> shard_scorer.PreparedSample:
        found = prepare(*arguments)  # type: ignore[arg-type]
        return shard_scorer.PreparedSample(found.id, -1, found.views, found.bad)

    monkeypatch.setattr(shard_scorer, "_prepare_sample", unlabelled)
    score(tmp_path, 1, scorer(final, tmp_path / "unlabelled"))
    with_labels, without = (score_store.load_shard(str(tmp_path / name), 1) for name in ("labelled", "unlabelled"))
    assert without.labels.tolist() == [-1, -1]
    np.testing.assert_array_equal(without.rows, with_labels.rows)


def test_networks_are_cached_for_the_next_shard(packed: Manifest, tmp_path: Path) -> None:
    final, _ = finals.save(tmp_path / "m", finals.small(), packed.classes, seed=0)
    for shard in (0, 1):
        score(tmp_path, shard, scorer(final, tmp_path / "scores"))
    assert shard_scorer._load_cached_model.cache_info().misses == 1


def members(folder: Path, classes: tuple[str, ...], *of: Recipe) -> list[InferenceModel]:
    return [
        inference.load_inference_model(finals.save(folder / f"m{n}", recipe, classes, seed=n)[0])
        for n, recipe in enumerate(of)
    ]


def test_members_that_preprocess_differently_share_views(tmp_path: Path) -> None:
    one = finals.small()
    other = one.model_copy(update={"preprocessing": one.preprocessing.model_copy(update={"mean": (10.0, 20.0, 30.0)})})
    loaded = members(tmp_path, tiny_shards.CLASSES, one, other, one)
    views = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8).to(memory_format=torch.channels_last)
    indices = torch.zeros(0, dtype=torch.int64)
    together = [found for (found,) in inference.predict_images(loaded, [CropViews(views, indices)], mirrored=True)]
    for member, found in zip(loaded, together, strict=True):
        assert found.shape == (10, 3)
        for half, own in ((found[:5], views), (found[5:], views.flip(3))):
            ((alone,),) = inference.predict_images([member], [CropViews(own, indices)], mirrored=False)
            torch.testing.assert_close(half, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.sum(dim=1), torch.ones(10))
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_member_is_in_inference_mode_without_auxiliary_heads(tmp_path: Path) -> None:
    final, model = finals.save(tmp_path, finals.small(), tiny_shards.CLASSES, seed=3)
    member = inference.load_inference_model(final)
    assert not member.model.training
    assert member.size == 16
    assert member.classes == tiny_shards.CLASSES
    state = member.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
