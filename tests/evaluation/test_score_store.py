import dataclasses
import io
import shutil
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.config.overrides import apply_overrides
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.evaluation import score_store
from orchestrator.evaluation.score_store import Scores, ShardScores
from orchestrator.storage import commit
from tests.support import stores
from tests.support.launched import recipe
from tests.support.tiny_shards import flip_byte


def scores(seed: int = 0, images: int = 5, classes: int = 7, bad: int = 1) -> Scores:
    draw = np.random.default_rng(seed)

    def some(*shape: int) -> Any:
        raw = draw.random((*shape, classes), dtype=np.float32)
        return raw / raw.sum(axis=-1, keepdims=True)

    return Scores(
        ids=np.arange(10, 10 + images),
        labels=draw.integers(0, classes, images),
        rows=some(images, score_store.NUM_ROWS),
        bad_images=bad,
    )


def test_scores_come_back_to_half_precision(tmp_path: Path) -> None:
    saved = scores()
    saved.labels[2] = -1  # an image without a label
    stores.save_shard(str(tmp_path), 3, saved)
    loaded = score_store.load_shard(str(tmp_path), 3)
    np.testing.assert_array_equal(loaded.ids, saved.ids)
    np.testing.assert_array_equal(loaded.labels, saved.labels)
    assert loaded.bad_images == 1
    assert loaded.rows.dtype == np.float32
    np.testing.assert_allclose(loaded.rows, saved.rows, rtol=2**-10)
    np.testing.assert_array_equal(np.argsort(loaded.rows), np.argsort(saved.rows))


def test_a_shard_without_images_comes_back(tmp_path: Path) -> None:
    stores.save_shard(str(tmp_path), 0, scores(images=0, bad=4))
    loaded = score_store.load_shard(str(tmp_path), 0)
    assert (len(loaded.ids), loaded.rows.shape, loaded.bad_images) == (0, (0, 8, 7), 4)


def test_only_committed_shards_are_listed(tmp_path: Path) -> None:
    where = str(tmp_path / "scores")
    assert stores.list_scored_shards(where) == set()
    for shard in (0, 2, 11):
        stores.save_shard(where, shard, scores(shard))
    (tmp_path / "scores" / "shard-000002" / commit.DONE).unlink()  # its writer died
    (tmp_path / "scores" / "notes.txt").write_text("of a person")
    assert stores.list_scored_shards(where) == {0, 11}
    with pytest.raises(FileNotFoundError):
        score_store.load_shard(where, 2)
    stores.save_shard(where, 2, scores(2))
    assert stores.list_scored_shards(where) == {0, 2, 11}


def test_damaged_scores_are_an_error(tmp_path: Path) -> None:
    stores.save_shard(str(tmp_path), 0, scores())
    flip_byte(tmp_path / "shard-000000" / "scores.npz", 200)
    with pytest.raises(commit.CommitError, match=r"scores\.npz: damaged"):
        score_store.load_shard(str(tmp_path), 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [("aaaa/shard-000001", "its shard is 0, not 1"), ("bbbb/shard-000000", "its key is 'aaaa', not ")],
)
def test_scores_moved_elsewhere_are_an_error(tmp_path: Path, other: str, message: str) -> None:
    stores.save_shard(f"{tmp_path}/aaaa", 0, scores())
    shutil.copytree(tmp_path / "aaaa" / "shard-000000", tmp_path / other)
    with pytest.raises(commit.CommitError, match=f"{message}.*it belongs elsewhere"):
        score_store.load_shard(f"{tmp_path}/{other[:4]}", int(other[-1]))


def test_scores_may_be_moved_with_their_run(tmp_path: Path) -> None:
    stores.save_shard(f"{tmp_path}/one/aaaa", 0, scores())
    (tmp_path / "one").rename(tmp_path / "two")
    assert score_store.load_shard(f"{tmp_path}/two/aaaa/", 0).bad_images == 1


