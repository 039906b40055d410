"""jobs/shards.py as a person runs it: help, plans, packing, a kill in the middle, and a real Ray."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.data import manifest
from tests.support import imagenet
from tests.support.launched import ROOT, Ended, job

pytestmark = pytest.mark.process

SMALL = ("--shard-mib", "0.01", "--min-shards", "3")


def run(tmp_path: Path, *arguments: str, status: int = 0, **changes: str) -> Ended:
    done = job("shards.py", *arguments, runs=tmp_path / "runs", seconds=180, **changes)
    assert done.status == status, done.out + done.err
    return done


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(imagenet.as_it_comes(tmp_path_factory.mktemp("ilsvrc")))


@pytest.fixture(scope="module")
def packed(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the dataset that one process packed."""
    folder = tmp_path_factory.mktemp("packed")
    done = run(folder, "pack", "ilsvrc", "--source.url", source, "--url", str(folder / "out"), *SMALL)
    assert "packed: " in done.out
    return folder / "out"


# ------------------------------------------------------------------ help and usage errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "pack"), (("--help",), "usage: shards.py COMMAND"), (("pack", "--help"), "ilsvrc"),
     (("pack", "ilsvrc", "--help"), "--source.devkit")],
)  # fmt: skip
def test_help_explains_commands_and_sources(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in run(tmp_path, *arguments).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("pakc",), "did you mean pack"), (("pack", "folder", "--source.holdout", "2"), "holdout"),
     (("pack", "digits", "--url", "/x", "--seed", "1"), "packed one way only"),
     (("pack", "folder", "--source.url", "/x", "--url", "y"), "relative path")],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_status_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run(tmp_path, *arguments, status=2)
    assert len(done.complaints) == 1, done.err
    assert message in done.complaints[0]


# ------------------------------------------------------------------ killed
STUCK = """
import runpy, sys, threading
from pathlib import Path
from orchestrator.storage import file_io

real = file_io.write_bytes

def write(url, data):
    if url.endswith("/train-000003.tar"):
        Path(url).with_name(".tmp-half").write_bytes(data[: len(data) // 2])
        print("STUCK", flush=True)
        threading.Event().wait()
    real(url, data)

file_io.write_bytes = write
sys.argv = ["shards.py", *sys.argv[2:]]
runpy.run_path(PATH, run_name="__main__")
"""


def test_a_killed_packing_resumes_to_the_same_bytes(packed: Path, source: str, tmp_path: Path) -> None:
    place = ("pack", "ilsvrc", "--source.url", source, "--url", str(tmp_path / "out"), *SMALL, "--at-once", "1")
    code = STUCK.replace("PATH", repr(str(ROOT / "jobs/shards.py")))
    child = subprocess.Popen(
        [sys.executable, "-c", code, "-", *place], stdout=subprocess.PIPE, text=True, cwd="/", env=dict(os.environ)
    )
    try:
        assert child.stdout is not None
        lines = iter(child.stdout.readline, "")
        assert any(line == "STUCK\n" for line in lines)
    finally:
        child.kill()
        child.wait(30)
        assert child.stdout is not None
        child.stdout.close()
    out = tmp_path / "out"
    assert not (out / manifest.FILE_NAME).exists()
    assert len(list((out / "_packing/done").iterdir())) == 3
    first = {path: path.stat().st_mtime_ns for path in (out / "train").glob("train-*.tar")}
    done = run(tmp_path, *place)
    assert "resuming the packing" in done.out
    assert "3 of " in done.out
    assert {path: path.stat().st_mtime_ns for path in first} == first, "finished shards are not packed again"
    assert content(out) == content(packed)


# ------------------------------------------------------------------ on a cluster
HEAD = """
import sys, ray
from orchestrator.ray_backend.ray_env import make_temp_dir
options = dict(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
ray.init(address="local", _temp_dir=make_temp_dir(), **options)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Yield the address of a Ray that ends with the block."""
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/",
    )
    try:
        assert head.stdout is not None
        yield head.stdout.readline().strip()
    finally:
        head.communicate(timeout=60)


@pytest.mark.cluster
def test_tasks_on_a_cluster_pack_the_same_bytes(packed: Path, source: str, tmp_path: Path) -> None:
    place = ("pack", "ilsvrc", "--source.url", source, *SMALL)
    with ray_cluster() as address:
        done = run(tmp_path, *place, "--url", str(tmp_path / "out"), RAY_ADDRESS=address)
        assert "shards by tasks on 1 node(s)" in done.out
        assert content(tmp_path / "out") == content(packed)
