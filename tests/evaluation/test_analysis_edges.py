"""The analysis of ensembles at the edges: one member, many, members that are always right or know nothing."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.evaluation import image_errors
from orchestrator.evaluation.analysis import MemberScores, analyze_ensemble
from orchestrator.evaluation.score_store import Scores
from tests.support import stores
from tests.support.stores import CROPS, SPLIT, manifest

CLASSES = 9
LABELS = np.random.default_rng(11).integers(0, CLASSES, 60)

Floats = NDArray[np.float32]


def test_a_single_member_has_no_company(tmp_path: Path) -> None:
    folder = stores.write_drawn(tmp_path / "m0", 0, [LABELS], CLASSES)
    found = analyze_ensemble([MemberScores("m0", folder)], manifest([60], CLASSES), SPLIT)
    assert [cell.models for cell in found.table.cells] == [1, 1, 1]
    assert (found.gains, found.selection, found.averaging, found.averaged_members) == ((), (), (), ())
    assert ([one.models for one in found.maximum], [one.models for one in found.calibration]) == ([1], [1])
    assert found.pairs.disagreement == ((0.0,),)
    assert found.pairs.correlation[0][0] == pytest.approx(1)
    assert len(found.paired) == 3
    assert len(found.scales) == 4


def test_a_member_that_is_always_right_correlates_with_none(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 0])
    sure = np.eye(3, dtype=np.float32)[labels]
    shy = stores.drawn(1, labels, 3)
    alike: dict[int, Floats] = dict.fromkeys(CROPS, sure)
    right = Scores(np.arange(4), labels, alike, np.repeat(sure[:, None], 4, axis=1), sure, 0)
    members = [
        MemberScores(name, stores.write(tmp_path / name, [part])) for name, part in (("sure", right), ("shy", shy))
    ]
    found = analyze_ensemble(members, manifest([4], 3), SPLIT)
    assert found.pairs.correlation[0] == (None, None)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_that_says_the_same_of_all_classes_names_a_wrong_one(tmp_path: Path) -> None:
    labels = np.arange(6) % 3
    same = np.full((6, 3), 1 / 3, dtype=np.float32)
    part = Scores(np.arange(6), labels, dict.fromkeys(CROPS, same), np.repeat(same[:, None], 4, axis=1), same, 0)
    found = analyze_ensemble([MemberScores("m", stores.write(tmp_path, [part]))], manifest([6], 3), SPLIT)
    assert found.table.get_cell(1, 144).top1_error == 100
    assert sum(one.images for one in found.confusions) == 6
    assert all(one.true != one.predicted for one in found.confusions)
    assert all(one.true != one.predicted for one in found.mistakes)
    assert sum(one.accuracy or 0 for one in found.calibration[0].bins) == 0


@pytest.mark.parametrize("images", [1, 2])
def test_as_few_images_as_there_can_be(tmp_path: Path, images: int) -> None:
    labels = LABELS[:images]
    members = [MemberScores(f"m{n}", stores.write_drawn(tmp_path / str(n), n, [labels], CLASSES)) for n in range(3)]
    found = analyze_ensemble(members, manifest([images], CLASSES), SPLIT)
    assert found.table.images == images
    assert len(found.selection) == (0 if images == 1 else 3)


def test_of_many_members_some_subsets_are_looked_at_and_it_says_how_many(tmp_path: Path) -> None:
    labels = [LABELS[:20]]
    sample = set(image_errors.list_subsets(12))
    # Those with raw weights are compared apart, so their ensemble is not one more of the subsets.
    raw = next(subset for subset in combinations(range(12), 5) if subset not in sample)
    members = []
    for number in range(12):
        scores = stores.write_drawn(tmp_path / f"m{number}", number, labels, CLASSES)
        rough = stores.write_drawn(tmp_path / f"r{number}", number, labels, CLASSES) if number in raw else None
        members.append(MemberScores(f"m{number}", scores, rough))
    found = analyze_ensemble(members, manifest([20], CLASSES), SPLIT)
    looked_at = {one.size: (one.looked_at, one.possible) for one in found.subsets}
    assert looked_at[1] == (12, 12)
    assert looked_at[5] == (128, 792)
    assert looked_at[12] == (1, 1)
    assert len(found.gains) == len(found.selection) == 12
    assert [one.models for one in found.averaging] == [1, 1, 1, 5, 5, 5]