def test_committed_files_without_valid_scores_are_an_error(tmp_path: Path) -> None:
    good = {"format_version": score_store.FORMAT_VERSION, "key": tmp_path.name, "shard": 0, "images": 2, "bad": 0}
    part = str(tmp_path / "shard-000000")
    arrays = io.BytesIO()
    no_exact: dict[str, Any] = {"exact": np.empty((0, 2), dtype=np.int64), "exact_rows": np.empty((0, 4))}
    np.savez(arrays, ids=np.arange(2), labels=np.arange(3), rows=np.zeros((2, 8, 4), dtype=np.float16), **no_exact)
    beyond = io.BytesIO()
    places, values = np.array([[2, 0]]), np.zeros((1, 4), dtype=np.float32)
    rows = np.zeros((2, 8, 4), dtype=np.float16)
    np.savez(beyond, ids=np.arange(2), labels=np.arange(2), rows=rows, exact=places, exact_rows=values)
    pickled = io.BytesIO()
    np.savez(pickled, ids=np.array([{}]), allow_pickle=True)
    for payload, about, message in (
        ({"scores.npz": b"nothing"}, good, "holds no scores"),
        ({"other": b""}, good, "holds no scores"),
        ({"scores.npz": pickled.getvalue()}, good, "holds no scores"),
        ({"scores.npz": arrays.getvalue()}, good, "do not fit each other"),
        ({"scores.npz": beyond.getvalue()}, good, "do not fit each other"),
        ({}, {**good, "format_version": 2}, "its format_version is 2, not 3"),
        ({}, {}, "its format_version is None"),
    ):
        commit.write_folder(part, payload, about)
        with pytest.raises(commit.CommitError, match=message):
            score_store.load_shard(str(tmp_path), 0)


def test_problems_are_described(tmp_path: Path) -> None:
    where = str(tmp_path)
    with pytest.raises(FileNotFoundError):
        score_store.find_problem(where, 0, 10, 6, 7)
    stores.save_shard(where, 0, scores())  # images 10 .. 14 and a bad one
    assert score_store.find_problem(where, 0, 10, 6, 7) is None
    assert score_store.find_problem(where, 0, 9, 6, 7) is None  # which of them is the bad one is not known
    for first, samples in ((11, 6), (10, 5), (10, 7), (8, 6)):
        message = score_store.find_problem(where, 0, first, samples, 7)
        assert message is not None
        assert f"5 images, which are not those {first} .. {first + samples - 1} of the split" in message
    assert "of 7 classes, not 8" in str(score_store.find_problem(where, 0, 10, 6, 8))
    for label in (-2, 7):
        wrong = scores()
        wrong.labels[3] = label
        stores.save_shard(where, 2, wrong)
        assert f"labels must be -1 or 0 .. 6, got {label}" in str(score_store.find_problem(where, 2, 10, 6, 7))
    twice = dataclasses.replace(scores(), ids=np.array([10, 11, 11, 13, 14]))
    stores.save_shard(where, 1, twice)
    assert "which are not those" in str(score_store.find_problem(where, 1, 10, 6, 7))


def test_a_writer_takes_two_bytes_a_score() -> None:
    images, classes = 200, 1000
    rows = np.full((10, score_store.NUM_ROWS, classes), 1e-3, dtype=np.float32)
    ids = np.arange(10, dtype=np.int64)
    tracemalloc.start()
    try:
        part = score_store.ShardScoreWriter(images, classes)
        for _ in range(images // 10):
            part.add(ids, ids, rows)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    stored = images * score_store.NUM_ROWS * classes * 2
    assert stored <= held < 1.05 * stored
    assert most < 2.5 * stored  # what ten images take on their way


def test_non_probabilities_are_not_stored(tmp_path: Path) -> None:
    bad = scores()
    bad.rows[1, 7, 2] = np.nan
    with pytest.raises(ValueError, match="got other or non-finite values"):
        stores.save_shard(str(tmp_path), 0, bad)
    assert stores.list_scored_shards(str(tmp_path)) == set()


# ------------------------------------------------------------------ nearly flat rows, as at the start of training
def softmax(seed: int, images: int, spread: float, classes: int = 1000) -> NDArray[np.float32]:
    logits = np.random.default_rng(seed).normal(0, spread, (images, score_store.NUM_ROWS, classes))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), dtype=np.float32)


