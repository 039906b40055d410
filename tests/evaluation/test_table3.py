"""Table 3, from errors of images to intervals and the paper's figures."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.data.manifest import Manifest, Shard
from orchestrator.evaluation import image_errors
from orchestrator.evaluation.analysis import analyze_ensemble
from orchestrator.evaluation.score_store import Scores
from orchestrator.evaluation.table3 import PAPER_TOP5, Table3
from tests.support import stores

CLASSES = 8
PAPER = Path(__file__).resolve().parents[3] / "shared" / "paper.md"


def manifest(*samples: int) -> Manifest:
    shards = tuple(
        Shard(name=f"validation/{number}.tar", samples=count, bytes=0, sha256="", index_sha256="")
        for number, count in enumerate(samples)
    )
    return Manifest(name="made", classes=tuple("abcdefgh"), splits={"validation": shards})


def ranked(labels: list[int], places: list[int]) -> NDArray[np.float32]:
    """Scores in which the true class of each image has that place, 0 being the first."""
    rows = np.zeros((len(labels), CLASSES), dtype=np.float32)
    for row, (label, place) in enumerate(zip(labels, places, strict=True)):
        others = [number for number in range(CLASSES) if number != label]
        order = [*others[:place], label, *others[place:]]
        rows[row, order] = np.linspace(0.9, 0.1, CLASSES)
    return rows


def store(where: Path, shard: int, first: int, labels: list[int], means: dict[int, NDArray[np.float32]]) -> None:
    count = len(labels)
    ids = np.arange(first, first + count)
    nothing = np.zeros((count, 4, CLASSES), dtype=np.float32)
    stores.save_shard(
        str(where),
        shard,
        Scores(ids, np.array(labels, dtype=np.int64), stores.join_rows(means, nothing, nothing[:, 0]), 0),
    )


def alike(scores: NDArray[np.float32]) -> dict[int, NDArray[np.float32]]:
    return dict.fromkeys((1, 10, 144), scores)


def compute_errors(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the errors of a single model."""
    (errors,) = dict(image_errors.iter_errors([scores], labels, [(0,)])).values()
    return errors.astype(np.float64)


def compute_table(folders: list[str], dataset: Manifest) -> Table3:
    members = {f"m{number}": folder for number, folder in enumerate(folders)}
    return analyze_ensemble(members, dataset, "validation").table


