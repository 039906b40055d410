"""One shard, from its rows of the plan to its tar: images are read side by side, looked at, and written in order."""

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
from orchestrator.data.build.image_checks import ImageFinding
from orchestrator.data.build.sources.listing import ImageRow, SplitListing
from orchestrator.data.build.tar_reader import escape_undecodable
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.manifest import Shard
from orchestrator.data.transforms import decode
from orchestrator.storage import file_io, urls
from orchestrator.storage.ranged_reads import RangeReader

# Below the dataset's folder, as long as it is being packed.
PACKING_FOLDER = "_packing"

T = TypeVar("T")
R = TypeVar("R")


class ReencodeOptions(Config):
    """What is done to each image."""

    resize: int = 0
    quality: int = 95
    decode: bool = True


class ShardTask(Config):
    """One shard to be packed: a task of its own, on any machine that sees both places."""

    url: str  # of the dataset
    plan: str  # its digest
    split: str
    number: int
    root: str
    is_tar: bool
    treatment: ReencodeOptions
    threads: int = Field(4, ge=1)


class LeftOutImage(Config):
    """An image that nobody could train on."""

    key: str
    source: str
    label: int
    defect: str
    reason: str


class PackedShard(Config):
    """What is known of a finished shard; its file is written last."""

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
    """Path of a shard below the dataset's folder."""
    return f"{split}/{split}-{number:06d}.tar"


def make_rows_url(url: str, plan: str, split: str, number: int) -> str:
    """Where the rows of a shard are kept, apart for each plan (by its digest): of two that start at once one wins."""
    return file_io.join(url, PACKING_FOLDER, "rows", plan, f"{split}-{number:06d}.json")


def make_entry_url(url: str, split: str, number: int) -> str:
    """Where the entry of a finished shard is kept."""
    return file_io.join(url, PACKING_FOLDER, "done", f"{split}-{number:06d}.json")


def write_rows(url: str, rows: SplitListing) -> None:
    """Keep the rows of a shard."""
    columns = {
        "keys": list(rows.keys),
        "names": list(rows.names),
        "labels": rows.labels.tolist(),
        "offsets": rows.offsets.tolist(),
        "lengths": rows.lengths.tolist(),
    }
    file_io.write_bytes(url, json.dumps(columns, separators=(",", ":")).encode())


def pack_shard(raw: dict[str, Any]) -> dict[str, Any]:
    """Pack the shard of a ShardTask and leave its Entry; both in JSON form, to travel between processes.

    Raises DataError when the plan is not there, StorageError when an image cannot be read or the shard not be written.
    """
    task = ShardTask.from_dict(raw)
    rows = _read_rows(make_rows_url(task.url, task.plan, task.split, task.number))
    left_out: list[LeftOutImage] = []
    counts: Counter[str] = Counter()

    def kept(found: Iterable[tuple[ImageRow, PackedImage]]) -> Iterator[RawSample]:
        for row, (image, finding, is_resized) in found:
            if finding.defect:
                left_out.append(
                    LeftOutImage(
                        key=row.key,
                        source=escape_undecodable(row.name),
                        label=row.label,
                        defect=finding.defect,
                        reason=finding.reason,
                    )
                )
                continue
            counts.update(finding.oddities)
            counts["resized"] += is_resized
            yield RawSample(row.key, image, row.label, "jpg" if is_resized else finding.extension)

    with closing(RangeReader(task.threads)) as ranges:
        reader = ImageReader(ranges, task.root, task.is_tar, task.treatment)
        shard = tar_writer.write_shard(
            task.url,
            make_shard_name(task.split, task.number),
            kept(map_in_order(reader.read_packed, rows, task.threads)),
        )
    entry = PackedShard(
        shard=shard,
        images=len(rows),
        bytes=sum(row.length for row in rows),
        resized=counts.pop("resized", 0),
        oddities=dict(sorted(counts.items())),
        left_out=tuple(left_out),
    )
    if not shard.samples:
        for name in (shard.name, shard.name + index.SUFFIX):
            file_io.remove(file_io.join(task.url, name))
        entry = entry.model_copy(update={"shard": None})
    file_io.write_bytes(make_entry_url(task.url, task.split, task.number), entry.to_json().encode())
    return entry.to_dict()


