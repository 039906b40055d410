"""The analysis compared with plain computations from definitions, with all scores in memory."""

import math
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.evaluation import analysis, bootstrap, image_errors, score_store
from orchestrator.evaluation.analysis import analyze_ensemble
from orchestrator.evaluation.analysis_results import Analysis, ErrorDifference
from orchestrator.evaluation.score_store import Scores
from tests.support import oracles, stores
from tests.support.stores import CROPS, SPLIT, manifest

CLASSES, SHARDS, MEMBERS = 9, (70, 0, 50), 4
IMAGES = sum(SHARDS)
LABELS = np.random.default_rng(11).integers(0, CLASSES - 1, IMAGES)  # the last class has no image
SPLIT_AT = np.cumsum(SHARDS)[:-1]
NAMES = tuple(f"m{number}" for number in range(MEMBERS))

Floats = NDArray[np.float32]


def made(root: Path, labels: NDArray[np.int64] = LABELS) -> dict[str, str]:
    parts = np.split(labels, SPLIT_AT)
    return {name: stores.write_drawn(root / name, number, parts, CLASSES) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return made(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def found(members: dict[str, str]) -> Analysis:
    return analyze_ensemble(members, manifest(SHARDS, CLASSES), SPLIT)


@pytest.fixture(scope="module")
def stored(members: dict[str, str]) -> list[Scores]:
    return [whole(folder) for folder in members.values()]


def whole(folder: str) -> Scores:
    parts = [score_store.load_shard(folder, number) for number in range(len(SHARDS))]
    return Scores(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.rows for part in parts]),
        0,
    )


def collect(members: dict[str, str]) -> image_errors.ImageErrors:
    shards = score_store.iter_shards(list(members.values()), manifest(SHARDS, CLASSES), SPLIT)
    return image_errors.collect_errors(shards, len(members))


def wrong(scores: list[Floats]) -> NDArray[np.float64]:
    return oracles.compute_errors(np.sum(scores, axis=0, dtype=np.float32), LABELS)


def single(scores: list[Floats]) -> NDArray[np.float64]:
    return np.asarray(np.mean([wrong([one]) for one in scores], axis=0))


def percent(errors: NDArray[np.float64]) -> list[float]:
    top1, top5 = (100 * errors.mean(axis=0)).tolist()
    return [top1, top5]


def all_crops(stored: list[Scores]) -> list[Floats]:
    return [stores.get_mean(one, 144) for one in stored]


def check_all(
    differences: tuple[ErrorDifference, ErrorDifference], errors: NDArray[np.float64], others: NDArray[np.float64]
) -> None:
    """The differences, top-1 and top-5, of errors of images; and p by the test itself."""
    for rank, difference in enumerate(differences):
        apart = errors[:, rank] - others[:, rank]
        check(difference, 100 * apart.mean())
        assert difference.p == pytest.approx(bootstrap.compute_sign_flip_p(apart, math.factorial(MEMBERS)))


def check(difference: ErrorDifference, points: float) -> None:
    assert difference.points == pytest.approx(points, abs=1e-9)
    low, high = difference.interval
    assert low <= points <= high
    assert 0 < difference.p <= 1
    if difference.p < 0.01:
        assert low > 0 or high < 0


# ------------------------------------------------------------------ figure by figure
def test_the_table_is_that_of_the_plain_join(found: Analysis, members: dict[str, str]) -> None:
    plain = oracles.compute_table(list(members.values()), manifest(SHARDS, CLASSES), SPLIT)
    assert found.table == plain
    assert (plain.images, plain.bad_images, plain.unlabelled) == (IMAGES, 0, 0)
    assert (found.split, found.member_names) == (SPLIT, NAMES)


def test_errors_of_members(found: Analysis, stored: list[Scores]) -> None:
    assert found.members == {
        (name, count): tuple(percent(wrong([stores.get_mean(one, count)])))
        for name, one in zip(NAMES, stored, strict=True)
        for count in CROPS
    }