# ------------------------------------------------------------------ errors of images
def test_errors_follow_the_place_of_the_true_class() -> None:
    labels = [3] * CLASSES
    found = compute_errors(ranked(labels, list(range(CLASSES))), np.array(labels))
    assert found[:, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    assert found[:, 1].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_ties_count_as_wrong() -> None:
    same = np.full((1, CLASSES), 1 / CLASSES, dtype=np.float32)
    for label in range(CLASSES):
        assert compute_errors(same, np.array([label])).tolist() == [[1, 1]]
    pair = np.array([[0.4, 0.4, 0.2, 0, 0, 0, 0, 0]], dtype=np.float32)
    assert compute_errors(pair, np.array([0])).tolist() == [[1, 0]]
    assert compute_errors(pair, np.array([2])).tolist() == [[1, 0]]


@pytest.mark.parametrize("place", [0, 3])
def test_a_nan_score_counts_as_wrong(place: int) -> None:
    scores = np.full((2, CLASSES), np.nan, dtype=np.float32)
    scores[1] = ranked([3], [0])[0]
    scores[1, place] = np.nan
    found = compute_errors(scores, np.array([3, 3]))
    assert found[0].tolist() == [1, 1]
    assert found[1, 0] == 1


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_without_ties_errors_are_those_of_a_sort(images: list[tuple[int, int]], seed: int) -> None:
    labels = np.array([label for label, _ in images])
    draw = np.random.default_rng(seed)
    scores = np.stack([draw.permutation(CLASSES) for _ in images]).astype(np.float32)
    order = np.argsort(-scores, axis=1)
    expected = [[label not in row[:1], label not in row[:5]] for label, row in zip(labels, order, strict=True)]
    assert compute_errors(scores, labels).tolist() == expected


# ------------------------------------------------------------------ the table
def test_known_scores_give_known_errors_shard_by_shard(tmp_path: Path) -> None:
    labels = [0, 1, 2, 3]
    places = {1: [0, 1, 5, 6], 10: [0, 0, 5, 4], 144: [0, 0, 0, 5]}
    means = {count: ranked(labels, place) for count, place in places.items()}
    store(tmp_path, 0, 0, labels[:3], {count: mean[:3] for count, mean in means.items()})
    store(tmp_path, 1, 3, labels[3:], {count: mean[3:] for count, mean in means.items()})
    made = compute_table([str(tmp_path)], manifest(3, 1))
    assert (made.images, made.bad_images) == (4, 0)
    assert [(cell.models, cell.crops, cell.cost) for cell in made.cells] == [(1, 1, 1), (1, 10, 10), (1, 144, 144)]
    assert [cell.top1_error for cell in made.cells] == [75.0, 50.0, 25.0]
    assert [cell.top5_error for cell in made.cells] == [50.0, 25.0, 25.0]
    assert made.get_cell(1, 144).paper_top5 == 7.89
    with pytest.raises(KeyError):
        made.get_cell(7, 1)


def test_an_ensemble_sums_probabilities_and_one_model_is_the_mean(tmp_path: Path) -> None:
    # Probabilities of class 0, the true one, by model and image; class 1 has the rest.
    true = [
        [0.90, 0.30, 0.1],
        [0.40, 0.65, 0.2],
        [0.45, 0.65, 0.7],
    ]
    folders = []
    for number, row in enumerate(true):
        scores = np.zeros((3, CLASSES), dtype=np.float32)
        scores[:, 0] = row
        scores[:, 1] = 1 - scores[:, 0]
        store(tmp_path / str(number), 0, 0, [0, 0, 0], alike(scores))
        folders.append(str(tmp_path / str(number)))
    made = compute_table(folders, manifest(3))
    assert [(cell.models, cell.crops, cell.cost) for cell in made.cells[3:]] == [(3, 1, 3), (3, 10, 30), (3, 144, 432)]
    # Wrong are images 1 and 2 of the first model, 0 and 2 of the second, 0 of the third.
    assert made.get_cell(1, 1).top1_error == pytest.approx(100 * 5 / 9)
    # The sums get images 0 and 1 right; a vote would lose the first of them, the maximum the second.
    assert made.get_cell(3, 1).top1_error == pytest.approx(100 / 3)
    assert made.get_cell(3, 1).paper_top5 is None


def test_intervals_hold_the_mean_agree_with_theory_and_are_the_same_each_time(tmp_path: Path) -> None:
    labels = [0] * 200
    store(tmp_path, 0, 0, labels, alike(ranked(labels, [0] * 140 + [7] * 60)))
    made = compute_table([str(tmp_path)], manifest(200))
    assert compute_table([str(tmp_path)], manifest(200)) == made
    cell = made.get_cell(1, 10)
    assert (cell.top1_error, cell.top5_error) == (30.0, 30.0)
    low, high = cell.top1_interval
    assert low < 30.0 < high
    spread = 100 * 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert [low, high] == pytest.approx([30 - spread, 30 + spread], abs=1)
    # Every cell sees the same resamples: equal errors, equal bounds.
    assert {cell.top1_interval for cell in made.cells} == {(low, high)}


def test_each_cell_has_its_own_interval(tmp_path: Path) -> None:
    labels = [0] * 300
    wrong = {1: (150, 90), 10: (60, 30), 144: (15, 6)}  # of 300: top-1, top-5
    means = {
        count: ranked(labels, [7] * top5 + [1] * (top1 - top5) + [0] * (300 - top1))
        for count, (top1, top5) in wrong.items()
    }
    store(tmp_path, 0, 0, labels, means)
    made = compute_table([str(tmp_path)], manifest(300))
    for cell in made.cells:
        intervals = (cell.top1_interval, cell.top5_interval)
        for (low, high), number in zip(intervals, wrong[cell.crops], strict=True):
            spread = 196 * (number / 300 * (1 - number / 300) / 300) ** 0.5
            assert [low, high] == pytest.approx([number / 3 - spread, number / 3 + spread], abs=1)


def test_without_errors_the_interval_is_a_point(tmp_path: Path) -> None:
    store(tmp_path, 0, 0, [1, 2], alike(ranked([1, 2], [0, 0])))
    assert compute_table([str(tmp_path)], manifest(2)).get_cell(1, 1).top1_interval == (0.0, 0.0)


def test_undecodable_images_are_counted_separately(tmp_path: Path) -> None:
    scores = ranked([0, 0], [0, 7])
    nothing = np.zeros((2, 4, CLASSES), dtype=np.float32)
    partial = Scores(np.array([0, 2]), np.array([0, 0]), stores.join_rows(alike(scores), nothing, scores), 1)
    stores.save_shard(str(tmp_path), 0, partial)
    made = compute_table([str(tmp_path)], manifest(3))
    assert (made.images, made.bad_images, made.get_cell(1, 1).top1_error) == (2, 1, 50.0)


# ------------------------------------------------------------------ the paper
def test_differences_to_the_papers_base_are_taken_from_its_errors() -> None:
    versus = {cell: round(error - PAPER_TOP5[1, 1], 2) for cell, error in PAPER_TOP5.items()}
    # The paper prints -3.45 for the last.
    assert versus == {(1, 1): 0, (1, 10): -0.92, (1, 144): -2.18, (7, 1): -1.98, (7, 10): -2.45, (7, 144): -3.4}


def test_the_papers_figures() -> None:
    assert PAPER_TOP5 == {
        (1, 1): 10.07, (1, 10): 9.15, (1, 144): 7.89, (7, 1): 8.09, (7, 10): 7.62, (7, 144): 6.67,
    }  # fmt: skip
    if PAPER.exists():
        rows = re.findall(r"^\| ([17]) \| (1|10|144) \| \d+ \| ([\d.]+)% \|", PAPER.read_text(), re.MULTILINE)
        assert {(int(models), int(crops)): float(error) for models, crops, error in rows} == PAPER_TOP5