class ImageReader:
    """Images of one root, read and treated; for any thread."""

    def __init__(self, ranges: RangeReader, root: str, is_tar: bool, treatment: ReencodeOptions) -> None:
        self._ranges, self._root, self._is_tar, self._treatment = ranges, root, is_tar, treatment

    def read_packed(self, row: ImageRow) -> PackedImage:
        """The image as it is to be stored, with what is odd about it.

        Raises DataError when it is gone, StorageError when it cannot be read.
        """
        large = image_checks.check_byte_size(row.length)
        if large is not None:
            return PackedImage(b"", large)
        try:
            image = self._read(row)
        except FileNotFoundError:
            where = redaction.redact(file_io.join(self._root, row.name))
            raise DataError(
                f"source: {where}: gone since it was listed, or not there as node {socket.gethostname()} sees it"
            ) from None
        return reencode_image(image, row.name, self._treatment)

    def _read(self, row: ImageRow) -> bytes:
        if self._is_tar:
            return bytes(self._ranges.read(self._root, row.offset, row.length))
        url = file_io.join(self._root, row.name)
        # Many small local files: opened and closed, not held open.
        if urls.is_local(url):
            return file_io.read_range(url, 0, row.length)
        return bytes(self._ranges.read(url, 0, row.length))


def reencode_image(image: bytes, name: str, treatment: ReencodeOptions) -> PackedImage:
    """Return an image as it is to be stored: a JPEG or PNG byte for byte, unless it is larger than `resize`.

    Images of other formats become PNGs of the same pixels.
    """
    finding = image_checks.inspect_image(image, name)
    if finding.defect:
        return PackedImage(b"", finding)
    shorter = min(finding.width, finding.height)
    is_large = 0 < treatment.resize < shorter
    is_other = decode.read_header(image).format not in ("jpeg", "png")
    try:
        if decode.is_transparent(image):
            finding = replace(finding, oddities=(*finding.oddities, "transparent"))
        if not (is_large or is_other or treatment.decode):
            return PackedImage(image, finding)
        pixels = decode.decode_image(image)
    except BadSampleError as error:
        return PackedImage(b"", ImageFinding(finding.extension, defect="undecodable", reason=str(error)))
    if is_large:
        rows, columns = (max(1, round(side * treatment.resize / shorter)) for side in pixels.shape[:2])
        small = np.ascontiguousarray(cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA))
        encoded = simplejpeg.encode_jpeg(small, quality=treatment.quality, colorspace="RGB", colorsubsampling="420")
        return PackedImage(encoded, finding, is_resized=True)
    if is_other:
        return PackedImage(cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes(), finding)
    return PackedImage(image, finding)


def map_in_order(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in the order of the items; a few are worked on ahead, side by side."""
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
    """The entry of a finished shard. Raises DataError when it is damaged."""
    try:
        return PackedShard.from_dict(parse_object(file_io.read_bytes(url)))
    except (ConfigError, ValueError) as error:
        raise DataError(f"{redaction.redact(url)}: damaged: {error}; remove it to pack that shard again") from None


def _read_rows(url: str) -> list[ImageRow]:
    try:
        columns = parse_object(file_io.read_bytes(url))
        names = ("keys", "names", "labels", "offsets", "lengths")
        return [ImageRow(*values) for values in zip(*(columns[name] for name in names), strict=True)]
    except FileNotFoundError:
        raise DataError(
            f"{redaction.redact(url)}: not there as node {socket.gethostname()} sees it: the dataset's "
            "folder must be a URL "
            "or a file system that all nodes share, and no other packing of it may have ended meanwhile"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{redaction.redact(url)}: damaged: {error!r}; remove {PACKING_FOLDER} and start the packing anew"
        ) from None
