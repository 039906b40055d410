"""Decoding: ImageNet's oddities become RGB, everything else a BadSampleError, bombs before a pixel is decoded."""

import struct
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.transforms.decode import MAX_ASPECT, Image, decode_image
from tests.support.tiny_shards import encoded, jpeg, picture


def resized_header(data: bytes, width: int, height: int) -> bytes:
    """The JPEG with other dimensions in its frame header."""
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", height, width) + data[frame + 4 :]


def far(one: Image, other: Image) -> float:
    return float(np.abs(one.astype(float) - other).mean())


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [("RGB", "JPEG", {"quality": 95}), ("RGB", "JPEG", {"quality": 95, "progressive": True}),
     ("CMYK", "JPEG", {"quality": 95}), ("RGB", "PNG", {}), ("RGBA", "PNG", {})],
)  # fmt: skip
def test_colours_come_as_rgb(mode: str, form: str, options: dict[str, Any]) -> None:
    image = decode_image(encoded(mode, form, **options))
    assert image.shape == (30, 40, 3)
    assert image.dtype == np.uint8
    assert far(image, picture(0)) < 6
    assert far(image[:, :, ::-1], picture(0)) > 15, "not BGR"


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_grey_is_spread_over_three_channels(form: str) -> None:
    image = decode_image(encoded("L", form))
    assert image.shape == (30, 40, 3)
    assert (image == image[:, :, :1]).all()
    assert image.std() > 5


def test_exif_orientation_is_ignored_for_every_format() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for mode, form in (("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG")):
        turned, plain = decode_image(encoded(mode, form, exif=exif)), decode_image(encoded(mode, form))
        assert np.array_equal(turned, plain), (mode, form)


def test_broken_exif_does_no_harm() -> None:
    data = jpeg(0)
    exif = b"Exif\0\0MM\0\x2a" + b"\xff" * 8
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + data[2:]
    assert np.array_equal(decode_image(broken), decode_image(data))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"hello", b"\x89PNG\r\n\x1a\n", encoded("P", "GIF")[:10]])
def test_no_image(data: bytes) -> None:
    with pytest.raises(BadSampleError):
        decode_image(data)


@pytest.mark.parametrize(("mode", "form"), [("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "PNG")])
def test_a_cut_image_is_bad_wherever_it_is_cut(mode: str, form: str) -> None:
    data = encoded(mode, form)
    for share in (0.1, 0.5, 0.75, 0.95):
        with pytest.raises(BadSampleError):
            decode_image(data[: int(len(data) * share)])


PNG = encoded("RGB", "PNG")
OVERSIZE = {
    "jpeg": resized_header(jpeg(0), 60_000, 60_000),
    "cmyk": resized_header(encoded("CMYK", "JPEG"), 60_000, 60_000),
    "png": PNG[:16] + struct.pack(">II", 60_000, 60_000) + PNG[24:],
}


def never(*_arguments: object, **_named: object) -> None:
    pytest.fail("pixels were decoded")


@pytest.mark.parametrize("kind", list(OVERSIZE))
def test_an_oversize_header_is_an_error_before_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    monkeypatch.setattr(cv2, "imdecode", never)
    with pytest.raises(BadSampleError, match="got 60000 x 60000; scale"):
        decode_image(OVERSIZE[kind])


def test_a_strip_that_test_crops_would_enlarge_too_much_is_an_error() -> None:
    assert decode_image(jpeg(0, 8, 8 * MAX_ASPECT)).shape == (800, 8, 3)
    for width, height in ((8, 801), (801, 8)):
        with pytest.raises(BadSampleError, match=f"got {width} x {height}[ ;]"):
            decode_image(jpeg(0, width, height))


@given(st.data())
@settings(max_examples=150)
def test_damage_gives_an_image_or_a_bad_sample_and_nothing_else(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from([jpeg(1), encoded("CMYK", "JPEG"), PNG, encoded("L", "JPEG")]))
    damaged = bytearray(source)
    for where in data.draw(st.lists(st.integers(0, len(source) - 1), min_size=1, max_size=4)):
        damaged[where] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(damaged))
    except BadSampleError:
        return
    assert image.shape[2:] == (3,)
    assert image.dtype == np.uint8
