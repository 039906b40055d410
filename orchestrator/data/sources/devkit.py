"""The ILSVRC2012 development kit: wnids, names of classes, labels of the validation images."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass

import numpy as np
from scipy.io import loadmat

from orchestrator.data.errors import DataError
from orchestrator.storage import files, urls

META = "data/meta.mat"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
# The real files have 2.5 MB together; anything far larger is something else.
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Devkit:
    """What the devkit tells."""

    shown: str  # where it lies
    words: dict[str, str]  # by wnid, of the synsets without children, which are the classes
    wnids: dict[int, str]  # by ILSVRC2012_ID
    truth: tuple[int, ...]  # ILSVRC2012_ID of each validation image, by name

    def validation_classes(self, images: int) -> list[str]:
        """The wnid of each of the validation images, sorted by name. Raises DataError when they do not fit."""
        if images != len(self.truth):
            raise DataError(
                f"{self.shown}: {GROUND_TRUTH} has {len(self.truth)} labels, there are {images} validation images"
            )
        for line, number in enumerate(self.truth, start=1):
            if number not in self.wnids:
                raise DataError(f"{self.shown}: {GROUND_TRUTH}: line {line}: {number} is the id of no class")
        return [self.wnids[number] for number in self.truth]


def load(url: str) -> Devkit:
    """The devkit at `url`: a folder, or a tar (also compressed) that is read in memory and never unpacked.

    Raises DataError when it is missing or damaged.
    """
    shown = urls.redact(url)
    meta, truth = _from_tar(url) if url.endswith((".tar", ".tar.gz", ".tgz")) else _from_folder(url)
    words, wnids = _synsets(meta, shown)
    try:
        labels = tuple(int(line) for line in truth.split())
    except ValueError as error:
        raise DataError(f"{shown}: {GROUND_TRUTH}: damaged: {error}") from None
    return Devkit(shown, words, wnids, labels)


def _from_folder(url: str) -> tuple[bytes, bytes]:
    return _bounded(files.join(url, META)), _bounded(files.join(url, GROUND_TRUTH))


def _bounded(url: str) -> bytes:
    try:
        size = files.size(url)
        if size > MAX_BYTES:
            raise DataError(f"{urls.redact(url)}: {size} bytes: no file of the devkit is over {MAX_BYTES}")
        return files.read_bytes(url)
    except FileNotFoundError:
        raise DataError(f"{urls.redact(url)}: missing: the devkit of ILSVRC2012 has it") from None


def _from_tar(url: str) -> tuple[bytes, bytes]:
    shown = urls.redact(url)
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_bounded(url)), mode="r:*") as tar:
            for member in tar:
                wanted = next((name for name in (META, GROUND_TRUTH) if f"/{member.name}".endswith(f"/{name}")), None)
                if wanted is None or not member.isfile():
                    continue
                if member.size > MAX_BYTES:
                    raise DataError(f"{shown}: {member.name!r}: {member.size} bytes: over {MAX_BYTES}")
                body = tar.extractfile(member)
                found[wanted] = body.read() if body else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        if isinstance(error, files.StorageError):
            raise
        raise DataError(f"{shown}: no readable tar: {error}") from None
    if missing := [name for name in (META, GROUND_TRUTH) if name not in found]:
        raise DataError(f"{shown}: truncated, or no devkit of ILSVRC2012: {missing[0]} is not in it")
    return found[META], found[GROUND_TRUTH]


def _synsets(meta: bytes, shown: str) -> tuple[dict[str, str], dict[int, str]]:
    """Words by wnid and wnid by id, of the synsets without children."""
    words: dict[str, str] = {}
    wnids: dict[int, str] = {}
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"])
        for synset in synsets:
            if int(synset["num_children"]):
                continue
            wnid, number = str(synset["WNID"]), int(synset["ILSVRC2012_ID"])
            if wnid in words or number in wnids:
                raise ValueError(f"synset {number} ({wnid}) is there twice")
            words[wnid], wnids[number] = str(synset["words"]), wnid
    except Exception as error:  # scipy raises errors of many types for damaged files
        raise DataError(f"{shown}: {META}: damaged, or not of ILSVRC2012: {type(error).__name__}: {error}") from None
    if not words:
        raise DataError(f"{shown}: {META}: no synset without children")
    return words, wnids
