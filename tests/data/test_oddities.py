"""What is said of odd and of broken images, before and while they are decoded."""

import pytest

from orchestrator.data import oddities
from orchestrator.data.shard_packing import Treatment, treated
from tests.support import imagenet, shards


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
     (imagenet.bomb(), "too-large", "65000 x 65000 pixels is refused"),
     (shards.jpeg(0, 2000, 8), "too-large", "2000 x 8 pixels is refused"),
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
