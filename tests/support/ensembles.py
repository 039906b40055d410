"""An ensemble in storage, as training leaves it: finished members with small random networks."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.support import finals, tiny_shards

# Image size and width of each member: one size is not enough to show that sizes may differ.
MEMBERS = ((16, 0.05), (24, 0.06), (16, 0.05))


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: small networks are slower with a second one, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def members(storage: Path, names: Sequence[str] = ("m1", "m2", "m3"), seed: int = 0) -> list[str]:
    """Write finished runs; return the URLs of their folders."""
    runs = []
    for number, name in enumerate(names):
        size, width = MEMBERS[number % len(MEMBERS)]
        run = storage / "models" / name
        finals.save(run, finals.small(size, width, name), tiny_shards.CLASSES, seed + number)
        (run / "outcome.json").write_text(json.dumps({"status": "finished"}))
        runs.append(str(run))
    return runs


def ensemble(storage: Path, name: str = "tiny-x3", of: Sequence[str] = ("m1", "m2", "m3"), since: float = 0.0) -> Path:
    """Write an ensemble of these runs, with a released lease from `since` (0: without one); return its folder."""
    folder = storage / "ensembles" / name
    folder.mkdir(parents=True)
    (folder / "ensemble.json").write_text(json.dumps({"members": list(of), "recipes": {}}))
    if since:
        (folder / "lease").mkdir()
        owner = {"host": "there", "pid": 1, "job": "", "since": since}
        (folder / "lease" / "000001.json").write_text(json.dumps(owner))
        (folder / "lease" / "000001.released").write_text("")
    return folder
