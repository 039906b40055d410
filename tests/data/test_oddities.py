"""What is said of odd and of broken images, before and while they are decoded."""

import numpy as np
import pytest

from orchestrator.data import decode, oddities
from orchestrator.data.shard_packing import Treatment, treated
from tests.support import imagenet, pictures, shards


@pytest.mark.parametrize("kind", sorted(imagenet.odd()))
def test_each_oddity_is_seen_and_the_image_kept_to_the_byte(kind: str) -> None:
    image = imagenet.odd()[kind]
    packed = treated(image, "n02105855_2933.JPEG", Treatment())
    assert (packed.finding.oddities, packed.finding.defect) == ((kind,), None)
    assert packed.image == image
    assert packed.finding.extension == ("png" if kind == "png-named-jpeg" else "jpg")


def test_a_plain_image_is_not_odd() -> None:
    finding = oddities.inspect(shards.jpeg(1, 40, 30), "a.jpg")
    assert finding == oddities.Finding("jpg", 40, 30)


def test_oddities_add_up() -> None:
    assert oddities.inspect(shards.encoded("L", "JPEG", progressive=True), "a.png").oddities == (
        "grey",
        "progressive",
        "jpeg-named-png",
    )
    assert oddities.inspect(shards.encoded("L", "PNG"), "a.jpg").oddities == ("grey", "png-named-jpeg")
    assert oddities.inspect(shards.encoded("L", "PNG"), "a.png").oddities == ("grey",)


@pytest.mark.parametrize(
    ("image", "defect", "said"),
    [(b"", "empty", "0 bytes"),
     (b"GIF89a" + bytes(4), "undecodable", "GIF: its header cannot be read"),
     (b"<html>", "no-image", "no JPEG or PNG"),
     (imagenet.bomb(), "too-large", "got 65000 x 65000; scale it down"),
     (shards.jpeg(0, 2000, 8), "too-large", "got 2000 x 8 pixels; crop it"),
     (b"\x89PNG\r\n\x1a\n" + bytes(4), "undecodable", "ends inside its header"),
     (b"\xff\xd8\xff\xe0", "undecodable", ""),
     (shards.jpeg(0, 100, 100)[:900], "undecodable", "broken JPEG"),
     (shards.encoded("RGB", "PNG")[:-20], "undecodable", "broken PNG: its chunk IDAT")],
)  # fmt: skip
def test_each_defect_is_told(image: bytes, defect: str, said: str) -> None:
    packed = treated(image, "a.JPEG", Treatment())
    assert packed.finding.defect == defect
    assert said in packed.finding.reason
    assert packed.image == b""


def test_without_decoding_only_headers_are_looked_at() -> None:
    cut = shards.jpeg(0, 100, 100)[:900]
    assert treated(cut, "a.jpg", Treatment(decode=False)).image == cut
    assert treated(imagenet.bomb(), "a.jpg", Treatment(decode=False)).finding.defect == "too-large"


@pytest.mark.parametrize(
    "data", [b"", b"XX", b"MM\0*", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01" + b"\xff" * 12]
)
def test_exif_that_cannot_be_read_is_broken(data: bytes) -> None:
    assert oddities.inspect(imagenet.exif(data), "a.jpg").oddities == ("exif-broken",)


@pytest.mark.parametrize(("orientation", "met"), [(0, ()), (1, ()), (3, ("exif-rotated",)), (9, ("exif-broken",))])
def test_orientation(orientation: int, met: tuple[str, ...]) -> None:
    assert oddities.inspect(imagenet.oriented(orientation), "a.jpg").oddities == met


def test_every_prefix_and_every_flipped_byte_of_a_header_is_survived() -> None:
    image = imagenet.oriented(6)
    for cut in range(0, 700, 3):
        oddities.inspect(image[:cut], "a.jpg")
        flipped = bytearray(image)
        flipped[cut] ^= 0xFF
        treated(bytes(flipped), "a.jpg", Treatment())


# ------------------------------------------------------------------ reducing
def test_only_larger_images_are_reduced() -> None:
    large, small = shards.jpeg(1, 90, 60), shards.jpeg(1, 32, 30)
    packed = treated(large, "a.png", Treatment(resize=30, quality=90))
    assert (packed.is_resized, packed.finding.width) == (True, 90)
    again = oddities.inspect(packed.image, "a.jpg")
    assert (again.width, again.height) == (45, 30)
    assert treated(small, "a.jpg", Treatment(resize=30)).image == small
    assert treated(large, "a.jpg", Treatment(resize=30, quality=90)).image == packed.image, "the same each time"


def test_an_image_that_would_be_reduced_is_decoded_in_any_case() -> None:
    packed = treated(shards.jpeg(0, 100, 100)[:900], "a.jpg", Treatment(resize=30, decode=False))
    assert packed.finding.defect == "undecodable"


def test_an_image_of_too_many_bytes_is_not_even_read() -> None:
    assert oddities.too_many_bytes(2**40) is not None
    assert oddities.too_many_bytes(2**20) is None


# ------------------------------------------------------------------ formats and transparency
@pytest.mark.parametrize(
    ("image", "defect"),
    [(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), "heic"),
     (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(90), "avif"),
     (b"\xff\x0a" + bytes(90), "jpeg-xl"), (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90), "jpeg-xl"),
     (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90), "jpeg-2000"), (b"<svg xmlns='x'/>", "svg")],
)  # fmt: skip
def test_formats_that_are_not_decoded_are_named(image: bytes, defect: str) -> None:
    finding = treated(image, "a.jpg", Treatment()).finding
    assert finding.defect == defect
    assert finding.reason.endswith("convert it to JPEG or PNG")


@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("decodes", [True, False])
def test_other_formats_become_pngs_of_the_same_pixels(form: str, decodes: bool) -> None:
    image = shards.encoded("RGB", form, number=3)
    packed = treated(image, "a.jpg", Treatment(decode=decodes))
    assert (packed.finding.extension, packed.finding.oddities) == ("png", (form.lower(),))
    assert np.array_equal(decode.decode(packed.image), decode.decode(image))
    assert treated(image, "a.jpg", Treatment(decode=decodes)) == packed, "the same bytes each time"


def test_transparency_is_noted_and_the_bytes_are_kept() -> None:
    pixels = shards.picture(1)
    image = pictures.png(np.dstack((pixels, pixels[:, :, 0])), 6, 8)
    for treatment in (Treatment(), Treatment(decode=False)):
        assert treated(image, "a.png", treatment).finding.oddities == ("transparent",)
        assert treated(image, "a.png", treatment).image == image
    opaque = pictures.png(np.dstack((pixels, np.full(pixels.shape[:2], 255))), 6, 8)
    assert treated(opaque, "a.png", Treatment()).finding.oddities == ()
    reduced = treated(image, "a.png", Treatment(resize=20))
    assert (reduced.is_resized, reduced.finding.oddities) == (True, ("transparent",))
