"""ILSVRC2012 as it comes: a training tar of tars, a flat validation tar, a devkit; or the same in folders; or Kaggle's.

Nothing is unpacked: each image is a range of the outer tar. Keys are the same for tars and folders, so that both give
the same dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from orchestrator.data.errors import DataError
from orchestrator.data.sources import devkit, folder, keys, listing
from orchestrator.data.sources.config import IlsvrcSource
from orchestrator.data.sources.devkit import Devkit
from orchestrator.data.sources.listing import Listing, Row, SplitListing
from orchestrator.data.sources.members import Headers, Member, members
from orchestrator.data.tars import escape_undecodable
from orchestrator.storage import files, urls
from orchestrator.storage.ranged import Ranges

_KAGGLE = "ILSVRC/Data/CLS-LOC"
# In order of preference: tars need fewer requests. Both give the same dataset.
STANDARD = {
    "train": ("ILSVRC2012_img_train.tar", "train", f"{_KAGGLE}/train"),
    "validation": ("ILSVRC2012_img_val.tar", "val", "validation", f"{_KAGGLE}/val"),
    "devkit": ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", devkit.SOLUTION),
}
# Inner tars are walked side by side: of a remote one every byte comes over the network.
WALKERS = 16


def roots(source: IlsvrcSource) -> dict[str, str]:
    """URL of the tar or folder of each split, and of the devkit when there is one (for `listed`).

    Raises DataError when there are no training images, or validation images neither there nor to be held out.
    """
    names = set(files.list_names(source.url)) if source.url else set()
    found = {
        place: files.join(source.url, name)
        for place, standard in STANDARD.items()
        for name in reversed(standard)
        if name.partition("/")[0] in names
    } | {place: url for place in STANDARD if (url := getattr(source, place))}
    if "train" not in found:
        raise DataError(f"source.url: {urls.redact(source.url)}: neither {' nor '.join(STANDARD['train'])} there")
    if "validation" in found:
        folder.refuse_holdout(source.holdout, found["validation"])
    else:
        folder.held_out(source.url or found["train"], source.holdout)
    return found


def listed(source: IlsvrcSource, places: Mapping[str, str]) -> Listing:
    """The listing of the places that `roots` found.

    Raises DataError for a tar that is cut or damaged, an unknown class, or labels that do not fit.
    """
    kit = devkit.load(places["devkit"]) if "devkit" in places else None
    classes = tuple(sorted(kit.words)) if kit else None
    ignored: Counter[str] = Counter()
    with closing(Ranges(WALKERS)) as ranges:
        if places["train"].endswith(".tar"):
            classes, train = _tar_of_tars(places["train"], classes, ignored, ranges)
        else:
            classes, train = folder.per_class(places["train"], classes, ignored)
        splits = {"train": train}
        if "validation" in places:
            splits["validation"] = _validation(places["validation"], classes, kit, ignored, ranges)
        elif source.holdout:
            splits["train"], splits["validation"] = listing.hold_out(train, source.holdout)
    titles = tuple(kit.words[wnid] for wnid in classes) if kit else ()
    return Listing(classes, titles, splits, dict(sorted(ignored.items())))


def _tar_of_tars(
    url: str, classes: tuple[str, ...] | None, ignored: Counter[str], ranges: Ranges
) -> tuple[tuple[str, ...], SplitListing]:
    shown = urls.redact(url)
    inner: dict[str, Member] = {}
    for member in members(_headers(ranges, url)):
        if not member.name.endswith(".tar"):
            ignored[escape_undecodable(member.name.rpartition(".")[2].lower())] += 1
            continue
        wnid = keys.of_name(member.name).rpartition("/")[2]
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

    def walk(wnid: str) -> list[Member]:
        tar = inner[wnid]
        return list(members(_headers(ranges, url), tar.offset, tar.offset + tar.length, tar.name))

    def rows() -> Iterator[Row]:
        with ThreadPoolExecutor(WALKERS) as pool:
            for wnid, images in zip(inner, pool.map(walk, inner), strict=True):
                for image in _images(images, ignored):
                    name = f"{inner[wnid].name}/{image.name}"
                    key, path = f"{wnid}/{keys.of_name(image.name)}", f"{wnid}/{image.name}"
                    yield Row(key, name, numbers[wnid], image.offset, image.length, path)

    return classes, listing.split(url, True, rows())


def _validation(
    url: str, classes: tuple[str, ...], kit: Devkit | None, ignored: Counter[str], ranges: Ranges
) -> SplitListing:
    """The listing of a flat tar, a flat folder, or a folder per class."""
    is_tar = url.endswith(".tar")
    if is_tar:
        images = sorted(_images(members(_headers(ranges, url)), ignored))
    else:
        images = [Member(file.name, 0, file.length) for file in folder.flat(url, ignored)]
        if not images:
            return folder.per_class(url, classes, ignored, bare=True)[1]
    if kit is None:
        raise DataError(
            f"source.devkit: needed: the labels of {urls.redact(url)} are in {' or '.join(STANDARD['devkit'])}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    paths = [image.name.rpartition("/")[2] for image in images]
    wnids = kit.validation_classes([path.rpartition(".")[0] for path in paths])
    rows = (
        Row(keys.of_name(path), image.name, numbers[wnid], image.offset, image.length, path)
        for image, path, wnid in zip(images, paths, wnids, strict=True)
    )
    return listing.split(url, is_tar, rows)


def _images(found: Iterator[Member] | list[Member], ignored: Counter[str]) -> Iterator[Member]:
    for member in found:
        if folder.is_image(member.name):
            yield member
        else:
            ignored[escape_undecodable(member.name.rpartition(".")[2].lower()) if "." in member.name else ""] += 1


def _headers(ranges: Ranges, url: str) -> Headers:
    try:
        return Headers(ranges, url)
    except FileNotFoundError:
        raise DataError(f"source: {urls.redact(url)}: missing") from None
