"""Segments of a JPEG: its frame, the number of its scans, and what is odd about it but harmless.

libjpeg reports only the first problem that it meets. So that a harmless one hides no damage behind it,
`remove_harmless` takes those out that real cameras write; whatever libjpeg then reports is damage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from orchestrator.data.transforms.image_format import EncodedImage

SOS, EOI = 0xDA, 0xD9
PROGRESSIVE_MARKERS = (0xC2, 0xC6, 0xCA, 0xCE)
_FRAME_MARKERS = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_BASELINE_MARKERS = (0xC0, 0xC1)
_STANDALONE_MARKERS = (0x01, *range(0xD0, 0xD9))  # markers without a length
# Encoders write some hundreds of segments at most; a file of millions must not cost seconds of Python.
_MAX_SEGMENTS = 10_000
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_AFTER_ENTROPY = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # no stuffed byte, no restart marker


@dataclass(slots=True)
class JpegSegments:
    """Facts from before the first scan of a JPEG; zeros and None where they are not there."""

    frame_marker: int = 0  # marker
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
            segments.frame_marker, segments.components = marker, data[body + 5]
            segments.height = int.from_bytes(data[body + 1 : body + 3], "big")
            segments.width = int.from_bytes(data[body + 3 : body + 5], "big")
            segments.height_offset = body + 1 if marker in _BASELINE_MARKERS else 0
        elif marker == SOS:
            segments.scan_offset = match.start()
            _read_scan(data, segments, body, at)
            break
        elif marker == 0xE0 and at - body >= 7 and bytes(data[body : body + 5]) == b"JFIF\0" and data[body + 5] != 1:
            segments.harmless_spans.append((body + 5, body + 6, b"\1"))  # another version of JFIF
        elif marker == 0xE1 and segments.exif_span is None and bytes(data[body : body + 5]) == b"Exif\0":
            segments.exif_span = body + 6, min(at, len(data))
        elif marker == 0xEE and at - body >= 12 and bytes(data[body : body + 5]) == b"Adobe" and body + 11 < len(data):
            segments.adobe_transform = data[body + 11]
    return segments


def _read_scan(data: EncodedImage, segments: JpegSegments, body: int, end: int) -> None:
    if end > len(data) or end - body < 4:
        return
    segments.is_single_scan = segments.frame_marker not in PROGRESSIVE_MARKERS and data[body] == segments.components
    # Sequential files have nothing to choose here, and some cameras leave it empty.
    if segments.frame_marker not in PROGRESSIVE_MARKERS and bytes(data[end - 3 : end]) != b"\0\x3f\0":
        segments.harmless_spans.append((end - 3, end, b"\0\x3f\0"))


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
