"""Kinds of pictures that people have: which are taken, with which pixels, and which are bad within bounds."""

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from itertools import product

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image as Pillow

from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.transforms import decode, image_format
from tests.support import pictures, tiny_shards

PLAIN = tiny_shards.encoded("RGB", "JPEG", number=2, quality=90)


def taken(data: bytes, is_whole: bool = False) -> bool:
    """Return whether the part of an image that a training crop needs can be decoded."""
    try:
        head = decode.read_header(data)
        decode.decode_top_rows(bytearray(data), head, 8, 1, fast=True, is_whole=is_whole)
    except BadSampleError:
        return False
    return True


def whole(data: bytes) -> bool:
    try:
        decode.decode_image(data)
    except BadSampleError:
        return False
    return True


# ------------------------------------------------------------------ JPEG: layouts of chroma
def layouts() -> list[tuple[tuple[int, int], ...]]:
    """All sampling factors of three components that a scan may hold, the two of chroma alike; and grey."""
    pairs = list(product(range(1, 5), range(1, 5)))
    colour = [(luma, chroma, chroma) for luma in pairs for chroma in pairs]
    grey: list[tuple[tuple[int, int], ...]] = [(pair,) for pair in pairs]
    return grey + [one for one in colour if sum(h * v for h, v in one) <= 10]


def test_every_layout_that_libjpeg_decodes_is_taken() -> None:
    count = 0
    for factors in layouts():
        data = pictures.flat_jpeg(factors)
        try:
            expected = np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB"))
        except OSError:  # fractions of pixels, which libjpeg does not have
            assert not whole(data), factors
            continue
        assert np.array_equal(decode.decode_image(data), expected), factors
        assert taken(data), factors
        assert not whole(data[:-4]) or len(factors) == 1, f"{factors}: cut"
        count += 1
    assert count > 47


@pytest.mark.parametrize("error", [KeyError(6), IndexError("x"), RuntimeError("x"), MemoryError(), OverflowError("x")])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_whatever_a_decoder_raises_is_a_bad_sample(
    form: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    monkeypatch.setattr(cv2, "imdecode", fail)
    monkeypatch.setattr(Pillow, "open", fail)
    data = tiny_shards.encoded("RGB", form)
    assert not whole(data)
    assert not taken(data)


# ------------------------------------------------------------------ JPEG: what is whole
@pytest.mark.parametrize("change", pictures.HARMLESS, ids=lambda change: change.__name__)
def test_harmless_faults_change_no_pixel_and_hide_no_damage(change: Callable[[bytes], bytes]) -> None:
    odd = change(PLAIN)
    assert odd != PLAIN
    assert np.array_equal(decode.decode_image(odd), decode.decode_image(PLAIN))
    for is_whole in (False, True):
        buffer = bytearray(odd)
        part = decode.decode_top_rows(buffer, decode.read_header(buffer), 30, 2, fast=True, is_whole=is_whole).copy()
        plain = bytearray(PLAIN)
        assert np.array_equal(part, decode.decode_top_rows(plain, decode.read_header(plain), 30, 2, fast=True))
        assert bytes(buffer) == odd
    for share in (0.6, 0.8, 0.97):
        cut = odd[: int(len(odd) * share)]
        assert not whole(cut)
        assert not whole(cut + b"\xff\xd9"), "with an end mark behind the cut"


def test_harmless_faults_add_up() -> None:
    odd = PLAIN
    for change in pictures.HARMLESS:
        odd = change(odd)
    assert np.array_equal(decode.decode_image(odd), decode.decode_image(PLAIN))


@pytest.mark.parametrize("colours", ["RGB", "L", "CMYK", "YCCK"])
@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"progressive": True}])
def test_cut_jpegs_of_all_colours_are_bad(colours: str, options: dict[str, int]) -> None:
    data = tiny_shards.encoded("CMYK" if colours == "YCCK" else colours, "JPEG", number=3, **options)
    if colours == "YCCK":
        at = data.index(b"Adobe") + 11
        data = data[:at] + b"\2" + data[at + 1 :]
    assert whole(data)
    for share in (0.5, 0.75, 0.9):
        for end in (b"", b"\xff\xd9"):
            cut = data[: int(len(data) * share)] + end
            # A progressive image that ends between two scans, with its end mark, is an image of fewer scans.
            assert not whole(cut) or (options.get("progressive") and end), (share, end)
            assert taken(cut) == whole(cut)


