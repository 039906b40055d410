from pathlib import Path

import numpy as np
import pytest

from benchmarks import join
from orchestrator.data import manifest
from orchestrator.data.manifest import Manifest, Shard
from tests.support import stores


def test_a_small_store_is_analysed_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHARDS": 2, "IMAGES": 30, "CLASSES": 12, "MODELS": 2}.items():
        monkeypatch.setattr(join, name, value)
    shards = tuple(Shard(name=f"{number}.tar", samples=30, bytes=0, sha256="", index_sha256="") for number in range(2))
    classes = tuple(f"class {number}" for number in range(12))
    manifest.save(str(tmp_path), Manifest(name="made", classes=classes, splits={join.SPLIT: shards}))
    for model in range(2):
        for shard in range(2):
            join.save(str(tmp_path), model, shard)
    result = join.joined(str(tmp_path), 0.0)
    assert set(result["errors"]) == {"1x1", "1x10", "1x144", "2x1", "2x10", "2x144"}
    assert result["seconds"] > result["analysis"] + result["report"] > 0


def test_made_models_are_alike_but_not_the_same() -> None:
    first, repeated, second = (join.scores(model, 0, 40, 20) for model in (0, 0, 1))
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(stores.get_mean(first, 144), stores.get_mean(repeated, 144))
    assert 0.5 < np.corrcoef(stores.get_mean(first, 144).ravel(), stores.get_mean(second, 144).ravel())[0, 1] < 1
    np.testing.assert_allclose(stores.get_mean(first, 1).sum(axis=1), 1, rtol=1e-5)
