"""ILSVRC2012 as it comes: a training tar of tars, a flat validation tar, a devkit; or the same in folders; or Kaggle's.

Nothing is unpacked: each image is a range of the outer tar. Tars and folders give the same dataset.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat

from orchestrator.config import redaction
from orchestrator.data.build.config import IlsvrcSource
from orchestrator.data.build.label_format import read_bounded, read_text
from orchestrator.data.build.sources import listing
from orchestrator.data.build.sources.listing import FolderLister, ImageRow, SourceListing, SplitListing
from orchestrator.data.build.tar_reader import MemberRange, iter_member_ranges
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io
from orchestrator.storage.ranged_reads import RangeReader

META_PATH = "data/meta.mat"
GROUND_TRUTH_PATH = "data/ILSVRC2012_validation_ground_truth.txt"
VALIDATION_NAME = "ILSVRC2012_val_{:08d}"  # of the image that a line of the ground truth is about, from 1 on
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"  # Kaggle's
_KAGGLE = "ILSVRC/Data/CLS-LOC"
# In order of preference: tars need fewer requests. Both give the same dataset.
STANDARD_NAMES = {
    "train": ("ILSVRC2012_img_train.tar", "train", f"{_KAGGLE}/train"),
    "validation": ("ILSVRC2012_img_val.tar", "val", "validation", f"{_KAGGLE}/val"),
    "devkit": ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", SOLUTION),
}
MAX_DEVKIT_BYTES = 64 * 2**20  # the real files have 2.5 MB together


class Devkit(NamedTuple):
    """Classes and validation labels by the devkit, or by Kaggle's lists."""

    words: dict[str, str]  # by wnid, of the synsets without children, which are the classes
    wnids: dict[str, str]  # of each validation image, by its name without extension


class IlsvrcLister(FolderLister):
    """Images of ILSVRC2012, in tars or folders."""

    def __init__(self, source: IlsvrcSource) -> None:
        super().__init__(source.url, source.holdout)
        self._source = source

    def find_roots(self) -> dict[str, str]:
        """Return the URL of the tar or folder of each split, and of the devkit if there is one. Raises DataError."""
        url = self._source.url
        names = set(file_io.list_names(url)) if url else set()
        roots = {
            place: file_io.join(url, name)
            for place, standard in STANDARD_NAMES.items()
            for name in reversed(standard)
            if name.partition("/")[0] in names
        } | {place: given for place in STANDARD_NAMES if (given := getattr(self._source, place))}
        if "train" not in roots:
            tried = " nor ".join(STANDARD_NAMES["train"])
            raise DataError(f"source.url: {redaction.redact(url)}: neither {tried} there")
        self.check_holdout(roots)
        return roots

    def list_images(self, roots: Mapping[str, str]) -> SourceListing:
        """Return the listing of what `find_roots` returned. Raises DataError for damage, and labels that do not fit."""
        kit = load_devkit(roots["devkit"]) if "devkit" in roots else None
        classes, validation = tuple(sorted(kit.words)) if kit else None, None
        with closing(RangeReader(listing.LISTING_THREADS)) as ranges:
            if roots["train"].endswith(".tar"):
                classes, train = self._list_tar_of_tars(roots["train"], classes, ranges)
            else:
                classes, train = self.list_class_folders(roots["train"], classes)
            if "validation" in roots:
                validation = self._list_validation(roots, classes, kit, ranges)
        titles = tuple(kit.words[wnid] for wnid in classes) if kit else ()
        return self.build_listing(classes, titles, train, validation)

    def _list_tar_of_tars(
        self, url: str, classes: tuple[str, ...] | None, ranges: RangeReader
    ) -> tuple[tuple[str, ...], SplitListing]:
        inner: dict[str, MemberRange] = {}
        for member in iter_member_ranges(ranges, url):
            if not member.name.endswith(".tar"):
                self.ignored[listing.get_extension(member.name)] += 1
                continue
            wnid = listing.make_key(member.name).rpartition("/")[2]
            if wnid in inner:
                both = f"{inner[wnid].name!r} and {member.name!r}"
                raise DataError(f"{redaction.redact(url)}: {both} are both of class {wnid}")
            inner[wnid] = member
        numbers = listing.number_classes(url, inner, classes)

        def rows() -> Iterator[ImageRow]:
            with ThreadPoolExecutor(listing.LISTING_THREADS) as pool:
                walks = pool.map(lambda wnid: list(iter_member_ranges(ranges, url, inner[wnid])), inner)
                for wnid, files in zip(inner, walks, strict=True):
                    for image in self.select_images(files):
                        name = f"{inner[wnid].name}/{image.name}"
                        key, path = f"{wnid}/{listing.make_key(image.name)}", f"{wnid}/{image.name}"
                        yield ImageRow(key, name, numbers[wnid], image.offset, image.length, path)

        return tuple(sorted(inner)) if classes is None else classes, listing.build_split_listing(url, True, rows())

    def _list_validation(
        self, roots: Mapping[str, str], classes: tuple[str, ...], kit: Devkit | None, ranges: RangeReader
    ) -> SplitListing:
        """Return the listing of a flat tar, a flat folder, or a folder per class."""
        url = roots["validation"]
        is_tar = url.endswith(".tar")
        if is_tar:
            images = sorted(self.select_images(list(iter_member_ranges(ranges, url))))
        else:
            images = self.list_flat_folder(url)
            if not images:
                return self.list_class_folders(url, classes, bare=True)[1]
        if kit is None:
            kits = " or ".join(STANDARD_NAMES["devkit"])
            raise DataError(f"source.devkit: needed: the labels of {redaction.redact(url)} are in {kits}")
        numbers = {name: number for number, name in enumerate(classes)}
        labels = {name: numbers[wnid] for name, wnid in kit.wnids.items()}
        return listing.build_flat_listing(url, is_tar, images, labels, redaction.redact(roots["devkit"]))


