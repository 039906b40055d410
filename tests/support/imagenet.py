"""ILSVRC2012 in miniature: a training tar of tars, a flat validation tar, a devkit with a real .mat, odd images."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from scipy.io import savemat

from tests.support import tiny_shards

# In the order of their ILSVRC2012_ID, which is not that of the wnids.
WNIDS = ("n02105855", "n01440764", "n07697537", "n01443537")
WORDS = ("Shetland sheepdog, Shetland sheep dog", "tench, Tinca tinca", "hotdog, hot dog", "goldfish")
INTERNAL = ("n00001740", "n02083346")  # synsets with children: no classes
CLASSES = tuple(sorted(WNIDS))

Members = list[tuple[str, bytes]]


# ------------------------------------------------------------------ odd images
def exif(data: bytes, number: int = 0) -> bytes:
    """A JPEG with these bytes as its EXIF data."""
    body = b"Exif\0\0" + data
    image = tiny_shards.jpeg(number)
    return image[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + image[2:]


def oriented(orientation: int, number: int = 0) -> bytes:
    """A JPEG whose EXIF data tell an orientation."""
    entry = (0x0112).to_bytes(2, "big") + (3).to_bytes(2, "big") + (1).to_bytes(4, "big")
    tiff = b"MM\0*" + (8).to_bytes(4, "big") + (1).to_bytes(2, "big") + entry + orientation.to_bytes(2, "big")
    return exif(tiff + bytes(2) + bytes(4), number)


def ycck(number: int = 0) -> bytes:
    """A JPEG of inverted cyan, magenta, yellow and black, as some training images are."""
    pixels = np.dstack([tiny_shards.picture(number), np.full((30, 40), 200, dtype=np.uint8)])
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90, colorspace="CMYK"))


def bomb(side: int = 65_000) -> bytes:
    """A small JPEG whose header claims side x side pixels."""
    image = bytearray(tiny_shards.jpeg(0))
    frame = image.index(b"\xff\xc0")
    image[frame + 5 : frame + 9] = side.to_bytes(2, "big") * 2
    return bytes(image)


def odd() -> dict[str, bytes]:
    """An image for each oddity, by its name in the report; all can be decoded."""
    return {
        "png-named-jpeg": tiny_shards.encoded("RGB", "PNG", 1),
        "cmyk": tiny_shards.encoded("CMYK", "JPEG", 2),
        "ycck": ycck(3),
        "grey": tiny_shards.encoded("L", "JPEG", 4),
        "exif-broken": exif(b"MM\0*\0\0\0\x08\0\x50short", 5),
        "exif-rotated": oriented(6, 6),
        "progressive": tiny_shards.encoded("RGB", "JPEG", 7, progressive=True),
    }


def broken() -> dict[str, bytes]:
    """Images that cannot be used, each with a name of its own."""
    return {
        "cut": tiny_shards.jpeg(9, 200, 150)[:1500],
        "bomb": bomb(),
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
    }


# ------------------------------------------------------------------ training and validation images
def training(per_class: int = 6, more: Mapping[str, bytes] | None = None) -> dict[str, Members]:
    """Names and bytes of each class's images; the odd ones, and `more`, are among those of the first class."""
    images = {
        wnid: [(f"{wnid}_{n}.JPEG", tiny_shards.jpeg(100 * c + n, 40 + n, 30)) for n in range(per_class)]
        for c, wnid in enumerate(WNIDS)
    }
    added = {**odd(), **(more or {})}
    images[WNIDS[0]] += [(f"{WNIDS[0]}_{1000 + n}.JPEG", image) for n, image in enumerate(added.values())]
    return images


