"""Jobs on names that terminals and locales stumble over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.launched import job

pytestmark = pytest.mark.process

CLASSES = ("Äpfel [red]", "犬 [bold]", ":car:", "a.b@c")  # names of classes must have no control characters
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PRINTING: tuple[dict[str, str], ...] = (ASCII, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C.UTF-8"})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(pixels).save(folder / "images" / name / f"Bild ü[x]{number}.jpg")
    (folder / "images" / CLASSES[1] / "kaputt é[b]\x1b[2J.jpg").write_bytes(b"\xff\xd8\xffno")
    done = job(
        "shards.py", "pack", "folder", "--source.url", str(folder / "images"), "--source.holdout", "0.3",
        "--url", str(folder / "packed"), runs=folder / "runs", PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert (done.status, done.err) == (0, "")
    assert "left out: " in done.out and "[b]" in done.out and "\x1b" not in done.out
    return folder


@pytest.mark.parametrize("locale", PRINTING, ids="+".join)
def test_no_job_stumbles_over_a_name_or_a_locale(locale: dict[str, Any], packed: Path) -> None:
    data, runs = str(packed / "packed"), packed / "runs"
    calls = [
        ("shards.py", "verify", "--url", data),
        ("simulate.py", "googlenet-tiny", "--batch-size", "8", "--data", data, "--out", str(packed / "out")),
        ("train.py", "googlenet-tiny", "--batch-size", "8", "--data", data, "--dry-run"),
        ("train.py", "googlenet-tiny", "--help"),
        ("status.py",),
    ]
    for call in calls:
        done = job(*call, runs=runs, **locale)
        assert done.status == 0, (call, done.err)
        assert "Traceback" not in done.err
        assert "\x1b" not in done.out + done.err
    for call in (("audit.py", "rün[/x]\x1b[2J"), ("stop.py", "rün[/x]"), ("predict.py", str(packed / "ü.jpg"))):
        done = job(*call, runs=runs, **locale)
        assert done.status in (1, 2), (call, done.err)
        assert len(done.complaints) == 1 and ": error: " in done.err, done.err
        assert "\x1b" not in done.out + done.err
