"""Scores that cannot be joined: each is an error that names the model and the shard."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.evaluation import score_store
from orchestrator.evaluation.analysis import MemberScores, analyze_ensemble
from orchestrator.evaluation.analysis_results import Analysis
from orchestrator.storage.commit import CommitError
from tests.support import stores
from tests.support.stores import SPLIT, manifest
from tests.support.tiny_shards import flip_byte

CLASSES, SHARDS = 6, (5, 4)
LABELS = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2])
PARTS = (LABELS[:5], LABELS[5:])


def join(folders: list[str], dataset: Manifest) -> Analysis:
    members = [MemberScores(f"m{number}", folder) for number, folder in enumerate(folders)]
    return analyze_ensemble(members, dataset, SPLIT)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return [stores.write_drawn(tmp_path / f"m{number}", number, PARTS, CLASSES) for number in range(2)]


DATASET = manifest(SHARDS, CLASSES)


def test_good_scores_are_joined(folders: list[str]) -> None:
    assert join(folders, DATASET).table.images == len(LABELS)


def test_no_models() -> None:
    with pytest.raises(DataError, match="no models"):
        join([], DATASET)


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_model_given_twice(folders: list[str], ending: str) -> None:
    with pytest.raises(DataError, match="m0: these scores are given twice"):
        join([*folders, folders[0] + ending], DATASET)


def test_a_name_given_twice(folders: list[str]) -> None:
    with pytest.raises(DataError, match="member 'm' is given twice"):
        analyze_ensemble([MemberScores("m", folder) for folder in folders], DATASET, SPLIT)


def test_raw_scores_that_are_the_averaged_ones(folders: list[str]) -> None:
    with pytest.raises(DataError, match="given twice"):
        analyze_ensemble([MemberScores("m", folders[0], raw=folders[0])], DATASET, SPLIT)


def test_a_split_that_is_not_there_or_empty(folders: list[str]) -> None:
    with pytest.raises(DataError, match="no split 'validation'; it has train"):
        join(folders, DATASET.model_copy(update={"splits": {"train": DATASET.splits[SPLIT]}}))
    with pytest.raises(DataError, match="has no shards"):
        join(folders, DATASET.model_copy(update={"splits": {SPLIT: ()}}))


def test_a_shard_that_is_not_scored(folders: list[str]) -> None:
    Path(folders[1], "shard-000001", "DONE").unlink()
    with pytest.raises(FileNotFoundError, match="shard-000001"):
        join(folders, DATASET)


def test_a_damaged_shard(folders: list[str]) -> None:
    flip_byte(Path(folders[1], "shard-000001", "scores.npz"), 400)
    with pytest.raises(CommitError, match=r"shard-000001.*damaged"):
        join(folders, DATASET)


def test_raw_scores_are_read_as_strictly(tmp_path: Path, folders: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match="raw"):
        analyze_ensemble([MemberScores("m", folders[0], raw=str(tmp_path / "raw"))], DATASET, SPLIT)


def test_a_model_of_another_number_of_classes(tmp_path: Path, folders: list[str]) -> None:
    other = stores.write_drawn(tmp_path / "other", 2, PARTS, CLASSES + 1)
    with pytest.raises(DataError, match=r"other: validation/0.tar: scores of 7 classes, but the dataset has 6"):
        join([*folders, other], DATASET)


@pytest.mark.parametrize("first", [1, 100])
def test_scores_of_other_images(tmp_path: Path, folders: list[str], first: int) -> None:
    other = stores.write(tmp_path / "other", [stores.drawn(2, PARTS[0], CLASSES, first=first)])
    with pytest.raises(DataError, match=r"other: validation/0.tar: .* not the 5 of the shard"):
        join([*folders, other], manifest(SHARDS[:1], CLASSES))


def test_more_or_fewer_images_than_the_shard_has(folders: list[str]) -> None:
    for samples in (4, 6):
        with pytest.raises(DataError, match=f"not the {samples} of the shard"):
            join(folders, manifest([samples, 4], CLASSES))


def test_an_image_twice(tmp_path: Path) -> None:
    part = stores.drawn(0, PARTS[0], CLASSES)
    part.ids[1] = part.ids[0]
    with pytest.raises(DataError, match="not the 5 of the shard"):
        join([stores.write(tmp_path / "m", [part])], manifest(SHARDS[:1], CLASSES))


def test_other_labels(tmp_path: Path, folders: list[str]) -> None:
    other = stores.write_drawn(tmp_path / "other", 2, ((LABELS[:5] + 1) % CLASSES, PARTS[1]), CLASSES)
    with pytest.raises(DataError, match=r"other: validation/0.tar: models were scored on different images or labels"):
        join([*folders, other], DATASET)


@pytest.mark.parametrize("label", [-2, CLASSES])
def test_a_label_that_is_no_class(tmp_path: Path, label: int) -> None:
    part = stores.drawn(0, PARTS[0], CLASSES)
    labels = part.labels.copy()
    labels[2] = label
    where = stores.write(tmp_path / "m", [replace(part, labels=labels)])
    with pytest.raises(DataError, match=rf"labels must be -1 or 0 \.\. 5, got {label}"):
        join([where], manifest(SHARDS[:1], CLASSES))


def test_no_image_with_a_label(tmp_path: Path) -> None:
    where = stores.write_drawn(tmp_path / "m", 0, [np.full(count, -1) for count in SHARDS], CLASSES)
    with pytest.raises(DataError, match="none of the 9 images of split 'validation' has scores and a label"):
        join([where], DATASET)


def test_no_image_that_a_decoder_takes(tmp_path: Path) -> None:
    nothing = stores.drawn(0, LABELS[:0], CLASSES, bad=5)
    with pytest.raises(DataError, match="none of the 5 images"):
        join([stores.write(tmp_path / "m", [nothing])], manifest(SHARDS[:1], CLASSES))


def test_a_shard_without_labels_among_others(tmp_path: Path) -> None:
    labels = (PARTS[0], np.full(4, -1))
    members = [stores.write_drawn(tmp_path / f"m{number}", number, labels, CLASSES) for number in range(2)]
    shown = join(members, DATASET).table
    assert (shown.images, shown.bad_images, shown.unlabelled) == (5, 0, 4)


def test_bad_images_are_counted_and_the_store_is_untouched(tmp_path: Path) -> None:
    part = stores.drawn(0, LABELS[:4], CLASSES, bad=1)
    where = stores.write(tmp_path / "m", [part])
    shown = join([where], manifest([5], CLASSES)).table
    assert (shown.images, shown.bad_images) == (4, 1)
    assert score_store.list_scored_shards(where) == {0}
