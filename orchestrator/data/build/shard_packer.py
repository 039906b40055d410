"""One shard, from its rows of the plan to its tar: images are read in parallel, checked, and written in order."""

from __future__ import annotations

import json
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import simplejpeg
from pydantic import Field

from orchestrator.config import redaction
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_object
from orchestrator.data import index
from orchestrator.data.build import image_checks, tar_writer
from orchestrator.data.build.config import ShardLayout
from orchestrator.data.build.image_checks import ImageFinding
from orchestrator.data.build.sources.listing import ImageRow, SplitListing
from orchestrator.data.build.tar_reader import escape_undecodable
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.manifest import Shard
from orchestrator.data.transforms import decode
from orchestrator.storage import file_io
from orchestrator.storage.ranged_reads import RangeReader

# Below the dataset's folder, as long as it is being packed.
PACKING_FOLDER = "_packing"
_ROW_COLUMNS = ("keys", "names", "labels", "offsets", "lengths")

T = TypeVar("T")
R = TypeVar("R")


class ShardTask(Config):
    """One shard to be packed: a task of its own, on any machine that sees both places."""

    url: str  # of the dataset
    plan: str  # its digest
    split: str
    number: int
    root: str
    is_tar: bool
    layout: ShardLayout
    threads: int = Field(4, ge=1)


class LeftOutImage(Config):
    """An image that cannot be trained on."""

    key: str
    source: str
    label: int
    defect: str
    reason: str


class PackedShard(Config):
    """Record of a finished shard; its file is written last."""

    shard: Shard | None = Field(description="None when all of its images were left out")
    images: int
    bytes: int = Field(description="of the source")
    resized: int
    oddities: dict[str, int]
    left_out: tuple[LeftOutImage, ...]


class PackedImage(NamedTuple):
    """An image as it is stored, or why it is not."""

    image: bytes
    finding: ImageFinding
    is_resized: bool = False


def make_shard_name(split: str, number: int) -> str:
    """Return the path of a shard below the dataset's folder."""
    return f"{split}/{split}-{number:06d}.tar"


def make_rows_url(url: str, plan: str, split: str, number: int) -> str:
    """Return where the rows of a shard are kept, apart for each plan, by its digest: of two packers only one wins."""
    return file_io.join(url, PACKING_FOLDER, "rows", plan, f"{split}-{number:06d}.json")


def make_entry_url(url: str, split: str, number: int) -> str:
    """Return where the record of a finished shard is kept."""
    return file_io.join(url, PACKING_FOLDER, "done", f"{split}-{number:06d}.json")


def write_rows(url: str, rows: SplitListing) -> None:
    """Write the rows of a shard."""
    columns = {name: getattr(rows, name) for name in _ROW_COLUMNS}
    lists = {
        name: column.tolist() if isinstance(column, np.ndarray) else list(column) for name, column in columns.items()
    }
    file_io.write_bytes(url, json.dumps(lists, separators=(",", ":")).encode())


def pack_shard(raw: dict[str, Any]) -> dict[str, Any]:
    """Pack the shard of a ShardTask and return its PackedShard; both in JSON form, to travel between processes.

    Raises DataError when the plan is not there, StorageError when an image cannot be read or the shard not be written.
    """
    task = ShardTask.from_dict(raw)
    rows = _read_rows(make_rows_url(task.url, task.plan, task.split, task.number))
    left_out: list[LeftOutImage] = []
    counts: Counter[str] = Counter()

    def iter_samples(packed: Iterable[tuple[ImageRow, PackedImage]]) -> Iterator[RawSample]:
        for row, (image, finding, is_resized) in packed:
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
        reader = ImageReader(ranges, task.root, task.is_tar, task.layout)
        samples = iter_samples(map_in_order(reader.read_packed, rows, task.threads))
        shard = tar_writer.write_shard(task.url, make_shard_name(task.split, task.number), samples)
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
    file_io.write_bytes(make_entry_url(task.url, task.split, task.number), entry.to_json().encode())
    return entry.to_dict()


class ImageReader:
    """Images of one root, read and re-encoded; for any thread."""

    def __init__(self, ranges: RangeReader, root: str, is_tar: bool, layout: ShardLayout) -> None:
        self._ranges, self._root, self._is_tar, self._layout = ranges, root, is_tar, layout

    def read_packed(self, row: ImageRow) -> PackedImage:
        """Return the image as it is to be stored, with what is odd about it.

        Raises DataError when it was removed, StorageError when it cannot be read.
        """
        if (too_large := image_checks.check_byte_size(row.length)) is not None:
            return PackedImage(b"", too_large)
        try:
            image = self._read(row)
        except FileNotFoundError:
            url = redaction.redact(file_io.join(self._root, row.name))
            raise DataError(
                f"source: {url}: removed since it was listed, or not visible on node {socket.gethostname()}"
            ) from None
        return reencode_image(image, row.name, self._layout)

    def _read(self, row: ImageRow) -> bytes:
        if self._is_tar:
            return bytes(self._ranges.read(self._root, row.offset, row.length))
        return bytes(self._ranges.read(file_io.join(self._root, row.name), 0, row.length))


def reencode_image(image: bytes, name: str, layout: ShardLayout) -> PackedImage:
    """Return an image as it is to be stored: a JPEG or PNG byte for byte, unless it is larger than `resize`.

    Images of other formats become PNGs of the same pixels.
    """
    finding = image_checks.inspect_image(image, name)
    if finding.defect:
        return PackedImage(b"", finding)
    shorter = min(finding.width, finding.height)
    is_large = 0 < layout.resize < shorter
    is_other = decode.read_header(image).format not in ("jpeg", "png")
    try:
        if decode.is_transparent(image):
            finding = replace(finding, oddities=(*finding.oddities, "transparent"))
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


def map_in_order(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[tuple[T, R]]:
    """Yield (item, work(item)) in the order of the items; threads work a few items ahead."""
    with ThreadPoolExecutor(threads, thread_name_prefix="pack") as pool:
        ahead: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in items:
                ahead.append((item, pool.submit(work, item)))
                if len(ahead) > 2 * threads:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def read_entry(url: str) -> PackedShard:
    """Return the record of a finished shard. Raises DataError when it is damaged."""
    try:
        return PackedShard.from_dict(parse_object(file_io.read_bytes(url)))
    except (ConfigError, ValueError) as error:
        raise DataError(f"{redaction.redact(url)}: damaged: {error}; remove it to pack that shard again") from None


def _read_rows(url: str) -> list[ImageRow]:
    shown = redaction.redact(url)
    try:
        columns = parse_object(file_io.read_bytes(url))
        return [ImageRow(*values) for values in zip(*(columns[name] for name in _ROW_COLUMNS), strict=True)]
    except FileNotFoundError:
        raise DataError(
            f"{shown}: not visible on node {socket.gethostname()}: the dataset's folder must be a URL or a file system "
            "that all nodes share, and no other packing of it may have ended meanwhile"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown}: damaged: {error!r}; remove {PACKING_FOLDER} and start the packing anew") from None
