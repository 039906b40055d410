"""Formats of images, by their first bytes since names are often wrong, and the segments of JPEGs and chunks of PNGs.

libjpeg reports only the first problem that it meets. So that a harmless one hides no damage behind it,
`remove_harmless` takes those out that real cameras write; whatever libjpeg then reports is damage.
The chunks of a PNG are checked against the bytes that are there before a decoder allocates what they promise.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from orchestrator.data.data_errors import BadSampleError

EncodedImage = bytes | bytearray | memoryview

# JPEG and PNG may be stored in a dataset; the others are decoded from single files and when they are packed.
DecodableFormat = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff"]
# Identified only so that a message can say what to convert.
UnsupportedFormat = Literal["heic", "avif", "jpeg-xl", "jpeg-2000", "psd", "svg", "pdf"]

DECODABLE_FORMATS: tuple[DecodableFormat, ...] = get_args(DecodableFormat)
UNSUPPORTED_FORMATS: tuple[UnsupportedFormat, ...] = get_args(UnsupportedFormat)
FORMAT_NAMES: dict[str, str] = {
    name: name.upper().replace("-", " ") for name in DECODABLE_FORMATS + UNSUPPORTED_FORMATS
}
FORMAT_NAMES |= {"webp": "WebP", "psd": "Photoshop (PSD)"}
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
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def identify_format(data: EncodedImage) -> DecodableFormat | UnsupportedFormat | None:
    """Return the format of an encoded image; None when it is unknown."""
    begin = bytes(data[:16])
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return "webp"
    if begin[4:8] == b"ftyp":
        brand = begin[8:12]
        return "avif" if brand in (b"avif", b"avis") else "heic" if brand in _HEIC_BRANDS else None
    return next((name for first, name in _SIGNATURES if begin.startswith(first)), None)


SOS, EOI = 0xDA, 0xD9
PROGRESSIVE_MARKERS = (0xC2, 0xC6, 0xCA, 0xCE)
_FRAME_MARKERS = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_BASELINE_MARKERS = (0xC0, 0xC1)
_STANDALONE_MARKERS = (0x01, *range(0xD0, 0xD9))  # markers without a length
# Encoders write some hundreds of segments at most; a file of millions must not cost seconds of Python.
_MAX_SEGMENTS = 10_000
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_AFTER_ENTROPY = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # no stuffed byte, no restart marker
_SCAN_PARAMETERS = b"\0\x3f\0"  # the only ones of a sequential file


@dataclass(slots=True)
class JpegSegments:
    """Facts from before the first scan of a JPEG; zeros and None where they are not there."""

    frame_marker: int = 0
    width: int = 0
    height: int = 0
    components: int = 0
    height_offset: int = 0  # byte of the height field of a baseline frame
    scan_offset: int = 0  # byte of the first scan's marker
    is_single_scan: bool = False
    adobe_transform: int | None = None  # colour transform
    exif_span: tuple[int, int] | None = None  # bytes from and up to
    harmless_spans: list[tuple[int, int, bytes]] = field(default_factory=list)  # from, up to, what should be there


def read_segments(data: EncodedImage) -> JpegSegments:
    """Return what the segments before the first scan say, as far as they can be read."""
    segments, at = JpegSegments(), 2
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, at)
        if match is None:
            break
        marker, body = data[match.end() - 1], match.end() + 2
        if match.start() > at and bytes(data[at : match.start()]).strip(b"\xff"):
            segments.harmless_spans.append((at, match.start(), b""))  # junk between two segments
        if marker in _STANDALONE_MARKERS:
            at = match.end()
            continue
        if marker == EOI or body > len(data):
            break
        at = match.end() + max(2, int.from_bytes(data[match.end() : body], "big"))
        if marker in _FRAME_MARKERS and not segments.frame_marker and at - body >= 6 and body + 6 <= len(data):
            segments.frame_marker = marker
            segments.height, segments.width, segments.components = struct.unpack_from(">HHB", data, body + 1)
            segments.height_offset = body + 1 if marker in _BASELINE_MARKERS else 0
        elif marker == SOS:
            segments.scan_offset = match.start()
            if at <= len(data) and at - body >= 4 and segments.frame_marker not in PROGRESSIVE_MARKERS:
                segments.is_single_scan = data[body] == segments.components
                is_odd = data[at - 3 : at] != _SCAN_PARAMETERS  # some cameras leave them empty
                segments.harmless_spans += [(at - 3, at, _SCAN_PARAMETERS)] if is_odd else []
            break
        elif marker == 0xE0 and at - body >= 7 and data[body : body + 5] == b"JFIF\0" and data[body + 5] != 1:
            segments.harmless_spans.append((body + 5, body + 6, b"\1"))  # another version of JFIF
        elif marker == 0xE1 and segments.exif_span is None and data[body : body + 5] == b"Exif\0":
            segments.exif_span = body + 6, min(at, len(data))
        elif marker == 0xEE and at - body >= 12 and data[body : body + 5] == b"Adobe" and body + 11 < len(data):
            segments.adobe_transform = data[body + 11]
    return segments


def remove_harmless(data: EncodedImage, segments: JpegSegments) -> bytes:
    """Return a copy without what is harmless: junk between segments, empty SOS parameters, another version of JFIF."""
    parts, at = [], 0
    for start, stop, instead in segments.harmless_spans:
        parts += [bytes(data[at:start]), instead]
        at = stop
    return b"".join((*parts, bytes(data[at:])))


def count_scans(data: EncodedImage, segments: JpegSegments) -> int:
    """Return the number of scans up to the end of the image, without decoding them; _MAX_SEGMENTS when it is more."""
    scans, at = 0, segments.scan_offset
    for _ in range(_MAX_SEGMENTS):
        match = _AFTER_ENTROPY.search(data, at)
        if match is None or data[match.end() - 1] == EOI:
            return scans
        scans += data[match.end() - 1] == SOS
        at = match.end() + max(2, int.from_bytes(data[match.end() : match.end() + 2], "big"))
    return _MAX_SEGMENTS


_CHUNK_HEAD = struct.Struct(">I4s")  # length, type
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_ONCE = (b"PLTE", b"tRNS")  # of several the first counts; libpng warns of each other one
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
# Encoders write IDAT chunks of 8 KiB and more; a file of millions of empty ones must not cost seconds of Python.
_MAX_CHUNKS = 100_000
_GRAY, _GRAY_ALPHA, _RGBA = 0, 4, 6  # colour types
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Deflate packs a thousand bytes into one: unpacking this much data costs libpng a few seconds at most.
_MOST_UNCHECKED = 512 * 2**10
_PIECE = 16 * 2**10  # bytes that are unpacked at a time


class PngInfo(NamedTuple):
    """Header of a PNG, and the chunks that make its pixels."""

    width: int
    height: int
    bit_depth: int  # of a channel
    color_type: int
    trns: bytes | None  # body of its tRNS chunk
    pixels: bytes  # a PNG of nothing but the chunks that decide on pixels

    @property
    def is_gray(self) -> bool:
        """True if it has no colours."""
        return self.color_type in (_GRAY, _GRAY_ALPHA)

    @property
    def has_alpha(self) -> bool:
        """True if some of its pixels may be transparent."""
        return self.color_type in (_GRAY_ALPHA, _RGBA) or self.trns is not None


def read_png(data: EncodedImage) -> PngInfo:
    """Return the parts of a PNG. Raises BadSampleError when a chunk's length exceeds the file, or it has no pixels.

    Text, profiles, animation and whatever follows the end mark are left out: they decide on no pixel, and decoders have
    allocated too much for them, or given up on their checksums.
    """
    at, parts, transparent, header = len(PNG_SIGNATURE), [PNG_SIGNATURE], None, b""
    seen = set[bytes]()
    for _ in range(_MAX_CHUNKS):
        if at + _CHUNK_HEAD.size > len(data):
            break
        length, kind = _CHUNK_HEAD.unpack_from(data, at)
        if kind == b"IEND":
            break
        end = at + 12 + length
        if end > len(data):
            raise BadSampleError(
                f"broken PNG: its chunk {kind.decode('ascii', 'backslashreplace')} at byte {at} has {length} bytes by "
                f"its header, {max(0, len(data) - at - 12)} are there"
            )
        body = bytes(data[at + 8 : end - 4]) if kind in (b"IHDR", b"tRNS") else b""
        if not header:
            if kind == b"CgBI":
                raise BadSampleError("PNG in the iPhone's own form (CgBI), which few programs read: save it again")
            if kind != b"IHDR" or length != 13:
                raise BadSampleError("broken PNG: it does not begin with its header")
            header = body
        if kind in _PIXEL_CHUNKS and not (kind in _ONCE and kind in seen):
            parts.append(bytes(data[at:end]))
            transparent = body if kind == b"tRNS" else transparent
            seen.add(kind)
        at = end
    else:
        raise BadSampleError(f"broken PNG: more than {_MAX_CHUNKS} chunks")
    if not header:
        raise BadSampleError("broken PNG: it ends inside its header")
    width, height, bit_depth, color_type = struct.unpack(">IIBB", header[:10])
    return PngInfo(width, height, bit_depth, color_type, transparent, b"".join((*parts, _IEND)))


def check_surplus(png: PngInfo) -> None:
    """Raise BadSampleError for a PNG whose data unpacks to more than its pixels: libpng unpacks it to its end.

    Little data is not checked: unpacking it costs less than the check.
    """
    if len(png.pixels) <= _MOST_UNCHECKED:
        return
    row = 1 + (png.width * png.bit_depth * _CHANNELS.get(png.color_type, 4) + 7) // 8
    most = 2 * png.height * row + 2**20  # twice, as interlaced images have more rows than their height
    inflate, unpacked, at = zlib.decompressobj(), 0, len(PNG_SIGNATURE)
    try:
        while at < len(png.pixels):
            length, kind = _CHUNK_HEAD.unpack_from(png.pixels, at)
            end = at + 8 + length
            for start in range(at + 8, end if kind == b"IDAT" else at + 8, _PIECE):
                unpacked += len(inflate.decompress(png.pixels[start : min(start + _PIECE, end)]))
                if unpacked > most:
                    raise BadSampleError(
                        f"broken PNG: its data unpacks to more than {most} bytes, far more than "
                        f"{png.width} x {png.height} pixels take"
                    )
            at = end + 4
    except zlib.error:
        return  # libpng stops at damaged data, too
