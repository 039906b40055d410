from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.config.overrides import apply
from orchestrator.evaluation import score_store
from orchestrator.evaluation.score_store import Scores
from orchestrator.storage import commit
from tests.support.launched import recipe
from tests.support.shards import flip_byte


def scores(seed: int = 0, images: int = 5, classes: int = 7, bad: int = 1) -> Scores:
    draw = np.random.default_rng(seed)

    def some(*shape: int) -> Any:
        raw = draw.random((*shape, classes), dtype=np.float32)
        return raw / raw.sum(axis=-1, keepdims=True)

    return Scores(
        ids=np.arange(10, 10 + images),
        labels=draw.integers(0, classes, images),
        means={count: some(images) for count in (1, 10, 144)},
        per_scale=some(images, 4),
        maximum=some(images),
        bad=bad,
    )


def test_scores_come_back_to_half_precision(tmp_path: Path) -> None:
    saved = scores()
    score_store.save(str(tmp_path), 3, saved)
    loaded = score_store.load(str(tmp_path), 3)
    np.testing.assert_array_equal(loaded.ids, saved.ids)
    np.testing.assert_array_equal(loaded.labels, saved.labels)
    assert loaded.bad == 1
    pairs = [(loaded.means[count], saved.means[count]) for count in (1, 10, 144)]
    for got, gave in [*pairs, (loaded.per_scale, saved.per_scale), (loaded.maximum, saved.maximum)]:
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, gave.astype(np.float16).astype(np.float32))
        np.testing.assert_allclose(got, gave, rtol=2**-10)


def test_a_shard_without_images_comes_back(tmp_path: Path) -> None:
    score_store.save(str(tmp_path), 0, scores(images=0, bad=4))
    loaded = score_store.load(str(tmp_path), 0)
    assert (len(loaded.ids), loaded.means[144].shape, loaded.bad) == (0, (0, 7), 4)


def test_what_is_committed_is_done_and_nothing_else(tmp_path: Path) -> None:
    where = str(tmp_path / "scores")
    assert score_store.done(where) == set()
    for shard in (0, 2, 11):
        score_store.save(where, shard, scores(shard))
    (tmp_path / "scores" / "shard-000002" / commit.DONE).unlink()  # its writer died
    (tmp_path / "scores" / "notes.txt").write_text("of a person")
    assert score_store.done(where) == {0, 11}
    with pytest.raises(FileNotFoundError):
        score_store.load(where, 2)
    score_store.save(where, 2, scores(2))
    assert score_store.done(where) == {0, 2, 11}


def test_damaged_scores_are_refused(tmp_path: Path) -> None:
    score_store.save(str(tmp_path), 0, scores())
    flip_byte(tmp_path / "shard-000000" / "scores.npz", 200)
    with pytest.raises(commit.CommitError, match=r"scores\.npz: damaged"):
        score_store.load(str(tmp_path), 0)


# ------------------------------------------------------------------ what identifies scores
def key(
    weights: str = "w", changes: dict[str, Any] | None = None, dataset: str = "d", split: str = "validation"
) -> str:
    return score_store.key(weights, apply(recipe(), changes or {}), dataset, split)


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "x"},
        {"dataset": "e"},
        {"split": "train"},
        {"changes": {"model.image_size": 48}},
        {"changes": {"preprocessing.mean": (0.0, 0.0, 0.0)}},
        {"changes": {"preprocessing.scale": 1.0}},
    ],
)
def test_the_key_changes_with_what_changes_scores(other: dict[str, Any]) -> None:
    assert key(**other) != key()


def test_the_key_ignores_what_only_the_weights_know() -> None:
    changes = {"epochs": 9, "name": "other", "seeds.order": 3, "augmentation.area": (0.5, 1.0), "batch_size": 32}
    assert key(changes=changes) == key()