def stored(folder: Path, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows as they come back."""
    ids = np.arange(len(rows))
    part = score_store.ShardScoreWriter(len(rows), rows.shape[2])
    for start in range(0, len(rows), 3):
        here = slice(start, start + 3)
        part.add(ids[here], ids[here], rows[here])
    part.save(str(folder), 0, 0)
    return score_store.load_shard(str(folder), 0).rows


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0]))
def test_sums_order_and_the_ensembles_answer_survive_at_any_spread(seed: int, spread: float) -> None:
    with TemporaryDirectory() as folder:
        members = [softmax(seed + member, 4, spread) for member in range(7)]
        back = [stored(Path(folder) / str(member), rows) for member, rows in enumerate(members)]
    for rows, found in zip(members, back, strict=True):
        np.testing.assert_allclose(found.sum(axis=-1), rows.sum(axis=-1), rtol=1e-3)
        order = np.argsort(rows, axis=-1, kind="stable")
        ranked, kept = np.take_along_axis(rows, order, axis=-1), np.take_along_axis(found, order, axis=-1)
        np.testing.assert_array_equal(ranked[..., 1:] > ranked[..., :-1], kept[..., 1:] > kept[..., :-1])
    exact, answer = np.sum(members, axis=0), np.sum(back, axis=0).argmax(axis=-1)
    chosen = np.take_along_axis(exact, answer[..., None], axis=-1)[..., 0]
    assert (chosen >= exact.max(axis=-1) * (1 - 2**-9)).all()  # no other but where float16 sees a tie
    if spread <= 0.1:
        np.testing.assert_array_equal(answer, exact.argmax(axis=-1))


def test_rows_of_trained_networks_take_two_bytes_a_score(tmp_path: Path) -> None:
    rows = softmax(1, 20, 3.0)
    stored(tmp_path, rows)
    size = (tmp_path / "shard-000000" / "scores.npz").stat().st_size
    assert size < 1.1 * 2 * rows.size


def test_a_flat_row_is_read_with_the_same_first_five_as_computed(tmp_path: Path) -> None:
    rows = softmax(3, 30, 1e-3)
    back = stored(tmp_path, rows)
    flat = ~score_store.check_precision(rows, score_store.encode_float16(rows))
    assert flat.all()
    with np.load(tmp_path / "shard-000000" / "scores.npz") as arrays:
        assert {name: arrays[name].dtype for name in arrays} == {
            "ids": np.int64, "labels": np.int64, "rows": np.float16, "exact": np.int64, "exact_rows": np.float32,
        }  # fmt: skip
    np.testing.assert_array_equal(back, rows)
    first, computed = (np.argsort(-found, axis=-1, kind="stable")[..., :5] for found in (back, rows))
    np.testing.assert_array_equal(first, computed)


@pytest.mark.parametrize(("name", "dtype"), [("exact", np.float64), ("exact_rows", np.float64), ("rows", np.float32)])
def test_arrays_of_another_type_are_damaged_and_scored_again(tmp_path: Path, name: str, dtype: type) -> None:
    stored(tmp_path, softmax(3, 2, 1e-3))
    part = tmp_path / "shard-000000"
    with np.load(part / "scores.npz") as arrays:
        changed = {**arrays, name: arrays[name].astype(dtype)}
    buffer = io.BytesIO()
    np.savez(buffer, **changed)
    about = {"format_version": score_store.FORMAT_VERSION, "key": tmp_path.name, "shard": 0, "images": 2, "bad": 0}
    commit.write_folder(str(part), {"scores.npz": buffer.getvalue()}, about)
    assert "do not fit each other" in str(score_store.find_problem(str(tmp_path), 0, 0, 2, 1000))
    with pytest.raises(commit.CommitError, match="do not fit each other"):
        score_store.load_shard(str(tmp_path), 0)


# ------------------------------------------------------------------ what identifies scores
def key(
    weights: str = "w", changes: dict[str, Any] | None = None, dataset: str = "d", split: str = "validation"
) -> str:
    return score_store.compute_key(weights, apply_overrides(recipe(), changes or {}), dataset, split)


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


def test_the_key_ignores_settings_that_only_affect_training() -> None:
    changes = {"epochs": 9, "name": "other", "seeds.order": 3, "augmentation.area": (0.5, 1.0), "batch_size": 32}
    assert key(changes=changes) == key()


def test_compressed_scores_are_rejected(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, ids=np.zeros(0), labels=np.zeros(0), rows=np.zeros((0, 8, 7)))
    about = {"format_version": score_store.FORMAT_VERSION, "key": tmp_path.name, "shard": 0, "images": 0, "bad": 0}
    commit.write_folder(str(tmp_path / "shard-000000"), {"scores.npz": buffer.getvalue()}, about)
    with pytest.raises(commit.CommitError, match="is compressed"):
        score_store.load_shard(str(tmp_path), 0)


# ------------------------------------------------------------------ scores of several models, shard by shard
LABELS = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2])
PARTS, CLASSES = (LABELS[:5], LABELS[5:]), 6
DATASET = stores.manifest((5, 4), CLASSES)


def write_models(folder: Path) -> list[str]:
    return [stores.write_drawn(folder / f"m{number}", number, PARTS, CLASSES) for number in range(2)]


def read_all(folders: list[str], dataset: Manifest = DATASET) -> list[ShardScores]:
    return list(score_store.iter_shards(folders, dataset, stores.SPLIT))


def test_models_are_read_together(tmp_path: Path) -> None:
    folders = write_models(tmp_path)
    found = read_all(folders)
    assert [shard.labels.tolist() for shard in found] == [part.tolist() for part in PARTS]
    for number, shard in enumerate(found):
        for rows, folder in zip(shard.rows, folders, strict=True):
            np.testing.assert_array_equal(rows, score_store.load_shard(folder, number).rows)


def test_a_shard_that_is_not_scored_or_damaged(tmp_path: Path) -> None:
    folders = write_models(tmp_path)
    flip_byte(Path(folders[1], "shard-000001", "scores.npz"), 400)
    with pytest.raises(commit.CommitError, match=r"shard-000001.*damaged"):
        read_all(folders)
    Path(folders[1], "shard-000001", "DONE").unlink()
    with pytest.raises(FileNotFoundError, match="shard-000001"):
        read_all(folders)


@pytest.mark.parametrize(("first", "step"), [(1, 0), (0, 1)])
def test_models_scored_on_other_images_or_labels(tmp_path: Path, first: int, step: int) -> None:
    part = stores.drawn(2, (PARTS[0] + step) % CLASSES, CLASSES, first=first)
    other = stores.write(tmp_path / "other", [part])
    with pytest.raises(DataError, match=r"other: validation/0.tar: was scored on other images or labels than .*m0"):
        read_all([*write_models(tmp_path), other])


def test_splits_without_an_image_that_has_a_label(tmp_path: Path) -> None:
    where = stores.write_drawn(tmp_path / "m", 0, [np.full(len(part), -1) for part in PARTS], CLASSES)
    with pytest.raises(DataError, match="none of the 9 images of split 'validation' has scores and a label"):
        read_all([where])
    nothing = stores.write(tmp_path / "bad", [stores.drawn(0, LABELS[:0], CLASSES, bad=5)])
    with pytest.raises(DataError, match="none of the 5 images"):
        read_all([nothing], stores.manifest((5,), CLASSES))
    with pytest.raises(DataError, match="none of the 0 images"):
        read_all([nothing], stores.manifest((), CLASSES))
    with pytest.raises(DataError, match="no split 'validation'; it has train"):
        read_all([nothing], DATASET.model_copy(update={"splits": {"train": DATASET.splits[stores.SPLIT]}}))


def test_images_without_a_label_are_left_out(tmp_path: Path) -> None:
    labels = (PARTS[0], np.array([-1, -1, -1, 2]))
    folders = [stores.write_drawn(tmp_path / f"m{number}", number, labels, CLASSES) for number in range(2)]
    first, second = read_all(folders)
    assert (first.unlabelled, second.unlabelled, second.ids.tolist(), second.labels.tolist()) == (0, 3, [8], [2])
    np.testing.assert_array_equal(second.rows[1], score_store.load_shard(folders[1], 1).rows[3:])
