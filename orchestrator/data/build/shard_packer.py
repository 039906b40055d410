"""One shard, from its rows of the plan to its tar: images are read in parallel, checked, and written in order.

An image is stored as it is, unless it is to be reduced or of a format that is not stored; what is odd about it, and why
it cannot be trained on, is found before.
"""

from __future__ import annotations

import socket
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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
from orchestrator.data.transforms import decode, png_chunks
from orchestrator.data.transforms.image_format import UNSUPPORTED_FORMATS, identify_format
from orchestrator.data.transforms.jpeg_segments import PROGRESSIVE_MARKERS, JpegSegments
from orchestrator.storage import file_io, urls
from orchestrator.storage.ranged_reads import RangeReader

# It is counted, and nothing else in EXIF data matters.
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")


class ImageFinding(NamedTuple):
    """Result of the checks of an image."""

    extension: str  # of what is stored: "jpg" or "png"
    width: int = 0
    height: int = 0
    oddities: tuple[str, ...] = ()  # kinds as report.json counts them; an image of another format is stored as PNG
    defect: str = ""  # why it is left out: "empty", "no-image", "too-large", "undecodable" or its format
    reason: str = ""  # of the defect


class PackedImage(NamedTuple):
    """An image as it is stored, or why it is not."""

    image: bytes
    finding: ImageFinding
    is_resized: bool = False


def pack_shard(raw: dict[str, Any]) -> dict[str, Any]:
    """Pack the shard of a ShardTask and return its PackedShard; both in JSON form, to travel between processes.

    Raises DataError when the plan is not there, StorageError when an image cannot be read or the shard not be written.
    """
    task = ShardTask.from_dict(raw)
    rows = packing_plan.read_rows(task)
    left_out: list[LeftOutImage] = []
    counts: Counter[str] = Counter()

    def iter_samples(reader: ImageReader) -> Iterator[RawSample]:
        with ThreadPoolExecutor(task.threads, thread_name_prefix="pack") as pool:
            for row, (image, finding, is_resized) in zip(rows, pool.map(reader.read_packed, rows), strict=True):
                if finding.defect:
                    source, reason = escape_undecodable(row.name), finding.reason
                    left_out.append(
                        LeftOutImage(key=row.key, source=source, label=row.label, defect=finding.defect, reason=reason)
                    )
                    continue
                counts.update(finding.oddities)
                counts["resized"] += is_resized
                yield RawSample(row.key, image, row.label, "jpg" if is_resized else finding.extension)

    with closing(RangeReader(task.threads)) as ranges:
        samples = iter_samples(ImageReader(ranges, task.root, task.is_tar, task.layout))
        shard = tar_writer.write_shard(task.url, tar_writer.make_shard_name(task.split, task.number), samples)
    if not shard.samples:
        for name in (shard.name, shard.name + index.SUFFIX):
            file_io.remove(file_io.join(task.url, name))
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


class ImageReader:
    """Images of one root, read and re-encoded; for any thread."""

    def __init__(self, ranges: RangeReader, root: str, is_tar: bool, layout: ShardLayout) -> None:
        self._ranges, self._root, self._is_tar, self._layout = ranges, root, is_tar, layout

    def read_packed(self, row: ImageRow) -> PackedImage:
        """Return the image as it is to be stored, with what is odd about it.

        Raises DataError when it was removed, StorageError when it cannot be read.
        """
        if row.length > MAX_MEMBER_BYTES:
            reason = f"an image must have at most {MAX_MEMBER_BYTES} bytes, got {row.length}"
            return PackedImage(b"", ImageFinding("jpg", defect="too-large", reason=reason))
        url = self._root if self._is_tar else file_io.join(self._root, row.name)
        try:
            # Many small local files: opened and closed, not held open.
            if urls.is_local(url) and not self._is_tar:
                image = file_io.read_range(url, 0, row.length)
            else:
                image = bytes(self._ranges.read(url, row.offset, row.length))
        except FileNotFoundError:
            raise DataError(
                f"source: {redaction.redact(url)}: removed since it was listed, or not visible on node "
                f"{socket.gethostname()}"
            ) from None
        return reencode_image(image, row.name, self._layout)


def reencode_image(image: bytes, name: str, layout: ShardLayout) -> PackedImage:
    """Return an image as it is to be stored: a JPEG or PNG byte for byte, unless it is larger than `resize`.

    Images of other formats become PNGs of the same pixels.
    """
    finding = inspect_image(image, name)
    if finding.defect:
        return PackedImage(b"", finding)
    shorter = min(finding.width, finding.height)
    is_large = 0 < layout.resize < shorter
    is_other = decode.read_header(image).format not in ("jpeg", "png")
    try:
        if decode.is_transparent(image):
            finding = finding._replace(oddities=(*finding.oddities, "transparent"))
        if not (is_large or is_other or layout.decode):
            return PackedImage(image, finding)
        pixels = decode.decode_image(image)
    except BadSampleError as error:
        return PackedImage(b"", ImageFinding(finding.extension, defect="undecodable", reason=str(error)))
    if is_large:
        rows, columns = (max(1, round(side * layout.resize / shorter)) for side in pixels.shape[:2])
        small = np.ascontiguousarray(cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA))
        encoded = simplejpeg.encode_jpeg(small, quality=layout.quality, colorspace="RGB", colorsubsampling="420")
        return PackedImage(encoded, finding, is_resized=True)
    if is_other:
        return PackedImage(cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes(), finding)
    return PackedImage(image, finding)


# ------------------------------------------------------------------ checks of an image
def inspect_image(image: bytes, name: str) -> ImageFinding:
    """Return what is known of an image, whose file is called `name`, before a pixel is decoded."""
    if not image:
        return ImageFinding("jpg", defect="empty", reason="0 bytes")
    kind = identify_format(image)
    extension = "jpg" if kind == "jpeg" else "png"
    try:
        head = decode.read_header(image)
    except BadSampleError as error:
        defect: str = kind if kind in UNSUPPORTED_FORMATS else "undecodable" if kind else "no-image"
        if isinstance(error, decode.ImageTooLargeError):
            defect = "too-large"
        return ImageFinding(extension, defect=defect, reason=str(error))
    oddities: list[str] = []
    if head.segments is not None:
        oddities += _find_jpeg_oddities(image, head.segments)
    elif head.format == "png":
        oddities += ["grey"] if png_chunks.read_png(image).is_gray else []
    else:
        oddities.append(head.format)
    named = name.rpartition(".")[2].lower()
    if kind == "png" and named in ("jpg", "jpeg", "jpe", "jfif"):
        oddities.append("png-named-jpeg")
    elif kind == "jpeg" and named == "png":
        oddities.append("jpeg-named-png")
    return ImageFinding(extension, head.width, head.height, tuple(oddities))


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