def validation(count: int = 10) -> tuple[Members, list[int]]:
    """Names and bytes of the validation images in their order, and the ILSVRC2012_ID of each."""
    images = [(f"ILSVRC2012_val_{n:08d}.JPEG", tiny_shards.jpeg(500 + n)) for n in range(1, count + 1)]
    return images, [n * 3 % len(WNIDS) + 1 for n in range(count)]


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar as GNU tar makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# ------------------------------------------------------------------ devkit
def meta_mat(wnids: Iterable[str] = WNIDS, words: Iterable[str] = WORDS) -> bytes:
    """data/meta.mat: classes first, with ids from 1 on, then synsets that have children."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    kinds: list[tuple[str, Any]] = [(name, object) for name in (*fields, "num_train_images")]
    named = list(zip(wnids, words, strict=True))
    rows: list[tuple[Any, ...]] = [
        (float(n), wnid, said, "a gloss", 0.0, np.zeros((1, 0)), 0.0, 1300.0)
        for n, (wnid, said) in enumerate(named, start=1)
    ]
    last = len(rows)
    for n, wnid in enumerate(INTERNAL, start=1):
        rows.append((float(last + n), wnid, "entity", "that which", 2.0, np.array([[1.0, 2.0]]), float(n), 0.0))
    synsets = np.empty((len(rows), 1), dtype=kinds)
    for n, row in enumerate(rows):
        synsets[n, 0] = row
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=True)
    return buffer.getvalue()


def devkit(ids: Iterable[int]) -> Members:
    """The devkit's files below its folder."""
    truth = "".join(f"{number}\n" for number in ids).encode()
    return [
        ("readme.txt", b"ILSVRC2012 in miniature"),
        ("data/meta.mat", meta_mat()),
        ("data/ILSVRC2012_validation_ground_truth.txt", truth),
    ]


# ------------------------------------------------------------------ on disk
def write(folder: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """The members as files."""
    for name, data in members:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def as_it_comes(folder: Path, train: Mapping[str, Members] | None = None, count: int = 10) -> Path:
    """The three tars; the folder."""
    images, ids = validation(count)
    train = training() if train is None else train
    packed_devkit = io.BytesIO()
    with tarfile.open(fileobj=packed_devkit, mode="w:gz") as archive:
        for name, data in devkit(ids):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    files = [
        ("ILSVRC2012_img_train.tar", tar((f"{wnid}.tar", tar(inner)) for wnid, inner in train.items())),
        ("ILSVRC2012_img_val.tar", tar(reversed(images))),
        ("ILSVRC2012_devkit_t12.tar.gz", packed_devkit.getvalue()),
    ]
    write(folder, files)
    return folder


def as_kaggle_has_it(folder: Path) -> Path:
    """Kaggle's folders, with the solution in no order; the folder."""
    images, ids = validation()
    inner = folder / "ILSVRC/Data/CLS-LOC"
    for wnid, members in training().items():
        write(inner / "train" / wnid, members)
    write(inner / "val", images)
    labels = zip(images, [WNIDS[number - 1] for number in ids], strict=True)
    rows = [f"{name.partition('.')[0]},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n" for (name, _), wnid in labels]
    mapping = "".join(f"{wnid} {said}\n" for wnid, said in zip(WNIDS, WORDS, strict=True))
    write(folder, [("LOC_val_solution.csv", "".join(["ImageId,PredictionString\n", *reversed(rows)]).encode()),
                   ("LOC_synset_mapping.txt", mapping.encode())])  # fmt: skip
    return folder


def in_folders(folder: Path, flat: bool = True, train: Mapping[str, Members] | None = None) -> Path:
    """The usual folders: train/WNID/*, and val/* with a devkit or val/WNID/*; the folder."""
    images, ids = validation()
    train = training() if train is None else train
    for wnid, members in train.items():
        write(folder / "train" / wnid, members)
    if flat:
        write(folder / "val", images)
        write(folder / "ILSVRC2012_devkit_t12", devkit(ids))
    else:
        for (name, data), number in zip(images, ids, strict=True):
            write(folder / "val" / WNIDS[number - 1], [(name, data)])
    return folder
