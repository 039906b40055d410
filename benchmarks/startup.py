"""From submitting a one-worker run to its first step, split by cause, against Ray's defaults: `make bench-startup`.

Ray's defaults are a plain script, ray.init() and TorchTrainer.fit(), in an environment without our switches, whose
training function makes the same network's first step on the same data. Both are timed from the start of their process,
on a cluster that they start themselves and on one that is up. The split is seen from outside: titles of processes and
files of the run.

`python -m benchmarks.startup [RUNS_FOLDER]` instead reads the leases and journals of runs that are there, finished in
their first attempt, and prints for each the seconds of start, training and end. Nothing is run.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import frame
from benchmarks.frame import Figure
from orchestrator.data.build.sources import digits
from orchestrator.tracking import journal
from tests.drills import stage
from tests.support.launched import ROOT, process_tree, title

ROUNDS = 3
START_SECONDS = 120.0
LOOK_SECONDS = 0.05
GOAL = 0.6
# Our process of one worker, and what each mark of a start ends; the last one is the first step. Ray's defaults have one
# more mark, the controller's process before the worker's.
CAUSES = {
    "lease": "driver_ray_preflight",  # imports of the driver, Ray's init, checks
    "worker": "placement_and_worker_actor",
    "attempt": "worker_imports_and_group",
    "started": "dataset_build_resume",
    "step": "first_step",
}
Marks = dict[str, float]  # mark: seconds since the process was started


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-startup`."""
    data = Path(folder) / "startup-data"
    digits.pack_digits(str(data))
    yield from _compared("own_cluster", Path(folder), data, os.environ, os.getpid())
    with stage.cluster() as cluster:
        yield from _compared("on_cluster", Path(folder), data, cluster.environment, cluster.pid)


def _compared(where: str, folder: Path, data: Path, environment: Mapping[str, str], ancestor: int) -> Iterator[Figure]:
    found: dict[str, list[Marks]] = {"ours": [], "plain": []}
    for turn in range(ROUNDS):
        starts: dict[str, Callable[[Path], Marks]] = {
            "ours": lambda place: _ours(place, data, environment, ancestor),
            "plain": lambda place: _plain(place, data, environment, ancestor),
        }
        for name in list(starts)[:: 1 if turn % 2 == 0 else -1]:
            place = folder / f"startup-{where}-{turn}-{name}"
            place.mkdir()
            found[name].append(starts[name](place))
            marks = ", ".join(f"{mark} {seconds:.1f}" for mark, seconds in found[name][-1].items())
            frame.progress(f"{where}, round {turn + 1} of {ROUNDS}: {name}: {marks}")
    before = 0.0
    for mark, cause in CAUSES.items():
        reached = median(marks[mark] for marks in found["ours"])
        yield Figure(f"startup.{where}.{cause}_s", reached - before)
        before = reached
    for mark in ("controller", "worker"):
        yield Figure(f"startup.{where}.plain.until_{mark}_s", median(marks[mark] for marks in found["plain"]))
    steps = {name: [marks["step"] for marks in rows] for name, rows in found.items()}
    for name, seconds in steps.items():
        yield Figure(f"startup.{where}.{name}_s", median(seconds))
    yield Figure(f"startup.{where}.ours/plain", frame.ratio(steps["ours"], steps["plain"]), at_most=GOAL)


def _ours(place: Path, data: Path, environment: Mapping[str, str], ancestor: int) -> Marks:
    command = [
        str(ROOT / "jobs" / "train.py"), "googlenet-tiny", f"--data={data}", f"--storage={place}",
        "--cadence.pulse-steps=1", "--cadence.log-steps=1",
    ]  # fmt: skip

    def files() -> Marks:
        marks: Marks = {}
        for run in (place / "models").glob("*"):
            for mark, name in (("lease", "lease/000001.json"), ("attempt", "attempts/000001.json")):
                if (run / name).exists():
                    marks[mark] = (run / name).stat().st_mtime
            events, _ = journal.read_events(str(run / "journal"))
            for mark, kind in (("started", "started"), ("step", "metrics")):
                marks.update((mark, event.time) for event in events[::-1] if event.kind == kind)
        return marks

    return _watched(command, place, environment, ancestor, files)


def _plain(place: Path, data: Path, environment: Mapping[str, str], ancestor: int) -> Marks:
    mark = place / "stepped"
    # Token and silence as ours: they cost nothing, and Ray would write a token of its own into the user's home.
    closed = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    bare = closed | {name: value for name, value in environment.items() if not name.startswith("RAY_TRAIN")}

    def files() -> Marks:
        return {"step": mark.stat().st_mtime} if mark.exists() else {}

    return _watched(["-m", "benchmarks.startup", "--plain", str(data), str(place)], place, bare, ancestor, files)