def test_inks_become_the_colours_that_opencv_makes_of_them() -> None:
    data = tiny_shards.encoded("CMYK", "JPEG", number=4)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    assert expected is not None
    assert np.array_equal(decode.decode_image(data), expected)


@pytest.mark.parametrize("restart", [0, 1])
def test_a_part_and_the_whole_agree_on_damage(restart: int) -> None:
    data = tiny_shards.encoded("RGB", "JPEG", number=5, quality=92, restart_marker_rows=restart)
    chance, bad = random.Random(restart), 0
    for _ in range(400):
        damaged, at = bytearray(data), chance.randrange(2, len(data))
        if chance.random() < 0.5:
            damaged[at] ^= 1 << chance.randrange(8)
        else:
            del damaged[at : at + chance.randrange(1, 60)]
        assert taken(bytes(damaged)) == whole(bytes(damaged))
        bad += not whole(bytes(damaged))
    assert bad > 40, "else this test shows little"


# ------------------------------------------------------------------ bounds
@pytest.mark.parametrize(
    ("data", "said"),
    [(pictures.many_scans(9_900, 9_900, 33), "33 scans"), (pictures.many_scans(40, 30, 501), "501 scans"),
     (pictures.many_scans(9_900, 9_900, 33, components=3, frame=0xC0), "33 scans"),
     (pictures.many_scans(9_900, 9_900, 33, components=3, frame=0xC9), "33 scans"),
     (pictures.many_scans(40, 30, 20_000), "10000 scans")],
)  # fmt: skip
def test_too_many_scans_are_an_error_before_decoding(data: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("pixels were decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    monkeypatch.setattr(Pillow, "open", never)
    with pytest.raises(decode.ImageTooLargeError, match=f"{said}.*save it again"):
        decode.decode_image(data)


def test_a_jpeg_of_millions_of_segments_ends_early() -> None:
    comments = pictures.segment(0xFE, b"")
    assert whole(PLAIN[:2] + comments * 1_000 + PLAIN[2:])
    with pytest.raises(BadSampleError, match="in its first segments"):
        decode.read_header(PLAIN[:2] + comments * 20_000 + PLAIN[2:])


def test_scans_of_thumbnails_and_of_what_follows_the_image_do_not_count() -> None:
    data = tiny_shards.encoded("RGB", "JPEG", progressive=True)
    thumbnails = pictures.segment(0xE1, b"Exif\0\0" + b"\xff\xda" * 1000)
    assert whole(data[:2] + thumbnails + data[2:] + b"\xff\xda\0\4\0\0" * 1000)


LYING = """
import resource, sys
from orchestrator.data.transforms import decode, image_format
from orchestrator.data.data_errors import BadSampleError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20,) * 2)
try:
    decode.decode_image(sys.stdin.buffer.read())
except BadSampleError as error:
    print(error)
"""


@pytest.mark.process
@pytest.mark.parametrize("length", [2**30, 2**31 - 1, 2**32 - 1])
def test_a_chunk_longer_than_its_file_is_never_allocated(length: int) -> None:
    data = pictures.lying_length(tiny_shards.encoded("RGB", "PNG"), length)
    done = subprocess.run([sys.executable, "-c", LYING], input=data, capture_output=True, timeout=60, check=True)
    assert f"IDAT at byte 33 has {length} bytes by its header" in done.stdout.decode()


def test_a_png_of_millions_of_chunks_ends_early() -> None:
    data = tiny_shards.encoded("RGB", "PNG")
    with pytest.raises(BadSampleError, match="more than 100000 chunks"):
        decode.read_header(data[:33] + pictures.chunk(b"teXt", b"") * 100_001 + data[33:])


def test_a_png_whose_data_unpacks_to_far_more_than_its_pixels() -> None:
    plain = tiny_shards.encoded("RGB", "PNG")
    at = plain.index(b"IDAT") - 4
    end = plain.index(b"IEND") - 4
    # The whole image, then bytes that do not pack: as many packed ones may unpack to a thousand times as many.
    surplus = zlib.decompress(plain[at + 8 : end - 4]) + np.random.default_rng(0).bytes(3 * 2**20)
    data = plain[:at] + pictures.chunk(b"IDAT", zlib.compress(surplus)) + plain[end:]
    with pytest.raises(BadSampleError, match=r"its data unpacks to more than \d+ bytes, far more than 40 x 30 pixels"):
        decode.decode_image(data)


def test_of_several_transparent_levels_of_a_png_the_first_counts() -> None:
    levels = np.arange(30 * 40).reshape(30, 40) % 4
    data = pictures.png(levels, 0, 8, transparent=struct.pack(">H", 1))
    at = data.index(b"IDAT") - 4
    again = pictures.chunk(b"tRNS", struct.pack(">H", 2)) * 3
    several = data[:at] + again + data[at:]
    assert image_format.read_png(several) == image_format.read_png(data)
    assert np.array_equal(decode.decode_image(several), decode.decode_image(data))


def test_a_large_png_is_taken_in_one_chunk_or_in_many() -> None:
    image = np.random.default_rng(0).integers(0, 256, (600, 500, 3), dtype=np.uint8)
    data = pictures.png(image, 2, 8)
    at, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    body = data[at + 8 : end - 4]
    assert len(body) > 800_000
    parts = b"".join(pictures.chunk(b"IDAT", body[start : start + 9_999]) for start in range(0, len(body), 9_999))
    for whole in (data, data[:at] + parts + data[end:]):
        assert np.array_equal(decode.decode_image(whole), image)


@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_have_the_same_bounds(form: str) -> None:
    with pytest.raises(decode.ImageTooLargeError, match="801 x 8 pixels"):
        decode.decode_image(tiny_shards.encoded("RGB", form, width=801, height=8))


def test_a_bitmap_that_claims_too_much() -> None:
    data = bytearray(tiny_shards.encoded("RGB", "BMP"))
    data[18:26] = struct.pack("<ii", 60_000, 60_000)
    with pytest.raises(BadSampleError):
        decode.decode_image(bytes(data))


# ------------------------------------------------------------------ transparency
RGB = tiny_shards.picture(6, 40, 30)
ALPHA = np.linspace(0, 255, 30 * 40).reshape(30, 40).round().astype(np.uint8)
OPAQUE = np.full_like(ALPHA, 255)


def on_white(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    share = alpha[:, :, None] / 255
    return (rgb * share + 255 * (1 - share) + 0.5).astype(np.uint8)


def spread(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def transparent_kinds() -> dict[str, tuple[bytes, NDArray[np.uint8]]]:
    """Encoded images, and what they look like on white."""
    rgba = np.dstack((RGB, ALPHA))
    grey = RGB[:, :, 0]
    deep = rgba.astype(np.uint16) * 257
    levels = np.arange(30 * 40).reshape(30, 40) % 4
    palette = RGB[0, :4]
    found = {
        "rgba": (pictures.png(rgba, 6, 8), on_white(RGB, ALPHA)),
        "rgba16": (pictures.png(deep, 6, 16), on_white(RGB, ALPHA)),
        "grey-alpha": (pictures.png(np.dstack((grey, ALPHA)), 4, 8), on_white(spread(grey), ALPHA)),
        "grey-alpha16": (pictures.png(deep[:, :, [0, 3]], 4, 16), on_white(spread(grey), ALPHA)),
        "palette": (
            pictures.png(levels, 3, 2, transparent=bytes([0, 128]), palette=palette.tobytes()),
            on_white(palette[levels], np.array([0, 128, 255, 255], dtype=np.uint8)[levels]),
        ),
    }
    for bits in (1, 2, 4, 8, 16):
        values = (grey >> 8 - bits).astype(np.uint16) if bits < 16 else deep[:, :, 0]
        shown = (values * (255 // (2**bits - 1))).astype(np.uint8) if bits < 16 else grey
        key = int(values[3, 3])
        alpha = np.where(values == key, 0, 255).astype(np.uint8)
        data = pictures.png(values, 0, bits, transparent=struct.pack(">H", key))
        found[f"grey-key{bits}"] = data, on_white(spread(shown), alpha)
    for bits in (8, 16):
        values = RGB.astype(np.uint16) if bits == 8 else deep[:, :, :3]
        alpha = np.where((RGB[3, 3] == RGB).all(axis=2), 0, 255).astype(np.uint8)
        data = pictures.png(values, 2, bits, transparent=struct.pack(">HHH", *values[3, 3].tolist()))
        found[f"rgb-key{bits}"] = data, on_white(RGB, alpha)
    for form, options in (("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        buffer = io.BytesIO()
        Pillow.fromarray(rgba).save(buffer, form, **options)
        found[form] = buffer.getvalue(), on_white(RGB, ALPHA)
    return found


@pytest.mark.parametrize("kind", list(transparent_kinds()))
def test_transparent_images_are_laid_on_white(kind: str) -> None:
    data, expected = transparent_kinds()[kind]
    assert decode.is_transparent(data)
    assert np.abs(decode.decode_image(data).astype(int) - expected).max() <= 1
    buffer = bytearray(data)
    assert np.array_equal(decode.decode_top_rows(buffer, decode.read_header(buffer), 5, 1), decode.decode_image(data))


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    for data in (pictures.png(np.dstack((RGB, OPAQUE)), 6, 8), pictures.png(RGB, 2, 8), PLAIN):
        assert not decode.is_transparent(data)
    assert np.array_equal(decode.decode_image(pictures.png(np.dstack((RGB, OPAQUE)), 6, 8)), RGB)


# ------------------------------------------------------------------ PNG: what is whole
def test_chunks_that_make_no_pixel_do_no_harm() -> None:
    data = pictures.png(RGB, 2, 8)
    text = struct.pack(">I", 5) + b"tEXta\0bcd" + bytes(4)  # its checksum is wrong
    animated = pictures.chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    for odd in (data[:33] + text + data[33:], data[:33] + animated + data[33:], data[:-12], data + b"junk" * 50):
        assert np.array_equal(decode.decode_image(odd), RGB)


def test_a_png_cut_anywhere_before_its_end_mark_is_bad() -> None:
    for data in (pictures.png(RGB, 2, 8), pictures.png(np.dstack((RGB, ALPHA)), 6, 8)):
        for length in range(8, len(data) - 13, 7):
            assert not whole(data[:length]), length


# ------------------------------------------------------------------ other formats
@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_other_formats_have_the_pixels_that_pillow_decodes(form: str, mode: str) -> None:
    data = tiny_shards.encoded("RGB" if (form, mode) == ("WEBP", "P") else mode, form)
    expected = np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode.decode_image(data), expected)
    buffer = bytearray(data)
    assert np.array_equal(decode.decode_top_rows(buffer, decode.read_header(buffer), 5, 1), expected)


@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_cut_are_bad(form: str) -> None:
    data = tiny_shards.encoded("RGB", form)
    for share in (0.05, 0.3, 0.6, 0.9):
        assert not whole(data[: int(len(data) * share)]), share


def test_what_conversion_would_change_is_bad() -> None:
    deep = io.BytesIO()
    Pillow.fromarray(np.zeros((30, 40), dtype=np.float32)).save(deep, "TIFF")
    raw = io.BytesIO()
    Pillow.fromarray(RGB).save(raw, "TIFF", tiffinfo={254: 1})
    with pytest.raises(BadSampleError, match="TIFF of kind 'F'"):
        decode.decode_image(deep.getvalue())
    with pytest.raises(BadSampleError, match="reduced copy"):
        decode.decode_image(raw.getvalue())


def test_an_opaque_image_of_another_format_is_not_decoded_to_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    Pillow.new("RGB", (9, 7)).save(data, "BMP")
    monkeypatch.setattr(Pillow.Image, "convert", None)
    assert not decode.is_transparent(data.getvalue())