def test_errors_of_all_subsets(found: Analysis, stored: list[Scores]) -> None:
    assert list(found.subsets) == [(count, size) for count in CROPS for size in range(1, MEMBERS + 1)]
    for (count, size), one in found.subsets.items():
        some = [[stores.get_mean(member, count) for member in chosen] for chosen in combinations(stored, size)]
        errors = np.array([percent(wrong(scores)) for scores in some])
        assert one.subsets == len(errors)
        for spread, expected in ((one.least, errors.min(0)), (one.mean, errors.mean(0)), (one.most, errors.max(0))):
            assert spread == pytest.approx(tuple(expected))


def test_disagreement_and_correlation_of_members(found: Analysis, stored: list[Scores]) -> None:
    named = np.stack([scores.argmax(axis=1) for scores in all_crops(stored)])
    missed = [wrong([scores])[:, 0] for scores in all_crops(stored)]
    np.testing.assert_allclose(np.array(found.correlation, dtype=np.float64), np.array(np.corrcoef(missed)))
    for one, two in np.ndindex(MEMBERS, MEMBERS):
        assert found.disagreement[one][two] == pytest.approx(100 * np.mean(named[one] != named[two]))


def test_gains_of_members(found: Analysis, stored: list[Scores]) -> None:
    together = wrong(all_crops(stored))
    assert tuple(found.gains) == NAMES
    for number, gain in enumerate(found.gains.values()):
        without = wrong([scores for other, scores in enumerate(all_crops(stored)) if other != number])
        check_all(gain, without, together)


def test_classes_and_confusions(found: Analysis, stored: list[Scores]) -> None:
    errors = wrong(all_crops(stored))
    named = np.sum(all_crops(stored), axis=0).argmax(axis=1)
    pairs = Counter((label, name) for label, name in zip(LABELS.tolist(), named.tolist(), strict=True) if label != name)
    assert [one.label for one in found.classes] == list(range(CLASSES - 1))
    for one in found.classes:
        of_class = np.equal(LABELS, one.label)
        assert one.images == of_class.sum()
        assert [one.top1_error, one.top5_error] == pytest.approx(percent(errors[of_class]))
        mistaken = {name: times for (label, name), times in pairs.items() if label == one.label}
        assert one.confused_images == max(mistaken.values(), default=0)
        assert one.confused_with in mistaken if mistaken else one.confused_with is None
        if one.confused_with is not None:
            assert mistaken[one.confused_with] == one.confused_images
    counts = [one.images for one in found.confusions]
    assert counts == sorted(pairs.values(), reverse=True)[:20]
    assert all(pairs[one.true, one.predicted] == one.images for one in found.confusions)


def test_class_errors_of_a_member_are_those_of_its_own_analysis(members: dict[str, str]) -> None:
    images = collect(members)
    for number, (name, folder) in enumerate(members.items()):
        alone = analyze_ensemble({name: folder}, manifest(SHARDS, CLASSES), SPLIT)
        confusions = analysis.count_confusions(images.labels, images.predicted[number])
        flags = images.flags[image_errors.ALL_CROPS, (number,)]
        assert tuple(confusions[:20]) == alone.confusions
        assert analysis.compute_class_errors(images.labels, flags, confusions) == alone.classes


