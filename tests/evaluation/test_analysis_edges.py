"""The analysis of ensembles at the edges: one member, many, members that are always right or know nothing."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.evaluation.analysis import analyze_ensemble
from orchestrator.evaluation.score_store import Scores
from tests.support import stores
from tests.support.stores import SPLIT, manifest

CLASSES = 9
LABELS = np.random.default_rng(11).integers(0, CLASSES, 60)


def test_a_single_member_has_no_gains_and_one_calibration(tmp_path: Path) -> None:
    folder = stores.write_drawn(tmp_path / "m0", 0, [LABELS], CLASSES)
    found = analyze_ensemble({"m0": folder}, manifest([60], CLASSES), SPLIT)
    assert [cell.models for cell in found.table.cells] == [1, 1, 1]
    assert found.gains == {}
    assert (list(found.maximum), [one.models for one in found.calibration]) == ([1], [1])
    assert found.disagreement == ((0.0,),)
    assert found.correlation[0][0] == pytest.approx(1)
    assert len(found.paired) == 3
    assert len(found.scales) == 4


def test_a_member_that_is_always_right_correlates_with_none(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 0])
    sure = np.eye(3, dtype=np.float32)[labels]
    shy = stores.drawn(1, labels, 3)
    right = Scores(np.arange(4), labels, np.repeat(sure[:, None], 8, axis=1), 0)
    members = {name: stores.write(tmp_path / name, [part]) for name, part in (("sure", right), ("shy", shy))}
    found = analyze_ensemble(members, manifest([4], 3), SPLIT)
    assert found.correlation[0] == (None, None)


def test_equal_scores_of_all_classes_count_as_wrong(tmp_path: Path) -> None:
    labels = np.arange(6) % 3
    same = np.full((6, 3), 1 / 3, dtype=np.float32)
    part = Scores(np.arange(6), labels, np.repeat(same[:, None], 8, axis=1), 0)
    found = analyze_ensemble({"m": stores.write(tmp_path, [part])}, manifest([6], 3), SPLIT)
    assert found.table.get_cell(1, 144).top1_error == 100
    assert sum(one.images for one in found.confusions) == 6
    assert all(one.true != one.predicted for one in found.confusions)
    assert all(one.true != one.predicted for one in found.mistakes)
    assert found.calibration[0].accuracy == 0


@pytest.mark.parametrize("images", [1, 2])
def test_one_or_two_images_can_be_analyzed(tmp_path: Path, images: int) -> None:
    labels = LABELS[:images]
    members = {f"m{n}": stores.write_drawn(tmp_path / str(n), n, [labels], CLASSES) for n in range(3)}
    found = analyze_ensemble(members, manifest([images], CLASSES), SPLIT)
    assert found.table.images == images


def test_of_many_members_few_subset_sizes_are_counted(tmp_path: Path) -> None:
    members = {f"m{n}": stores.write_drawn(tmp_path / f"m{n}", n, [LABELS[:20]], CLASSES) for n in range(12)}
    found = analyze_ensemble(members, manifest([20], CLASSES), SPLIT)
    assert {size: one.subsets for (crops, size), one in found.subsets.items() if crops == 144} == {1: 12, 11: 12, 12: 1}
    assert len(found.gains) == 12