def _watched(
    words: list[str], place: Path, environment: Mapping[str, str], ancestor: int, files: Callable[[], Marks]
) -> Marks:
    """Start a driver, wait for its first step, end it; its marks."""
    began = time.time()
    with open(place / "driver.log", "wb") as log:
        driver = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**environment, "ORCHESTRATOR_RUNS": str(place)}, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    marks: Marks = {}
    try:
        while "step" not in marks:
            if driver.poll() is not None or time.time() - began > START_SECONDS:
                said = (place / "driver.log").read_text(errors="replace")[-500:]
                raise RuntimeError(f"{' '.join(words)}: no first step; status {driver.poll()}: {said}")
            for pid in process_tree(ancestor):
                for mark, name in (("controller", "TrainController"), ("worker", stage.WORKER)):
                    if mark not in marks and name in title(pid):
                        marks[mark] = time.time()
            marks |= files()
            time.sleep(LOOK_SECONDS)
    finally:
        _end(driver, ancestor)
    return {mark: moment - began for mark, moment in sorted(marks.items(), key=lambda item: item[1])}


def _end(driver: subprocess.Popen[bytes], ancestor: int) -> None:
    """End a driver, and its private cluster or its workers; both are of no use any more."""
    below = process_tree(driver.pid)
    for pid in below:
        stage.send(pid, signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + START_SECONDS
    while any("TrainController" in title(pid) or stage.WORKER in title(pid) for pid in process_tree(ancestor)):
        assert time.monotonic() < deadline, "the workers of a killed driver are still there"
        time.sleep(LOOK_SECONDS)


# ------------------------------------------------------------------ Ray's defaults
def plain(data: str, place: str) -> None:
    """Run what a user of Ray writes: init, fit, and in the training function the first step of the same run."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from orchestrator.ray_backend.ray_env import make_temp_dir

    # Without an address Ray would look for a cluster that somebody left behind.
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address=address, _temp_dir=make_temp_dir() if address == "local" else None)
    TorchTrainer(
        plain_loop,
        train_loop_config={"data": data, "mark": f"{place}/stepped"},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="plain", storage_path=place),
    ).fit()


def plain_loop(config: dict[str, Any]) -> None:
    """The first step of googlenet-tiny as one writes it in torch: its network, its data, torch's own SGD."""
    import ray.train.torch
    import torch
    from torch.nn import functional

    from orchestrator.data import manifest
    from orchestrator.data.dataloader import BatchLoader
    from orchestrator.data.dataset import SampleReader
    from orchestrator.data.sampler import EpochOrder
    from orchestrator.models.registry import create_model
    from orchestrator.recipe.presets import googlenet_tiny

    device, recipe, found = ray.train.torch.get_device(), googlenet_tiny(), manifest.load(config["data"])
    counts = tuple(shard.samples for shard in found.shards("train"))
    model = ray.train.torch.prepare_model(create_model(recipe.model, len(found.classes), recipe.seeds.weights))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    loader = BatchLoader(SampleReader(config["data"], found, "train"), recipe.model.image_size, 1)
    plan = EpochOrder(counts, recipe.seeds.order, 0, recipe.order.lanes, recipe.order.window)
    seed = recipe.seeds.augmentation
    for batch in loader.iter_training(plan, recipe.augmentation, seed, recipe.batch_size, range(1)):
        logits = model(batch.images.to(device).float())
        loss = functional.cross_entropy(logits.main, batch.labels.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        float(loss)
    Path(config["mark"]).touch()
    loader.close()
    time.sleep(START_SECONDS)  # until it is ended from outside, as ours is


# ------------------------------------------------------------------ runs that are there
def main() -> int:
    """Print a line for each run and the medians; the exit status."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ORCHESTRATOR_RUNS", "runs")).resolve()
    rows = {folder.name: row for folder in sorted((root / "models").glob("*")) if (row := measured(folder)) is not None}
    if not rows:
        print(f"{root}: no run that finished in its first attempt", file=sys.stderr)
        return 1
    print(f"{'run':42} {'start s':>8} {'train s':>8} {'end s':>8}")
    for name, row in rows.items():
        print(f"{name:42} " + " ".join(f"{seconds:8.1f}" for seconds in row))
    medians = (median(column) for column in zip(*rows.values(), strict=True))
    print(f"{'median':42} " + " ".join(f"{seconds:8.1f}" for seconds in medians))
    return 0


def measured(folder: Path) -> tuple[float, float, float] | None:
    """Seconds of start, training and end of a run; None when it did not finish in its first attempt."""
    lease, released = folder / "lease" / "000001.json", folder / "lease" / "000001.released"
    if not released.exists() or (folder / "attempts" / "000002.json").exists():
        return None
    events, _ = journal.read_events(str(folder / "journal"))
    times = {event.kind: event.time for event in events}
    if "finished" not in times:
        return None
    return (
        times["started"] - lease.stat().st_mtime,
        times["finished"] - times["started"],
        released.stat().st_mtime - times["finished"],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        plain(*sys.argv[2:])
        sys.exit()
    raise SystemExit(main())
