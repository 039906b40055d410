"""The user's metrics in the table, against the same figures from all scores in memory."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble.report import wording
from orchestrator.evaluation import score_store
from orchestrator.evaluation.analysis import analyze_ensemble
from orchestrator.recipe.config import MetricPlugin
from tests.support import stores

SHARDS, CLASSES, MEMBERS = (30, 20), 5, 3
LABELS = np.random.default_rng(3).integers(0, CLASSES, sum(SHARDS))
TOP2 = MetricPlugin(kind="top_k_error", args={"k": 2})


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("store")
    parts = np.split(LABELS, [SHARDS[0]])
    return {f"m{n}": stores.write_drawn(root / f"m{n}", n, parts, CLASSES) for n in range(MEMBERS)}


def count_top2_errors(scores: list[np.ndarray]) -> float:
    best = np.argsort(-np.sum(scores, axis=0), axis=1)[:, :2]
    return 100 * float((best != LABELS[:, None]).all(axis=1).mean())


def test_each_cell_has_the_metrics_of_its_models_and_crops(members: dict[str, str]) -> None:
    table = analyze_ensemble(members, stores.manifest(SHARDS, CLASSES), stores.SPLIT, (TOP2,)).table
    for row, crops in enumerate(stores.CROPS):
        scores = [
            np.concatenate([score_store.load_shard(folder, shard).rows[:, row] for shard in range(len(SHARDS))])
            for folder in members.values()
        ]
        together = table.get_cell(MEMBERS, crops).metrics["top2_error"]
        assert together == pytest.approx(count_top2_errors(scores))
        alone = table.get_cell(1, crops).metrics["top2_error"]
        assert alone == pytest.approx(np.mean([count_top2_errors([each]) for each in scores]))


def test_the_table_shows_metrics_as_further_columns(members: dict[str, str]) -> None:
    manifest = stores.manifest(SHARDS, CLASSES)
    plain = analyze_ensemble(members, manifest, stores.SPLIT).table
    table = analyze_ensemble(members, manifest, stores.SPLIT, (TOP2,)).table
    assert wording.build_columns(plain).keys() == wording.build_columns(table).keys() - {"top2_error"}
    assert wording.render_text(table).splitlines()[0].endswith("top2_error")
    assert f"{table.cells[0].metrics['top2_error']:#.4g}" in wording.render_markdown(table).splitlines()[2]
    assert [row[:-1] for row in wording.build_rows(table)] == wording.build_rows(plain)


def test_a_metric_that_cannot_be_built_is_a_clear_error(members: dict[str, str]) -> None:
    unknown = MetricPlugin(kind="top_k_error", args={"k": CLASSES + 1})
    with pytest.raises(ConfigError, match=f"k must be between 1 and {CLASSES}"):
        analyze_ensemble(members, stores.manifest(SHARDS, CLASSES), stores.SPLIT, (unknown,))


def test_a_probability_of_zero_gives_a_finite_logit(tmp_path: Path) -> None:
    rows = np.zeros((2, 8, CLASSES), dtype=np.float32)
    rows[:, :, 0] = 1
    scores = score_store.Scores(np.arange(2), np.array([0, 1]), rows, 0)
    folder = stores.write(tmp_path / "m", [scores])
    table = analyze_ensemble(
        {"m": folder}, stores.manifest([2], CLASSES), stores.SPLIT, (MetricPlugin(kind="mean_class_error"),)
    ).table
    assert table.get_cell(1, 144).metrics == {"mean_class_error": 50.0}
