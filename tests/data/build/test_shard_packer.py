"""Findings about odd and broken images, before and while they are decoded."""

from contextlib import closing

import numpy as np
import pytest

from orchestrator.data.build import shard_packer
from orchestrator.data.build.config import ShardLayout
from orchestrator.data.build.shard_packer import reencode_image
from orchestrator.data.build.sources.listing import ImageRow
from orchestrator.data.transforms import decode
from orchestrator.storage.ranged_reads import RangeReader
from tests.support import imagenet, pictures, tiny_shards


@pytest.mark.parametrize("kind", sorted(imagenet.odd()))
def test_each_oddity_is_seen_and_the_image_kept_to_the_byte(kind: str) -> None:
    image = imagenet.odd()[kind]
    packed = reencode_image(image, "n02105855_2933.JPEG", ShardLayout())
    assert (packed.oddities, packed.defect) == ((kind,), "")
    assert packed.image == image
    assert packed.extension == ("png" if kind == "png-named-jpeg" else "jpg")


def test_a_plain_image_is_not_odd() -> None:
    finding = shard_packer.inspect_image(tiny_shards.jpeg(1, 40, 30), "a.jpg")
    assert finding == shard_packer.PackedImage("jpg", 40, 30)


def test_oddities_add_up() -> None:
    assert shard_packer.inspect_image(tiny_shards.encoded("L", "JPEG", progressive=True), "a.png").oddities == (
        "grey",
        "progressive",
        "jpeg-named-png",
    )
    assert shard_packer.inspect_image(tiny_shards.encoded("L", "PNG"), "a.jpg").oddities == ("grey", "png-named-jpeg")
    assert shard_packer.inspect_image(tiny_shards.encoded("L", "PNG"), "a.png").oddities == ("grey",)


@pytest.mark.parametrize(
    ("image", "defect", "said"),
    [(b"", "empty", "0 bytes"),
     (b"GIF89a" + bytes(4), "undecodable", "GIF: its header cannot be read"),
     (b"<html>", "no-image", "no JPEG or PNG"),
     (imagenet.bomb(), "too-large", "got 65000 x 65000; scale it down"),
     (tiny_shards.jpeg(0, 2000, 8), "too-large", "got 2000 x 8 pixels; crop it"),
     (b"\x89PNG\r\n\x1a\n" + bytes(4), "undecodable", "ends inside its header"),
     (b"\xff\xd8\xff\xe0", "undecodable", ""),
     (tiny_shards.jpeg(0, 100, 100)[:900], "undecodable", "broken JPEG"),
     (tiny_shards.encoded("RGB", "PNG")[:-20], "undecodable", "broken PNG: its chunk IDAT")],
)  # fmt: skip
def test_each_defect_is_reported(image: bytes, defect: str, said: str) -> None:
    packed = reencode_image(image, "a.JPEG", ShardLayout())
    assert packed.defect == defect
    assert said in packed.reason
    assert packed.image == b""


def test_without_decoding_only_headers_are_looked_at() -> None:
    cut = tiny_shards.jpeg(0, 100, 100)[:900]
    assert reencode_image(cut, "a.jpg", ShardLayout(decode=False)).image == cut
    assert reencode_image(imagenet.bomb(), "a.jpg", ShardLayout(decode=False)).defect == "too-large"


