"""ILSVRC2012 development kit or Kaggle's lists: wnids, names of classes, labels of the validation images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.io import loadmat

from orchestrator.config import redaction
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io

META_PATH = "data/meta.mat"
GROUND_TRUTH_PATH = "data/ILSVRC2012_validation_ground_truth.txt"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"  # Kaggle's
_OF_DEVKIT, _OF_KAGGLE = "the devkit of ILSVRC2012 has it", f"Kaggle's files have it beside {SOLUTION}"
# The real files have 2.5 MB together; anything far larger is something else.
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Devkit:
    """Classes and validation labels by the devkit, or by Kaggle's lists."""

    redacted_url: str  # where it lies
    words: dict[str, str]  # by wnid, of the synsets without children, which are the classes
    wnids: dict[int, str]  # by ILSVRC2012_ID
    truth: tuple[int, ...]  # ILSVRC2012_ID of each validation image, by name
    solution: Mapping[str, str] | None = None  # wnid by the name of a validation image, in place of `truth`

    def get_validation_wnids(self, names: Sequence[str]) -> list[str]:
        """Return the wnid of each validation image, given their sorted names without extension.

        Raises DataError when names and labels do not fit.
        """
        named, labels = (
            (GROUND_TRUTH_PATH, len(self.truth)) if self.solution is None else (SOLUTION, len(self.solution))
        )
        if len(names) != labels:
            raise DataError(
                f"{self.redacted_url}: {named} has {labels} labels, there are {len(names)} validation images"
            )
        if self.solution is not None:
            if missing := next((name for name in names if name not in self.solution), None):
                raise DataError(f"{self.redacted_url}: it has no label for the validation image {missing!r}")
            return [self.solution[name] for name in names]
        for line, number in enumerate(self.truth, start=1):
            if number not in self.wnids:
                raise DataError(
                    f"{self.redacted_url}: {GROUND_TRUTH_PATH}: line {line}: {number} is the id of no class"
                )
        return [self.wnids[number] for number in self.truth]


def load_devkit(url: str) -> Devkit:
    """Load the devkit at `url`: a folder, a tar (also compressed) that is read in memory, or Kaggle's solution (.csv).

    Raises DataError when it is missing or damaged.
    """
    if url.endswith(".csv"):
        return _from_kaggle(url)
    shown = redaction.redact(url)
    meta, truth = _read_tar(url) if url.endswith((".tar", ".tar.gz", ".tgz")) else _read_folder(url)
    words, wnids = _parse_synsets(meta, shown)
    try:
        labels = tuple(int(line) for line in truth.split())
    except ValueError as error:
        raise DataError(f"{shown}: {GROUND_TRUTH_PATH}: damaged: {error}") from None
    return Devkit(shown, words, wnids, labels)


def _from_kaggle(url: str) -> Devkit:
    """Load Kaggle's solution of the validation split, and the names of the classes from the file beside it."""
    mapping, shown = file_io.join(url.rpartition("/")[0], MAPPING), redaction.redact(url)
    words: dict[str, str] = {}
    for number, line in enumerate(_text(mapping).splitlines(), start=1):
        wnid, _, said = line.strip().partition(" ")
        if not said or wnid in words:
            raise DataError(
                f"{redaction.redact(mapping)}: line {number}: must be a new WNID and its names, got {line!r}"
            )
        words[wnid] = said.strip()
    solution: dict[str, str] = {}
    for number, line in enumerate(_text(url).splitlines(), start=1):
        if number == 1 and line.startswith("ImageId,"):
            continue
        name, _, boxes = line.replace('"', "").partition(",")
        wnids = set(boxes.split()[::5])  # of each box: its class, then four numbers
        if len(wnids) != 1 or not wnids <= words.keys() or name in solution:
            raise DataError(
                f"{shown}: line {number}: must be a new image and boxes of one class of {MAPPING}, got {line[:80]!r}"
            )
        solution[name] = wnids.pop()
    return Devkit(shown, words, {}, (), solution)


def _text(url: str) -> str:
    try:
        return _read_bounded(url, _OF_KAGGLE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{redaction.redact(url)}: must be text in UTF-8, got {error.object[error.start]:#04x}"
        ) from None


def _read_folder(url: str) -> tuple[bytes, bytes]:
    return _read_bounded(file_io.join(url, META_PATH)), _read_bounded(file_io.join(url, GROUND_TRUTH_PATH))


def _read_bounded(url: str, origin: str = _OF_DEVKIT) -> bytes:
    try:
        size = file_io.get_size(url)
        if size > MAX_BYTES:
            raise DataError(f"{redaction.redact(url)}: must have at most {MAX_BYTES} bytes, got {size}")
        return file_io.read_bytes(url)
    except FileNotFoundError:
        raise DataError(f"{redaction.redact(url)}: missing: {origin}") from None


def _read_tar(url: str) -> tuple[bytes, bytes]:
    shown = redaction.redact(url)
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_read_bounded(url)), mode="r:*") as tar:
            for member in tar:
                wanted = next(
                    (name for name in (META_PATH, GROUND_TRUTH_PATH) if f"/{member.name}".endswith(f"/{name}")), None
                )
                if wanted is None or not member.isfile():
                    continue
                if member.size > MAX_BYTES:
                    raise DataError(f"{shown}: {member.name!r}: {member.size} bytes: over {MAX_BYTES}")
                body = tar.extractfile(member)
                found[wanted] = body.read() if body else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        if isinstance(error, file_io.StorageError):
            raise
        raise DataError(f"{shown}: no readable tar: {error}") from None
    if missing := [name for name in (META_PATH, GROUND_TRUTH_PATH) if name not in found]:
        raise DataError(f"{shown}: truncated, or no devkit of ILSVRC2012: {missing[0]} is not in it")
    return found[META_PATH], found[GROUND_TRUTH_PATH]


def _parse_synsets(meta: bytes, shown: str) -> tuple[dict[str, str], dict[int, str]]:
    """Return words by wnid and wnid by id, of the synsets without children."""
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
        raise DataError(
            f"{shown}: {META_PATH}: damaged, or not of ILSVRC2012: {type(error).__name__}: {error}"
        ) from None
    if not words:
        raise DataError(f"{shown}: {META_PATH}: no synset without children")
    return words, wnids
