"""ILSVRC2012 as it comes: a training tar of tars, a flat validation tar, a devkit; or the same in folders; or Kaggle's.

Nothing is unpacked: each image is a range of the outer tar. Keys are the same for tars and folders, so that both give
the same dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from orchestrator.config import redaction
from orchestrator.data.build.sources import devkit, folder, listing
from orchestrator.data.build.sources.config import IlsvrcSource
from orchestrator.data.build.sources.devkit import Devkit
from orchestrator.data.build.sources.listing import ImageRow, SourceListing, SplitListing
from orchestrator.data.build.tar_reader import HeaderReader, MemberRange, iter_member_ranges
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io
from orchestrator.storage.ranged_reads import RangeReader

_KAGGLE = "ILSVRC/Data/CLS-LOC"
# In order of preference: tars need fewer requests. Both give the same dataset.
STANDARD_NAMES = {
    "train": ("ILSVRC2012_img_train.tar", "train", f"{_KAGGLE}/train"),
    "validation": ("ILSVRC2012_img_val.tar", "val", "validation", f"{_KAGGLE}/val"),
    "devkit": ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", devkit.SOLUTION),
}
# Inner tars are walked side by side: of a remote one every byte comes over the network.
WALK_THREADS = 16


def find_roots(source: IlsvrcSource) -> dict[str, str]:
    """Return the URL of the tar or folder of each split, and of the devkit when there is one.

    Raises DataError when there are no training images, or validation images neither there nor to be held out.
    """
    names = set(file_io.list_names(source.url)) if source.url else set()
    found = {
        place: file_io.join(source.url, name)
        for place, standard in STANDARD_NAMES.items()
        for name in reversed(standard)
        if name.partition("/")[0] in names
    } | {place: url for place in STANDARD_NAMES if (url := getattr(source, place))}
    if "train" not in found:
        raise DataError(
            f"source.url: {redaction.redact(source.url)}: neither {' nor '.join(STANDARD_NAMES['train'])} there"
        )
    if "validation" in found:
        folder.check_no_holdout(source.holdout, found["validation"])
    else:
        folder.require_holdout(source.url or found["train"], source.holdout)
    return found


def list_images(source: IlsvrcSource, places: Mapping[str, str]) -> SourceListing:
    """Return the listing of the places that `find_roots` returned.

    Raises DataError for a tar that is truncated or damaged, an unknown class, or labels that do not fit.
    """
    kit = devkit.load_devkit(places["devkit"]) if "devkit" in places else None
    classes = tuple(sorted(kit.words)) if kit else None
    ignored: Counter[str] = Counter()
    with closing(RangeReader(WALK_THREADS)) as ranges:
        if places["train"].endswith(".tar"):
            classes, train = _list_tar_of_tars(places["train"], classes, ignored, ranges)
        else:
            classes, train = folder.list_class_folders(places["train"], classes, ignored)
        splits = {"train": train}
        if "validation" in places:
            splits["validation"] = _list_validation(places["validation"], classes, kit, ignored, ranges)
        elif source.holdout:
            splits["train"], splits["validation"] = listing.hold_out(train, source.holdout)
    titles = tuple(kit.words[wnid] for wnid in classes) if kit else ()
    return SourceListing(classes, titles, splits, dict(sorted(ignored.items())))


def _list_tar_of_tars(
    url: str, classes: tuple[str, ...] | None, ignored: Counter[str], ranges: RangeReader
) -> tuple[tuple[str, ...], SplitListing]:
    shown = redaction.redact(url)
    inner: dict[str, MemberRange] = {}
    for member in iter_member_ranges(_open_headers(ranges, url)):
        if not member.name.endswith(".tar"):
            ignored[folder.get_extension(member.name)] += 1
            continue
        wnid = listing.make_key(member.name).rpartition("/")[2]
        if wnid in inner:
            raise DataError(f"{shown}: {inner[wnid].name!r} and {member.name!r} are both of class {wnid}")
        inner[wnid] = member
    if classes is None:
        classes = tuple(sorted(inner))
        listing.check_classes(url, classes)
    elif unknown := sorted(inner.keys() - set(classes)):
        raise DataError(
            f"{shown}: {inner[unknown[0]].name!r}: class {unknown[0]} is not among the {len(classes)} classes of the "
            f"devkit ({len(unknown)} such classes)"
        )
    numbers = {name: number for number, name in enumerate(classes)}

    def walk(wnid: str) -> list[MemberRange]:
        tar = inner[wnid]
        return list(iter_member_ranges(_open_headers(ranges, url), tar.offset, tar.offset + tar.length, tar.name))

    def rows() -> Iterator[ImageRow]:
        with ThreadPoolExecutor(WALK_THREADS) as pool:
            for wnid, images in zip(inner, pool.map(walk, inner), strict=True):
                for image in _select_images(images, ignored):
                    name = f"{inner[wnid].name}/{image.name}"
                    key, path = f"{wnid}/{listing.make_key(image.name)}", f"{wnid}/{image.name}"
                    yield ImageRow(key, name, numbers[wnid], image.offset, image.length, path)

    return classes, listing.build_split_listing(url, True, rows())


def _list_validation(
    url: str, classes: tuple[str, ...], kit: Devkit | None, ignored: Counter[str], ranges: RangeReader
) -> SplitListing:
    """Return the listing of a flat tar, a flat folder, or a folder per class."""
    is_tar = url.endswith(".tar")
    if is_tar:
        images = sorted(_select_images(iter_member_ranges(_open_headers(ranges, url)), ignored))
    else:
        images = [MemberRange(file.name, 0, file.length) for file in folder.list_flat_folder(url, ignored)]
        if not images:
            return folder.list_class_folders(url, classes, ignored, bare=True)[1]
    if kit is None:
        raise DataError(
            f"source.devkit: needed: the labels of {redaction.redact(url)} are in "
            f"{' or '.join(STANDARD_NAMES['devkit'])}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    paths = [image.name.rpartition("/")[2] for image in images]
    wnids = kit.get_validation_wnids([path.rpartition(".")[0] for path in paths])
    rows = (
        ImageRow(listing.make_key(path), image.name, numbers[wnid], image.offset, image.length, path)
        for image, path, wnid in zip(images, paths, wnids, strict=True)
    )
    return listing.build_split_listing(url, is_tar, rows)


def _select_images(found: Iterator[MemberRange] | list[MemberRange], ignored: Counter[str]) -> Iterator[MemberRange]:
    for member in found:
        if folder.is_image(member.name):
            yield member
        else:
            ignored[folder.get_extension(member.name)] += 1


def _open_headers(ranges: RangeReader, url: str) -> HeaderReader:
    try:
        return HeaderReader(ranges, url)
    except FileNotFoundError:
        raise DataError(f"source: {redaction.redact(url)}: missing") from None
