from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import rng
from orchestrator.evaluation import score_store
from orchestrator.evaluation.analysis import MemberScores, analyze_ensemble
from orchestrator.evaluation.score_store import Scores
from tests.support import oracles, stores
from tests.support.stores import CROPS, SPLIT, manifest

CLASSES, IMAGES, MEMBERS = 8, 90, 4


def halves(images: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    first = rng.permutation(rng.derive_key(0, "halves"), images) < images // 2
    return first, ~first


def right_on(images: NDArray[np.bool_], labels: NDArray[np.int64], sure: float = 0.9) -> Scores:
    """Scores that put the true class first on these images, and last on the others."""
    rows = np.full((len(labels), CLASSES), (1 - sure) / (CLASSES - 1), dtype=np.float32)
    rows[np.arange(len(labels)), labels] = np.where(images, sure, 0)
    return Scores(
        np.arange(len(labels)), labels, dict.fromkeys(CROPS, rows), np.repeat(rows[:, None], 4, axis=1), rows, 0
    )


def test_nothing_is_picked_on_the_images_that_it_is_scored_on(tmp_path: Path) -> None:
    labels = np.arange(IMAGES) % CLASSES
    parts = dict(zip(("one", "two"), (right_on(half, labels) for half in halves(IMAGES)), strict=True))
    members = [MemberScores(name, stores.write(tmp_path / name, [part])) for name, part in parts.items()]
    alone, both = analyze_ensemble(members, manifest([IMAGES], CLASSES), SPLIT).selection
    # Each half picks the member that is right on it; on the other half that one is always wrong.
    assert (alone.size, alone.added, alone.top1_error, alone.top5_error) == (1, ("one", "two"), 100, 100)
    assert (both.size, both.added, both.top1_error) == (2, ("two", "one"), 0)


def test_equally_good_members_are_taken_by_top1_error_then_in_their_order(tmp_path: Path) -> None:
    labels = np.arange(IMAGES) % CLASSES
    first_place = np.ones(IMAGES, dtype=np.bool_)
    second_place = right_on(first_place, labels, 0.4)
    rows = second_place.maximum
    rows[np.arange(IMAGES), (labels + 1) % CLASSES] = 0.5  # the same array stands for all crops
    parts = {"second": second_place, "first": right_on(first_place, labels), "again": right_on(first_place, labels)}
    members = [MemberScores(name, stores.write(tmp_path / name, [part])) for name, part in parts.items()]
    steps = analyze_ensemble(members, manifest([IMAGES], CLASSES), SPLIT).selection
    assert [step.added for step in steps] == [("first", "first"), ("second", "second"), ("again", "again")]


def test_each_step_adds_the_member_with_which_the_half_has_least_errors(tmp_path: Path) -> None:
    labels = np.random.default_rng(4).integers(0, CLASSES, IMAGES)
    cut = np.split(labels, [40])
    names = [f"m{number}" for number in range(MEMBERS)]
    folders = [stores.write_drawn(tmp_path / name, number, cut, CLASSES) for number, name in enumerate(names)]
    members = [MemberScores(*pair) for pair in zip(names, folders, strict=True)]
    steps = analyze_ensemble(members, manifest([40, 50], CLASSES), SPLIT).selection

    def errors(chosen: list[int]) -> NDArray[np.float64]:
        scores = [
            np.concatenate([score_store.load_shard(folders[member], shard).means[144] for shard in range(2)])
            for member in sorted(chosen)
        ]
        return oracles.compute_errors(np.sum(scores, axis=0, dtype=np.float32), labels)

    one, two = halves(IMAGES)
    wrong = np.zeros((MEMBERS, 2))
    for place, (half, rest) in enumerate(((one, two), (two, one))):
        picks: list[int] = []
        for size in range(MEMBERS):
            left = [member for member in range(MEMBERS) if member not in picks]
            picks.append(min(left, key=lambda member: (*errors([*picks, member])[half].sum(axis=0)[::-1], member)))
            assert steps[size].added[place] == names[picks[-1]]
            wrong[size] += errors(picks)[rest].sum(axis=0)
    np.testing.assert_allclose([(step.top1_error, step.top5_error) for step in steps], 100 * wrong / IMAGES)
