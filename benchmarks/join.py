"""The analysis and report of seven models on 50,000 images of 1,000 classes, from a store of made scores, in a fresh
process: seconds from its start, imports included, and its peak memory. Making the store is not counted.

Scores are softmaxes of noisy logits: the true class stands above noise that is partly that of the image, shared by all
models, partly the model's own, partly the crops', less with more crops. The scales are set so that errors come out
near the paper's. The store takes 5.6 GB of disk; it was written just before, so most of it is read from the system's
memory, where there is room for it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import frame
from benchmarks.frame import Figure
from orchestrator.data import manifest
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms import multi_crop
from orchestrator.ensemble.report import ensemble_report
from orchestrator.evaluation import analysis, score_store
from orchestrator.evaluation.score_store import Scores
from tests.support import stores

MODELS, CLASSES = 7, 1000
SHARDS, IMAGES = 40, 1250
STORE_BYTES = int(1.05 * MODELS * SHARDS * IMAGES * CLASSES * score_store.NUM_ROWS * 2)
SPLIT, SEED, REPEATS, CORES = "validation", 7, 3, 2
ABOVE, SPREAD = 8.5, 2.2  # how far the true class stands above the noise: mean and standard deviation over images
OF_IMAGE, OF_MODEL, OF_CROPS = 1.6, 0.6, {1: 0.7, 10: 0.55, 144: 0.25}  # standard deviations of the noise
OF_SCALE = 0.4


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-join`."""
    free = shutil.disk_usage(folder).free
    if free < STORE_BYTES:
        raise RuntimeError(
            f"the made store needs {STORE_BYTES / 1e9:.1f} GB; the disk of {folder} has {free / 1e9:.1f}"
        )
    with tempfile.TemporaryDirectory(dir=folder) as made:
        started = time.perf_counter()
        frame.progress(f"making the scores of {MODELS} models: minutes")
        store(made)
        yield Figure("join.making_the_store_s", time.perf_counter() - started)
        with frame.pinned(frame.cores(CORES)):
            found = [frame.child("join", made, time.time()) for _ in range(REPEATS)]
    for part in ("imports", "analysis", "report"):
        yield Figure(f"join.{part}_s", max(one[part] for one in found))
    yield Figure("join.seconds", max(one["seconds"] for one in found), at_most=60)
    yield Figure("join.peak_mb", max(one["peak_mb"] for one in found), at_most=4000)
    for name, value in found[0]["errors"].items():
        yield Figure(f"join.made_top5_error_{name}", value)


# ------------------------------------------------------------------ the made store
def store(folder: str) -> None:
    """The made dataset's manifest and the scores of all models, below a folder."""
    shards = tuple(
        Shard(name=f"{SPLIT}/{number:05d}.tar", samples=IMAGES, bytes=0, sha256="", index_sha256="")
        for number in range(SHARDS)
    )
    classes = tuple(f"class {number}" for number in range(CLASSES))
    manifest.save(folder, Manifest(name="made", classes=classes, splits={SPLIT: shards}))
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(save, folder, model, shard) for shard in range(SHARDS) for model in range(MODELS)]
        for task in tasks:
            task.result()


def scored(folder: str) -> dict[str, str]:
    """The models of a made store, and their folders."""
    return {f"m{model}": os.path.join(folder, f"m{model}") for model in range(MODELS)}


def save(folder: str, model: int, shard: int) -> None:
    """Commit what a model scores on a shard."""
    stores.save_shard(scored(folder)[f"m{model}"], shard, scores(model, shard, IMAGES, CLASSES))


def scores(model: int, shard: int, images: int, classes: int) -> Scores:
    """Return the scores of a made model on a made shard."""
    of_image, own = np.random.default_rng([SEED, shard]), np.random.default_rng([SEED, shard, 1 + model])
    labels = of_image.integers(classes, size=images)
    logits = OF_IMAGE * of_image.standard_normal((images, classes), dtype=np.float32)
    logits[np.arange(images), labels] += (ABOVE + SPREAD * of_image.standard_normal(images)).astype(np.float32)
    logits += OF_MODEL * own.standard_normal(logits.shape, dtype=np.float32)
    noises = [*OF_CROPS.values(), *[OF_SCALE] * len(multi_crop.PAPER_SCALES), OF_CROPS[1]]
    rows = [_softmax(logits + noise * own.standard_normal(logits.shape, dtype=np.float32)) for noise in noises]
    ids = shard * images + np.arange(images)
    return Scores(ids, labels, np.stack(rows, axis=1), 0)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = odds / odds.sum(axis=1, keepdims=True)
    return shares


# ------------------------------------------------------------------ in a process of its own
def joined(folder: str, started: float) -> dict[str, Any]:
    """Seconds since `started` and peak memory of this process after analysis and report, and the errors found."""
    imported = time.time()
    found = analysis.analyze_ensemble(scored(folder), manifest.load(folder), SPLIT)
    analysed = time.time()
    assert found.table.images == SHARDS * IMAGES, found.table
    curves = {name: [(epoch, 100 / (1 + epoch)) for epoch in range(1, 251)] for name in found.member_names}
    with tempfile.TemporaryDirectory() as scratch:
        ensemble_report.write_report(scratch, {"ensemble": "made"}, found, curves)
    reported_at = time.time()
    return {
        "imports": imported - started,
        "analysis": analysed - imported,
        "report": reported_at - analysed,
        "seconds": reported_at - started,
        "peak_mb": frame.memory("VmHWM") * 2**20 / 1e6,
        "errors": {f"{cell.models}x{cell.crops}": cell.top5_error for cell in found.table.cells},
    }


if __name__ == "__main__":
    print(json.dumps(joined(sys.argv[1], float(sys.argv[2]))))
