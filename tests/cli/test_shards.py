"""`shards.py pack` without a cluster: what it says and refuses, and its threads, which do what launch.pool does."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import shards
from orchestrator.data import manifest
from orchestrator.data.build import packing, shard_packer
from orchestrator.data.build.config import DigitsSource, FolderSource, IlsvrcSource, PackConfig, ShardLayout, Source
from orchestrator.data.build.sources.digits import pack_digits
from orchestrator.data.data_errors import DataError
from tests.support import imagenet, tiny_shards


def command(source: Source, url: Path | str, **changes: Any) -> PackConfig:
    return PackConfig(source=source, url=str(url), layout=ShardLayout(shard_mib=0.01, min_shards=3)).model_copy(
        update=changes
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> IlsvrcSource:
    return IlsvrcSource(url=str(imagenet.as_it_comes(tmp_path_factory.mktemp("ilsvrc"))))


def small(folder: Path, broken: int) -> FolderSource:
    images = {f"{c}/{n:02d}.jpg": tiny_shards.jpeg(n) for c in "ab" for n in range(10)}
    images |= {f"a/broken{n:02d}.jpg": b"<html>" for n in range(broken)}
    imagenet.write(folder, images.items())
    return FolderSource(url=str(folder), holdout=0.0)


# ------------------------------------------------------------------ packing
def test_a_dry_run_tells_the_plan_and_writes_nothing(
    tars: IlsvrcSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shards.pack_dataset(command(tars, tmp_path / "out", dry_run=True)) == 0
    told = capsys.readouterr().out
    for said in ("ilsvrc2012: 4 classes", "train: 31 images, 0.0 MiB, ", "validation: 10 images"):
        assert said in told
    assert list(tmp_path.iterdir()) == []


def test_threads_pack_what_one_thread_packs(tars: IlsvrcSource, tmp_path: Path) -> None:
    assert shards.pack_dataset(command(tars, tmp_path / "a", at_once=1)) == 0
    assert shards.pack_dataset(command(tars, f"file://{tmp_path}/b", at_once=7)) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_packing_tells_what_it_met_and_is_done_once(
    tars: IlsvrcSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = command(tars, tmp_path)
    assert shards.pack_dataset(config) == 0
    told = capsys.readouterr().out
    for said in ("1 ycck", "1 png-named-jpeg", "1 exif-broken", "images of a class"):
        assert said in told
    before = content(tmp_path)
    assert shards.pack_dataset(config) == 0
    assert f"already packed: {tmp_path}: 31 train images in " in capsys.readouterr().out
    assert content(tmp_path) == before


def test_too_many_broken_images_end_the_packing_until_they_are_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = command(small(tmp_path / "in", 11), tmp_path / "out")
    with pytest.raises(DataError, match=r"max_bad: 11 of the first .* at most 10 may be.*a/broken"):
        shards.pack_dataset(config)
    assert not (tmp_path / "out" / manifest.FILE_NAME).exists()
    assert shards.pack_dataset(config.model_copy(update={"max_bad": 0.5})) == 0
    told = capsys.readouterr().out
    assert "resuming the packing" in told
    assert "left out: a/broken" in told
    assert manifest.load(str(tmp_path / "out")).count_samples("train") == 20


def test_names_that_are_not_utf8_or_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The image is packed or reported like any other, and the dataset can be read."""
    source = small(tmp_path / "in", 0)
    names = {
        "a/\udce9.jpg": tiny_shards.jpeg(60),
        "a/t\udce9.jpg": b"<html>",
        "b/\x1b[31m.jpg": b"<html>",
        "b/x.jp\udce9": b"",
    }
    imagenet.write(tmp_path / "in", names.items())
    assert shards.pack_dataset(command(source, tmp_path / "out")) == 0
    told = capsys.readouterr().out
    assert "left out: a/t_ (a/t\\xe9.jpg): no JPEG or PNG" in told
    assert "left out: b/__31m (b/\\x1b[31m.jpg)" in told
    assert "\x1b" not in told
    assert manifest.load(str(tmp_path / "out")).count_samples("train") == 21
    report = json.loads((tmp_path / "out" / packing.REPORT_NAME).read_text())
    assert [one["source"] for one in report["splits"]["train"]["left_out"]] == ["a/t\\xe9.jpg", "b/\x1b[31m.jpg"]
    assert report["ignored_files"] == {"jp\\xe9": 1}


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", '{"version": 9' + "0" * 5000 + "}", "[]"])
@pytest.mark.parametrize("name", ["plan.json", "done/train-000000.json"])
def test_damaged_records_of_a_packing_are_named(tmp_path: Path, name: str, text: str) -> None:
    config = command(small(tmp_path / "in", 11), tmp_path / "out")
    with pytest.raises(DataError, match="max_bad"):
        shards.pack_dataset(config)
    (tmp_path / "out" / "_packing" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / "_packing" / name).write_text(text)
    with pytest.raises(DataError, match=rf"_packing/{name}: damaged"):
        shards.pack_dataset(config)


