"""Decoding no more than a crop needs: the same pixels, and whatever is broken is still found."""

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import rng
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.transforms import decode, random_resized_crop
from orchestrator.data.transforms.decode import Image
from orchestrator.data.transforms.random_resized_crop import DRAWS
from tests.support import tiny_shards

# Sides that are no multiples of 8 or 16, and every chroma layout in use.
LAYOUTS = ["444", "422", "420", "440", "411", "Gray"]


def made(layout: str, width: int = 203, height: int = 157) -> bytes:
    # Enlarged, so that it has about the detail of a photograph.
    small = tiny_shards.picture(3, width // 4 + 1, height // 4 + 1)
    picture = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    if layout == "Gray":
        return bytes(simplejpeg.encode_jpeg(picture[:, :, :1].copy(), colorspace="GRAY", colorsubsampling="Gray"))
    return bytes(simplejpeg.encode_jpeg(picture, quality=92, colorsubsampling=layout))


def part(data: bytes, rows: int, denominator: int = 1, fast: bool = False, is_whole: bool = True) -> Image:
    buffer = bytearray(data)
    found = decode.decode_top_rows(buffer, decode.read_header(buffer), rows, denominator, fast, is_whole).copy()
    assert bytes(buffer) == data, "the image's bytes are as they were"
    return found


def psnr(one: Image, other: Image) -> float:
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


@given(st.sampled_from(LAYOUTS), st.integers(1, 157))
def test_the_rows_asked_for_are_those_of_the_whole_image(layout: str, rows: int) -> None:
    found = part(made(layout), rows)
    whole = decode.decode_image(made(layout))
    assert rows <= len(found) <= min(157, rows + 24)
    assert np.array_equal(found[:rows], whole[:rows])


@given(st.sampled_from(LAYOUTS), st.integers(1, 157), st.sampled_from([1, 2, 4, 8]))
def test_fast_rows_are_those_of_the_whole_image_decoded_fast(layout: str, rows: int, denominator: int) -> None:
    found = part(made(layout), rows, denominator, fast=True)
    whole = part(made(layout), 157, denominator, fast=True)
    asked = min(rows // denominator, len(whole))
    assert asked <= len(found)
    assert np.array_equal(found[:asked], whole[:asked])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_a_reduced_image_is_the_whole_one_made_smaller(layout: str, denominator: int) -> None:
    found = part(made(layout), 80, denominator)
    assert found.shape[1] == -(-203 // denominator)
    whole = decode.decode_image(made(layout)).astype(np.float64)[: 80 // denominator * denominator, :200]
    means = whole.reshape(80 // denominator, denominator, -1, denominator, 3).mean(axis=(1, 3))
    assert psnr(found[: means.shape[0], : means.shape[1]], means) > (35 if layout in ("444", "420", "Gray") else 25)


def test_what_cannot_be_cut_comes_whole() -> None:
    for data in (
        tiny_shards.encoded("RGB", "JPEG", progressive=True),
        tiny_shards.encoded("RGB", "PNG"),
        tiny_shards.encoded("CMYK", "JPEG"),
    ):
        assert np.array_equal(part(data, 5), decode.decode_image(data))


def test_restart_markers_below_the_crop_are_passed_over() -> None:
    data = tiny_shards.encoded("RGB", "JPEG", number=2, restart_marker_rows=1)
    assert b"\xff\xdd" in data, "else this test shows nothing"
    assert np.array_equal(part(data, 5)[:5], decode.decode_image(data)[:5])


@given(st.integers(1, 400))
def test_a_file_that_is_cut_is_found_wherever_the_crop_lies(missing: int) -> None:
    data = made("420")
    cut = data[: len(data) - 2 - missing]
    for rows in (5, 157):
        with pytest.raises(BadSampleError, match="broken JPEG"):
            part(cut, rows)


def test_junk_behind_the_last_row_harms_nothing() -> None:
    data = made("420")
    with_junk = data[:-2] + b"camera notes" + data[-2:]
    assert np.array_equal(decode.decode_image(with_junk), decode.decode_image(data))
    for rows in (5, 157):
        assert np.array_equal(part(with_junk, rows)[:rows], decode.decode_image(data)[:rows])


def test_an_image_too_large_for_the_threads_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_BUFFER_BYTES", 1000)
    data = made("420")
    for encoded in (data, data[:-2] + b"junk" + data[-2:]):
        for rows in (60, 157):
            assert np.array_equal(part(encoded, rows)[:rows], decode.decode_image(data)[:rows])


def test_damage_above_the_last_row_is_found() -> None:
    data = bytearray(made("420"))
    scan = data.index(b"\xff\xda") + 30
    data[scan : scan + 40] = b"\xff\xd9" + bytes(38)
    with pytest.raises(BadSampleError, match="broken JPEG"):
        part(bytes(data), 100)


@given(st.binary(max_size=64), st.integers(0, 200))
def test_any_bytes_are_decoded_or_a_bad_sample(junk: bytes, at: int) -> None:
    data = bytearray(made("420", 40, 30))
    data[at : at + len(junk)] = junk
    try:
        head = decode.read_header(data)
        decode.decode_top_rows(data, head, 10, 1)
    except BadSampleError:
        return


# ------------------------------------------------------------------ crops of encoded images
def crops(data: bytes, number: int, **changes: object) -> tuple[Image, Image]:
    """The same crop from the encoded image and from the whole decoded one."""
    config = AugmentationConfig.from_dict(AugmentationConfig().to_dict() | changes)
    draws = rng.uniform(rng.derive_key(0, "test"), np.array([number]), DRAWS)[0]
    ours, whole = (np.empty((64, 64, 3), dtype=np.uint8) for _ in range(2))
    random_resized_crop.decode_and_crop(bytearray(data), config, draws, ours)
    random_resized_crop.crop_image(decode.decode_image(data), config, draws, whole)
    return ours, whole


@given(st.sampled_from(LAYOUTS), st.integers(0, 10**6))
def test_an_exact_crop_is_that_of_the_whole_image(layout: str, number: int) -> None:
    assert np.array_equal(*crops(made(layout), number, decoding="exact"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fast_crop_is_close_to_it(layout: str) -> None:
    small = [psnr(*crops(made(layout, 120, 100), number)) for number in range(40)]
    assert min(small) > 33
    assert np.mean(small) > 38


def test_large_photos_are_decoded_at_a_reduced_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = decode.decode_top_rows

    def noting(data: bytearray, head: decode.ImageHeader, rows: int, denominator: int, *how: bool) -> Image:
        asked.append(denominator)
        return plain(data, head, rows, denominator, *how)

    monkeypatch.setattr(random_resized_crop, "decode_top_rows", noting)
    data = made("420", 320, 260)
    found = [crops(data, number, interpolations=("area",)) for number in range(30)]
    assert {1, 2, 4} <= set(asked), "as the crop's size allows"
    # The crop lies on whole reduced pixels, up to 7 / 8 of one beside that of the full size.
    assert np.mean([psnr(*pair) for pair in found]) > 25


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_a_reduced_crop_still_has_the_inputs_size(width: int, height: int, size: int) -> None:
    box = (13, 7, width, height)
    by = random_resized_crop.choose_denominator(box, size)
    x, y, w, h = random_resized_crop.reduce_box(box, by, size)
    if by == 1:
        assert (x, y, w, h) == box
    else:
        assert min(w, h) >= size
        for edge, was in ((x, 13), (y, 7), (x + w, 13 + width), (y + h, 7 + height)):
            assert abs(edge * by - was) <= by
        # The reduced image has a pixel for the rest of a side.
        assert x + w <= -(-(13 + width) // by) and y + h <= -(-(7 + height) // by)
