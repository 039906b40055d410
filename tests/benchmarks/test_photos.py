"""The photos that the benchmarks run on have the sizes and counts that they claim."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from benchmarks import fidelity, photos
from orchestrator.data import manifest


def test_cut_outs_differ_and_are_the_same_for_the_same_number() -> None:
    pictures = [photos.cut_out(number) for number in range(12)]
    assert {picture.shape for picture in pictures} == {(375, 500, 3)}
    assert len({picture.tobytes() for picture in pictures}) == 12
    assert (pictures[5] == photos.cut_out(5)).all()


@pytest.mark.parametrize("number", [0, 1])
def test_large_pictures_are_large(number: int) -> None:
    assert photos.large_picture(number).shape == (1500, 2000, 3)


def test_copies_have_other_keys_and_a_packed_set_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "SMALL", 6)
    monkeypatch.setattr(photos, "PER_SHARD", 4)
    url = photos.small(str(tmp_path), copies=2)
    packed = manifest.load(url)
    assert photos.counts(packed) == (4, 4, 4)
    images = photos.images(url)
    assert images[:6] == images[6:] and len(set(images)) == 6
    assert simplejpeg.decode_jpeg_header(images[0]) == (375, 500, "YCbCr", "420")
    written = (tmp_path / "small-2" / "manifest.json").stat().st_mtime_ns
    assert photos.small(str(tmp_path), copies=2) == url
    assert (tmp_path / "small-2" / "manifest.json").stat().st_mtime_ns == written


def test_psnr() -> None:
    black = np.zeros((2, 2, 3), dtype=np.uint8)
    assert fidelity.decibels(black, black) == fidelity.SAME
    assert fidelity.decibels(black, black + np.uint8(255)) == 0
    assert 48.0 < fidelity.decibels(black, black + np.uint8(1)) < 48.2


def test_psnr_of_crops_is_high_against_the_same_crop_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "SMALL", 64)
    url = photos.small(str(tmp_path))
    decibels = {figure.name: figure.value for figure in fidelity.figures("data", url, 32, lambda _: "small")}
    assert {name.split(".")[3] for name in decibels} <= {"area", "bilinear", "cubic", "nearest"}
    assert all(value > 30 for value in decibels.values()), decibels
    monkeypatch.setattr(fidelity, "draw_crop_box", lambda *_: (0, 0, 224, 224))
    others = [figure for figure in fidelity.figures("data", url, 32, lambda _: "small") if "median" in figure.name]
    assert all(figure.value < 30 for figure in others), others
