"""Chunks of a PNG, checked against the bytes that are there before a decoder allocates what they promise."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.transforms.image_format import PNG_SIGNATURE, EncodedImage

_HEAD = struct.Struct(">I4s")  # length, type
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
    bit_depth: int  # a channel
    color_type: int  # type
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
    taken = set[bytes]()
    for _ in range(_MAX_CHUNKS):
        if at + _HEAD.size > len(data):
            break
        length, kind = _HEAD.unpack_from(data, at)
        if kind == b"IEND":
            break
        end = at + 12 + length
        if end > len(data):
            raise BadSampleError(
                f"broken PNG: its chunk {kind.decode('ascii', 'backslashreplace')} at byte {at} has {length} bytes by "
                f"its header, {max(0, len(data) - at - 12)} are there"
            )
        body = at + 8
        if not header:
            if kind == b"CgBI":
                raise BadSampleError("PNG in the iPhone's own form (CgBI), which few programs read: save it again")
            if kind != b"IHDR" or length != 13:
                raise BadSampleError("broken PNG: it does not begin with its header")
            header = bytes(data[body : body + 13])
        if kind in _PIXEL_CHUNKS and kind not in taken:
            parts.append(bytes(data[at:end]))
            if kind == b"tRNS":
                transparent = bytes(data[body : body + length])
            if kind in _ONCE:
                taken.add(kind)
        at = end
    else:
        raise BadSampleError(f"broken PNG: more than {_MAX_CHUNKS} chunks")
    if not header:
        raise BadSampleError("broken PNG: it ends inside its header")
    width, height, bits, colour = struct.unpack(">IIBB", header[:10])
    return PngInfo(width, height, bits, colour, transparent, b"".join((*parts, _IEND)))


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
            length, kind = _HEAD.unpack_from(png.pixels, at)
            body = at + 8, at + 8 + (length if kind == b"IDAT" else 0)
            for start in range(*body, _PIECE):
                unpacked += len(inflate.decompress(png.pixels[start : min(start + _PIECE, body[1])]))
                if unpacked > most:
                    raise BadSampleError(
                        f"broken PNG: its data unpacks to more than {most} bytes, far more than "
                        f"{png.width} x {png.height} pixels take"
                    )
            at += 12 + length
    except zlib.error:
        return  # libpng stops at damaged data, too
