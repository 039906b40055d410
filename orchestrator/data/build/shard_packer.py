"""One shard, from its rows of the plan to its tar: images are read in parallel, checked, and written in order."""

from __future__ import annotations

import socket
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags
from PIL import Image as Pillow

from orchestrator.config import redaction
from orchestrator.data import index
from orchestrator.data.build import packing_plan, tar_writer
from orchestrator.data.build.config import ShardLayout
from orchestrator.data.build.packing_plan import LeftOutImage, PackedShard, ShardTask
from orchestrator.data.build.sources.listing import ImageRow
from orchestrator.data.build.tar_reader import MAX_MEMBER_BYTES, escape_undecodable
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.transforms import decode
from orchestrator.data.transforms.image_format import (
    PROGRESSIVE_MARKERS,
    UNSUPPORTED_FORMATS,
    JpegSegments,
    identify_format,
    read_png,
)
from orchestrator.storage import file_io
from orchestrator.storage.ranged_reads import RangeReader

# It is counted, and nothing else in EXIF data matters.
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")


class PackedImage(NamedTuple):
    """Result of the checks of an image, and the image as it is stored."""

    extension: str  # of what is stored: "jpg" or "png"
    width: int = 0
    height: int = 0
    oddities: tuple[str, ...] = ()  # kinds as report.json counts them; an image of another format is stored as PNG
    defect: str = ""  # why it is left out: "empty", "no-image", "too-large", "undecodable" or its format
    reason: str = ""  # of the defect
    image: bytes = b""  # empty when it is left out, or was not read beyond its header
    is_resized: bool = False


def pack_shard(raw: dict[str, Any]) -> dict[str, Any]:
    """Pack the shard of a ShardTask and return its PackedShard, both as JSON. Raises DataError or StorageError."""
    task = ShardTask.from_dict(raw)
    rows = packing_plan.read_rows(task)
    left_out: list[LeftOutImage] = []
    counts: Counter[str] = Counter()

    def iter_samples(ranges: RangeReader) -> Iterator[RawSample]:
        read = partial(read_packed, root=task.root, is_tar=task.is_tar, layout=task.layout, ranges=ranges)
        with ThreadPoolExecutor(task.threads, thread_name_prefix="pack") as pool:
            for row, packed in zip(rows, pool.map(read, rows), strict=True):
                if packed.defect:
                    bad = {"source": escape_undecodable(row.name), "defect": packed.defect, "reason": packed.reason}
                    left_out.append(LeftOutImage(key=row.key, label=row.label, **bad))
                    continue
                counts.update(packed.oddities)
                counts["resized"] += packed.is_resized
                yield RawSample(row.key, packed.image, row.label, packed.extension)

    with closing(RangeReader(task.threads)) as ranges:
        name = tar_writer.make_shard_name(task.split, task.number)
        shard = tar_writer.write_shard(task.url, name, iter_samples(ranges))
    if not shard.samples:
        for written in (name, name + index.SUFFIX):
            file_io.remove(file_io.join(task.url, written))
    entry = PackedShard(
        shard=shard if shard.samples else None,
        images=len(rows),
        bytes=sum(row.length for row in rows),
        resized=counts.pop("resized", 0),
        oddities=dict(sorted(counts.items())),
        left_out=tuple(left_out),
    )
    packing_plan.save_entry(task, entry)
    return entry.to_dict()


def read_packed(row: ImageRow, root: str, is_tar: bool, layout: ShardLayout, ranges: RangeReader) -> PackedImage:
    """Return an image of the source as it is stored. Raises DataError when it was removed, StorageError otherwise."""
    if row.length > MAX_MEMBER_BYTES:
        reason = f"an image must have at most {MAX_MEMBER_BYTES} bytes, got {row.length}"
        return PackedImage("jpg", defect="too-large", reason=reason)
    url = root if is_tar else file_io.join(root, row.name)
    try:
        image = bytes(ranges.read(url, row.offset, row.length))
    except FileNotFoundError:
        where = f"source: {redaction.redact(url)}"
        raise DataError(f"{where}: removed since it was listed, or not visible on {socket.gethostname()}") from None
    return reencode_image(image, row.name, layout)


def reencode_image(image: bytes, name: str, layout: ShardLayout) -> PackedImage:
    """Return an image as it is stored: a JPEG or PNG byte for byte, unless larger than `resize`; others as PNG."""
    found = inspect_image(image, name)
    if found.defect:
        return found
    shorter = min(found.width, found.height)
    is_large = 0 < layout.resize < shorter
    is_other = decode.read_header(image).format not in ("jpeg", "png")
    try:
        if decode.is_transparent(image):
            found = found._replace(oddities=(*found.oddities, "transparent"))
        if not (is_large or is_other or layout.decode):
            return found._replace(image=image)
        pixels = decode.decode_image(image)
    except BadSampleError as error:
        return PackedImage(found.extension, defect="undecodable", reason=str(error))
    if is_large:
        rows, columns = (max(1, round(side * layout.resize / shorter)) for side in pixels.shape[:2])
        small = np.ascontiguousarray(cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA))
        image = simplejpeg.encode_jpeg(small, quality=layout.quality, colorspace="RGB", colorsubsampling="420")
        return found._replace(image=image, extension="jpg", is_resized=True)
    if is_other:
        image = cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()
    return found._replace(image=image)


# ------------------------------------------------------------------ checks of an image
def inspect_image(image: bytes, name: str) -> PackedImage:
    """Return what is known of an image, whose file is called `name`, before a pixel is decoded."""
    if not image:
        return PackedImage("jpg", defect="empty", reason="0 bytes")
    kind = identify_format(image)
    extension = "jpg" if kind == "jpeg" else "png"
    try:
        head = decode.read_header(image)
    except BadSampleError as error:
        defect: str = kind if kind in UNSUPPORTED_FORMATS else "undecodable" if kind else "no-image"
        if isinstance(error, decode.ImageTooLargeError):
            defect = "too-large"
        return PackedImage(extension, defect=defect, reason=str(error))
    oddities: list[str] = []
    if head.segments is not None:
        oddities += _find_jpeg_oddities(image, head.segments)
    elif head.format == "png":
        oddities += ["grey"] if read_png(image).is_gray else []
    else:
        oddities.append(head.format)
    named = name.rpartition(".")[2].lower()
    if kind == "png" and named in ("jpg", "jpeg", "jpe", "jfif"):
        oddities.append("png-named-jpeg")
    elif kind == "jpeg" and named == "png":
        oddities.append("jpeg-named-png")
    return PackedImage(extension, head.width, head.height, tuple(oddities))


def _find_jpeg_oddities(image: bytes, segments: JpegSegments) -> list[str]:
    oddities = {1: ["grey"], 4: ["ycck" if segments.adobe_transform == 2 else "cmyk"]}.get(segments.components, [])
    if segments.frame_marker in PROGRESSIVE_MARKERS:
        oddities.append("progressive")
    if segments.exif_span is not None:
        tags = Pillow.Exif()
        try:
            tags.load(image[slice(*segments.exif_span)])
            orientation = int(tags.get(ExifTags.Base.Orientation, 1))
        except Exception:  # Pillow raises errors of many types for damaged data
            orientation = -1
        if not len(tags) or not 0 <= orientation <= 8:
            oddities.append("exif-broken")
        elif orientation > 1:  # 0 is written by some cameras for "not known"
            oddities.append("exif-rotated")
    return oddities