def test_a_signal_stops_after_the_shards_under_way_and_the_command_goes_on(
    tars: IlsvrcSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = command(tars, tmp_path / "out", at_once=1)

    def interrupted(raw: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return shard_packer.pack_shard(raw)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "pack_shard", interrupted)
        assert shards.pack_dataset(config) == 128 + signal.SIGINT
    assert "rerun the same command to resume" in capsys.readouterr().out
    assert len(list((tmp_path / "out/_packing/done").iterdir())) == 1
    assert shards.pack_dataset(config) == 0
    assert "1 of " in capsys.readouterr().out
    assert shards.pack_dataset(command(tars, tmp_path / "b")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "b")


def test_digits_are_those_of_the_embedded_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PackConfig(source=DigitsSource(), url=str(tmp_path / "a"))
    assert shards.pack_dataset(config.model_copy(update={"dry_run": True})) == 0
    assert "10 classes, train and validation images" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    assert shards.pack_dataset(config) == 0
    pack_digits(str(tmp_path / "b"))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert shards.pack_dataset(config) == 0
    assert "already packed" in capsys.readouterr().out


def test_digits_overwrite_nothing(tars: IlsvrcSource, tmp_path: Path) -> None:
    shards.pack_dataset(command(tars, tmp_path / "a"))
    imagenet.write(tmp_path / "b", [("_packing/plan.json", (b"{}"))])
    for name, said in (("a", "the dataset 'ilsvrc2012' is there"), ("b", "plan.json: damaged")):
        with pytest.raises(DataError, match=said):
            shards.pack_dataset(PackConfig(source=DigitsSource(), url=str(tmp_path / name)))


# ------------------------------------------------------------------ threads


def never() -> bool:
    return False


def test_each_result_comes_with_its_number() -> None:
    found = list(shards.run_in_threads(lambda x: x * x, [(n,) for n in range(20)], 3, never))
    assert sorted(found) == [(n, n * n) for n in range(20)]


def test_no_more_than_asked_for_are_under_way() -> None:
    lock, running, most = threading.Lock(), 0, 0
    gate = threading.Barrier(3)

    def work(_number: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(10)  # three are needed to go on
        with lock:
            running -= 1

    assert len(list(shards.run_in_threads(work, [(n,) for n in range(9)], 3, never))) == 9
    assert most == 3


def test_a_failure_is_raised_and_nothing_more_begun() -> None:
    began: list[int] = []

    def work(number: int) -> int:
        began.append(number)
        if number == 2:
            raise ValueError("shard 2")
        return number

    with pytest.raises(ValueError, match="shard 2"):
        list(shards.run_in_threads(work, [(n,) for n in range(50)], 1, never))
    assert began == [0, 1, 2]


def test_a_stop_lets_what_runs_end_and_begins_nothing() -> None:
    stopped = threading.Event()
    ended: list[Any] = []

    def work(number: int) -> int:
        if number == 1:
            stopped.set()
        ended.append(number)
        return number

    found = list(shards.run_in_threads(work, [(n,) for n in range(50)], 1, stopped.is_set))
    assert [number for number, _ in found] == ended == [0, 1]
