"""Encoded pictures of kinds that no encoder at hand writes, each made byte by byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def segment(marker: int, body: bytes) -> bytes:
    """Return a JPEG segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body


def _packed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def flat_jpeg(factors: Sequence[tuple[int, int]], width: int = 64, height: int = 64) -> bytes:
    """Return a flat JPEG whose components have these sampling factors; every block is "DC 0, end of block"."""
    tall, wide = max(v for _, v in factors), max(h for h, _ in factors)
    data = b"\xff\xd8" + segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0") + segment(0xDB, b"\0" + bytes([8] * 64))
    described = b"".join(bytes([number, h << 4 | v, 0]) for number, (h, v) in enumerate(factors, start=1))
    data += segment(0xC0, struct.pack(">BHHB", 8, height, width, len(factors)) + described)
    for table in (0x00, 0x10):  # one code of one bit
        data += segment(0xC4, bytes([table, 1, *[0] * 15, 0]))
    data += segment(0xDA, bytes([len(factors), *(byte for n in range(len(factors)) for byte in (n + 1, 0)), 0, 63, 0]))
    units = -(-width // (8 * wide)) * -(-height // (8 * tall))
    return data + _packed("00" * units * sum(h * v for h, v in factors)) + b"\xff\xd9"


def many_scans(width: int, height: int, scans: int, components: int = 1, frame: int = 0xC2) -> bytes:
    """Return a JPEG of so many scans, of which only the first markers are real: enough for whatever counts them."""
    described = b"".join(bytes([number + 1, 0x11, 0]) for number in range(components))
    data = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
    data += segment(frame, struct.pack(">BHHB", 8, height, width, components) + described)
    data += segment(0xC4, bytes([0x00, 1, *[0] * 15, 0]))
    return data + (segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(9)) * scans + b"\xff\xd9"


def with_empty_scan_parameters(data: bytes) -> bytes:
    """Return the sequential JPEG as some phones write it: Ss = Se = 0."""
    start = data.index(b"\xff\xda")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data[: end - 3] + bytes(3) + data[end:]


def with_junk_between_segments(data: bytes) -> bytes:
    """Return the JPEG as some network cameras write it."""
    at = data.index(b"\xff\xdb")
    return data[:at] + bytes(16) + data[at:]


def with_another_jfif(data: bytes) -> bytes:
    """Return the JPEG with version 2.01 of JFIF."""
    at = data.index(b"JFIF\0") + 5
    return data[:at] + b"\2" + data[at + 1 :]


def without_end(data: bytes) -> bytes:
    """Return the JPEG without its end mark, as frames of motion JPEG are."""
    assert data.endswith(b"\xff\xd9")
    return data[:-2]


HARMLESS = (with_empty_scan_parameters, with_junk_between_segments, with_another_jfif, without_end)


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels: NDArray[np.generic], colour: int, bits: int, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    """Return a PNG of H x W x C numbers, one for each sample; fewer bits than 8 are packed."""
    height, width = pixels.shape[:2]
    if bits < 8:
        spread = pixels.reshape(height, width).astype(np.uint8)
        rows = [_packed("".join(format(int(one), f"0{bits}b") for one in row)) for row in spread]
    else:
        rows = [row.astype(">u2" if bits == 16 else np.uint8).tobytes() for row in pixels]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette)] if palette else []
    parts += [chunk(b"tRNS", transparent)] if transparent else []
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")]
    return SIGNATURE + b"".join(parts)


def lying_length(data: bytes, length: int) -> bytes:
    """Return the PNG with another length of its first IDAT chunk."""
    at = data.index(b"IDAT") - 4
    return data[:at] + struct.pack(">I", length) + data[at + 4 :]