@pytest.mark.parametrize(
    "data", [b"", b"XX", b"MM\0*", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01" + b"\xff" * 12]
)
def test_exif_that_cannot_be_read_is_broken(data: bytes) -> None:
    assert shard_packer.inspect_image(imagenet.exif(data), "a.jpg").oddities == ("exif-broken",)


@pytest.mark.parametrize(("orientation", "met"), [(0, ()), (1, ()), (3, ("exif-rotated",)), (9, ("exif-broken",))])
def test_orientation(orientation: int, met: tuple[str, ...]) -> None:
    assert shard_packer.inspect_image(imagenet.oriented(orientation), "a.jpg").oddities == met


def test_every_prefix_and_every_flipped_byte_of_a_header_gives_a_finding() -> None:
    image = imagenet.oriented(6)
    header = image.index(b"\xff\xda")  # of the scan, whose pixels follow
    outcomes = set()
    for position in range(0, header, 3):
        cut = shard_packer.inspect_image(image[:position], "a.jpg")
        assert cut.defect and cut.reason, position
        flipped = bytearray(image)
        flipped[position] ^= 0xFF
        packed = reencode_image(bytes(flipped), "a.jpg", ShardLayout())
        assert packed.image in (b"", bytes(flipped)), position
        outcomes.add(bool(packed.image))
    assert outcomes == {True, False}, "some flips spoil the image, others do not"


# ------------------------------------------------------------------ reducing
def test_only_larger_images_are_reduced() -> None:
    large, small = tiny_shards.jpeg(1, 90, 60), tiny_shards.jpeg(1, 32, 30)
    packed = reencode_image(large, "a.png", ShardLayout(resize=30, quality=90))
    assert (packed.is_resized, packed.width) == (True, 90)
    again = shard_packer.inspect_image(packed.image, "a.jpg")
    assert (again.width, again.height) == (45, 30)
    assert reencode_image(small, "a.jpg", ShardLayout(resize=30)).image == small
    assert reencode_image(large, "a.jpg", ShardLayout(resize=30, quality=90)).image == packed.image, (
        "the same each time"
    )


def test_an_image_that_would_be_reduced_is_decoded_in_any_case() -> None:
    packed = reencode_image(tiny_shards.jpeg(0, 100, 100)[:900], "a.jpg", ShardLayout(resize=30, decode=False))
    assert packed.defect == "undecodable"


def test_an_image_of_too_many_bytes_is_not_even_read() -> None:
    row = ImageRow("a", "a.jpg", 0, 0, 2**40)
    with closing(RangeReader(1)) as ranges:
        packed = shard_packer.read_packed(row, "/nowhere", False, ShardLayout(), ranges)
    assert packed.defect == "too-large"


# ------------------------------------------------------------------ formats and transparency
@pytest.mark.parametrize(
    ("image", "defect"),
    [(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), "heic"),
     (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(90), "avif"),
     (b"\xff\x0a" + bytes(90), "jpeg-xl"), (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90), "jpeg-xl"),
     (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90), "jpeg-2000"), (b"<svg xmlns='x'/>", "svg")],
)  # fmt: skip
def test_formats_that_are_not_decoded_are_named(image: bytes, defect: str) -> None:
    finding = reencode_image(image, "a.jpg", ShardLayout())
    assert finding.defect == defect
    assert finding.reason.endswith("convert it to JPEG or PNG")


@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("decodes", [True, False])
def test_other_formats_become_pngs_of_the_same_pixels(form: str, decodes: bool) -> None:
    image = tiny_shards.encoded("RGB", form, number=3)
    packed = reencode_image(image, "a.jpg", ShardLayout(decode=decodes))
    assert (packed.extension, packed.oddities) == ("png", (form.lower(),))
    assert np.array_equal(decode.decode_image(packed.image), decode.decode_image(image))
    assert reencode_image(image, "a.jpg", ShardLayout(decode=decodes)) == packed, "the same bytes each time"


def test_transparency_is_noted_and_the_bytes_are_kept() -> None:
    pixels = tiny_shards.picture(1)
    image = pictures.png(np.dstack((pixels, pixels[:, :, 0])), 6, 8)
    for treatment in (ShardLayout(), ShardLayout(decode=False)):
        assert reencode_image(image, "a.png", treatment).oddities == ("transparent",)
        assert reencode_image(image, "a.png", treatment).image == image
    opaque = pictures.png(np.dstack((pixels, np.full(pixels.shape[:2], 255))), 6, 8)
    assert reencode_image(opaque, "a.png", ShardLayout()).oddities == ()
    reduced = reencode_image(image, "a.png", ShardLayout(resize=20))
    assert (reduced.is_resized, reduced.oddities) == (True, ("transparent",))