# ------------------------------------------------------------------ devkit
def load_devkit(url: str) -> Devkit:
    """Load a devkit, folder or tar, or Kaggle's solution (.csv). Raises DataError when it is missing or damaged."""
    if url.endswith(".csv"):
        return _load_kaggle(url)
    shown = redaction.redact(url)
    if url.endswith((".tar", ".tar.gz", ".tgz")):
        meta, truth = _read_devkit_tar(url)
    else:
        paths = (META_PATH, GROUND_TRUTH_PATH)
        meta, truth = (read_bounded(file_io.join(url, path), f"{shown}/{path}", MAX_DEVKIT_BYTES) for path in paths)
    words, wnids = _parse_synsets(meta, shown)
    try:
        numbers = [int(line) for line in truth.split()]
    except ValueError as error:
        raise DataError(f"{shown}: {GROUND_TRUTH_PATH}: damaged: {error}") from None
    for line, number in enumerate(numbers, start=1):
        if number not in wnids:
            raise DataError(f"{shown}: {GROUND_TRUTH_PATH}: line {line}: {number} is the id of no class")
    return Devkit(words, {VALIDATION_NAME.format(line): wnids[number] for line, number in enumerate(numbers, 1)})


def _load_kaggle(url: str) -> Devkit:
    """Load Kaggle's solution of the validation split, and the names of the classes from the file beside it."""
    mapping = file_io.join(url.rpartition("/")[0], MAPPING)
    words: dict[str, str] = {}
    for line in read_text(mapping, redaction.redact(mapping)).splitlines():
        wnid, _, title = line.strip().partition(" ")
        words[wnid] = title.strip()
    wnids: dict[str, str] = {}
    for number, line in enumerate(read_text(url, redaction.redact(url)).splitlines(), start=1):
        name, _, boxes = line.replace('"', "").partition(",")
        found = set(boxes.split()[::5])  # of each box: its class, then four numbers
        if number == 1 and name == "ImageId":
            continue
        if len(found) != 1 or not found <= words.keys() or name in wnids:
            rule = f"must be a new image and boxes of one class of {MAPPING}, got {line[:80]!r}"
            raise DataError(f"{redaction.redact(url)}: line {number}: {rule}")
        wnids[name] = found.pop()
    return Devkit(words, wnids)


def _read_devkit_tar(url: str) -> tuple[bytes, bytes]:
    shown = redaction.redact(url)
    data, found = read_bounded(url, shown, MAX_DEVKIT_BYTES), dict[str, bytes]()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as tar:
            for member in tar:
                if member.size > MAX_DEVKIT_BYTES:
                    raise DataError(f"{shown}: {member.name!r}: {member.size} bytes: over {MAX_DEVKIT_BYTES}")
                path = "/".join(member.name.split("/")[-2:])
                if path in (META_PATH, GROUND_TRUTH_PATH) and (body := tar.extractfile(member)) is not None:
                    found[path] = body.read()
        return found[META_PATH], found[GROUND_TRUTH_PATH]
    except KeyError as error:
        raise DataError(f"{shown}: truncated, or no devkit of ILSVRC2012: {error} is not in it") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shown}: no readable tar: {error}") from None


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
        raise DataError(f"{shown}: {META_PATH}: damaged, or not of ILSVRC2012: {error!r}") from None
    if not words:
        raise DataError(f"{shown}: {META_PATH}: no synset without children")
    return words, wnids
