"""Formats of images, identified by their first bytes: names of files are often wrong."""

from __future__ import annotations

from typing import Literal, get_args

EncodedImage = bytes | bytearray | memoryview

# JPEG and PNG may be stored in a dataset; the others are decoded from single files and when they are packed.
DecodableFormat = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff"]
# Identified only so that a message can say what to convert.
UnsupportedFormat = Literal["heic", "avif", "jpeg-xl", "jpeg-2000", "psd", "svg", "pdf"]

DECODABLE_FORMATS: tuple[DecodableFormat, ...] = get_args(DecodableFormat)
UNSUPPORTED_FORMATS: tuple[UnsupportedFormat, ...] = get_args(UnsupportedFormat)
FORMAT_NAMES: dict[str, str] = {
    "jpeg": "JPEG", "png": "PNG", "webp": "WebP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "heic": "HEIC",
    "avif": "AVIF", "jpeg-xl": "JPEG XL", "jpeg-2000": "JPEG 2000", "psd": "Photoshop (PSD)", "svg": "SVG",
    "pdf": "PDF",
}  # fmt: skip
# Extensions of files of formats that are not decoded.
UNSUPPORTED_EXTENSIONS: dict[str, UnsupportedFormat] = {
    "heic": "heic", "heif": "heic", "hif": "heic", "avif": "avif", "jxl": "jpeg-xl", "jp2": "jpeg-2000",
    "j2k": "jpeg-2000", "psd": "psd", "svg": "svg", "pdf": "pdf",
}  # fmt: skip
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_SIGNATURES: tuple[tuple[bytes, DecodableFormat | UnsupportedFormat], ...] = (
    (b"\xff\xd8\xff", "jpeg"), (PNG_SIGNATURE, "png"), (b"GIF87a", "gif"), (b"GIF89a", "gif"), (b"BM", "bmp"),
    (b"II*\0", "tiff"), (b"MM\0*", "tiff"), (b"\xff\x0a", "jpeg-xl"), (b"\0\0\0\x0cJXL ", "jpeg-xl"),
    (b"\0\0\0\x0cjP  ", "jpeg-2000"), (b"\xff\x4f\xff\x51", "jpeg-2000"), (b"8BPS", "psd"), (b"<svg", "svg"),
    (b"%PDF", "pdf"),
)  # fmt: skip
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def identify_format(data: EncodedImage) -> DecodableFormat | UnsupportedFormat | None:
    """Return the format of an encoded image; None when it is unknown."""
    begin = bytes(data[:16])
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return "webp"
    if begin[4:8] == b"ftyp":
        brand = begin[8:12]
        return "avif" if brand in _AVIF_BRANDS else "heic" if brand in _HEIC_BRANDS else None
    return next((name for first, name in _SIGNATURES if begin.startswith(first)), None)