def test_calibration(found: Analysis, stored: list[Scores]) -> None:
    models = [[scores] for scores in all_crops(stored)] + [all_crops(stored)]
    errors, bins = [], []
    for scores in models:
        mean = np.sum(scores, axis=0) / len(scores)
        sure, right = mean.max(axis=1), mean.argmax(axis=1) == LABELS
        inside = [(sure > low / 15) & (sure <= (low + 1) / 15) for low in range(15)]
        errors.append(sum(abs(sure[some].sum() - right[some].sum()) for some in inside) / IMAGES)
        bins.append([(int(some.sum()), float(sure[some].sum()), int(right[some].sum())) for some in inside])
    singles, ensemble = found.calibration
    assert (singles.models, ensemble.models) == (1, MEMBERS)
    assert singles.ece == pytest.approx(np.mean(errors[:-1]), rel=1e-5)
    assert ensemble.ece == pytest.approx(errors[-1], rel=1e-5)
    for calibration, sums in ((singles, np.sum(bins[:-1], axis=0)), (ensemble, np.array(bins[-1]))):
        assert [answers for answers, _, _ in calibration.bins] == sums[:, 0].tolist()
        for (_, confidence, accuracy), (images, sure, right) in zip(calibration.bins, sums.tolist(), strict=True):
            expected = (sure / images, right / images) if images else (0, 0)
            assert (confidence, accuracy) == pytest.approx(expected, rel=1e-5)
        images, sure, right = sums.sum(axis=0)
        assert (calibration.confidence, calibration.accuracy) == pytest.approx((sure / images, right / images))


def test_cells_are_compared_in_pairs(found: Analysis, stored: list[Scores]) -> None:
    def cell_errors(models: int, count: int) -> NDArray[np.float64]:
        return (single if models == 1 else wrong)([stores.get_mean(part, count) for part in stored])

    cells = [(cell.models, cell.crops) for cell in found.table.cells]
    assert [(other, cell) for cell, other in found.paired] == list(combinations(cells, 2))
    for (cell, other), differences in found.paired.items():
        check_all(differences, cell_errors(*cell), cell_errors(*other))


def test_scales_and_maximum(found: Analysis, stored: list[Scores]) -> None:
    for models, errors in ((1, single), (MEMBERS, wrong)):
        for row, scale in enumerate((256, 288, 320, 352), start=3):
            assert found.scales[models, scale] == tuple(percent(errors([part.rows[:, row] for part in stored])))
        highest = errors([part.rows[:, 7] for part in stored])
        shown, differences = found.maximum[models]
        assert shown == tuple(percent(highest))
        check_all(differences, highest, errors(all_crops(stored)))
    assert (len(found.scales), len(found.maximum)) == (8, 2)


def test_mistakes_are_the_most_confident_ones(found: Analysis, stored: list[Scores]) -> None:
    mean = np.sum(all_crops(stored), axis=0) / MEMBERS
    missed = [image for image in range(IMAGES) if mean[image].argmax() != LABELS[image]]
    worst = sorted(missed, key=lambda image: -mean[image].max())[:24]
    assert [one.image for one in found.mistakes] == worst
    for one in found.mistakes:
        assert (one.true, one.predicted) == (LABELS[one.image], mean[one.image].argmax())
        assert one.confidence == pytest.approx(mean[one.image].max())


# ------------------------------------------------------------------ as a whole
def test_results_are_reproducible_however_the_split_is_sharded(tmp_path: Path, found: Analysis) -> None:
    members = made(tmp_path)
    assert analyze_ensemble(members, manifest(SHARDS, CLASSES), SPLIT) == found
    moved = {name: str(tmp_path / "one" / name) for name in NAMES}
    for name, folder in members.items():
        stores.save_shard(moved[name], 0, whole(folder))
    assert analyze_ensemble(moved, manifest([IMAGES], CLASSES), SPLIT) == found


def test_unlabelled_images_are_counted_and_left_out(tmp_path: Path) -> None:
    known = np.arange(IMAGES) % 3 > 0
    some = analyze_ensemble(made(tmp_path / "some", np.where(known, LABELS, -1)), manifest(SHARDS, CLASSES), SPLIT)
    assert (some.table.images, some.table.unlabelled) == (known.sum(), IMAGES - known.sum())
    assert sum(one.images for one in some.classes) == known.sum()
    assert all(known[one.image] and one.true == LABELS[one.image] for one in some.mistakes)
    assert sum(answers for answers, _, _ in some.calibration[1].bins) == known.sum()
