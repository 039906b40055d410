"""Leases, runs and ensembles in storage, as drivers leave them, for tests of their readers."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

from orchestrator.ray_backend.lease import LeaseOwner
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.storage import file_io
from orchestrator.training.run_dir import get_attempts_dir

ELSEWHERE = LeaseOwner("another-host", 1, "raysubmit_abc", time.time() - 3600)


def lease(
    folder: str, owner: LeaseOwner = ELSEWHERE, number: int = 1, beat: float | None = None, **kinds: bytes
) -> str:
    """Write a lease, a heartbeat that is `beat` seconds old, and files of other kinds; return their common stem."""
    stem = file_io.join(folder, "lease", f"{number:06d}")
    file_io.write_bytes(stem + ".json", json.dumps(asdict(owner)).encode())
    if beat is not None:
        beats(stem, beat)
    for kind, data in kinds.items():
        file_io.write_bytes(f"{stem}.{kind}", data)
    return stem


def beats(stem: str, ago: float = 0.0) -> None:
    """Write a heartbeat."""
    file_io.write_bytes(stem + ".beat", json.dumps({"time": time.time() - ago}).encode())


def begun(spec: RunSpec) -> str:
    """Write a run that was launched; return its folder."""
    file_io.write_bytes(file_io.join(spec.folder, "spec.json"), spec.to_json().encode())
    return spec.folder


def attempt(folder: str, number: int = 1, samples: int | None = None, ago: float = 0.0, began: float = 60.0) -> None:
    """Write an attempt that began `began` seconds ago, and its last heartbeat."""
    stem = file_io.join(get_attempts_dir(folder), f"{number:06d}")
    now = time.time()
    file_io.write_bytes(stem + ".json", json.dumps({"workers": 2, "time": now - began, "elapsed": 0.0}).encode())
    if samples is not None:
        file_io.write_bytes(stem + ".beat", json.dumps({"time": now - ago, "samples": samples}).encode())


def ensemble(storage: str, name: str, members: Sequence[RunSpec]) -> str:
    """Write an ensemble's record; return its folder."""
    folder = file_io.join(storage, "ensembles", name)
    recipes = {spec.name: spec.recipe.to_dict() for spec in members}
    about = {"members": list(recipes), "recipes": recipes}
    file_io.write_bytes(file_io.join(folder, "ensemble.json"), json.dumps(about).encode())
    return folder


def sweep(storage: str, name: str) -> str:
    """Write a sweep's record; return its folder, the storage of its trials."""
    folder = file_io.join(storage, "sweeps", name)
    file_io.write_bytes(file_io.join(folder, "sweep.json"), b"{}")
    return folder


def trial(folder: str, number: int, spec: RunSpec, ended: str = "", reason: str = "") -> None:
    """Write the record of a sweep's trial, and of its end if there is one."""
    stem = file_io.join(folder, "trials", f"{number:04d}")
    file_io.write_bytes(stem + ".json", json.dumps({"number": number, "recipe": spec.recipe.to_dict()}).encode())
    if ended:
        file_io.write_bytes(stem + ".ended.json", json.dumps({"state": ended, "reason": reason}).encode())
