"""ILSVRC2012 in miniature: tars and folders give the same listing; each way in which they may not fit is an error."""

import io
import tarfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.data.build.config import IlsvrcSource
from orchestrator.data.build.sources import ilsvrc
from orchestrator.data.build.sources.listing import SourceListing
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io
from orchestrator.storage.ranged_reads import RangeReader
from tests.support import imagenet
from tests.support.imagenet import CLASSES, WNIDS, WORDS, Members

TRAIN = "ILSVRC2012_img_train.tar"


def listed(folder: Path | str, **fields: object) -> SourceListing:
    source = IlsvrcSource.from_dict({"url": str(folder), **fields}).resolve()
    images = ilsvrc.IlsvrcLister(source)
    return images.list_images(images.find_roots())


def images(found: SourceListing, split: str) -> dict[str, tuple[int, bytes]]:
    """Label and bytes by key, each by one ranged read."""
    part = found.splits[split]
    rows = zip(part.keys, part.names, part.labels.tolist(), part.offsets.tolist(), part.lengths.tolist(), strict=True)
    with closing(RangeReader(2)) as ranges:
        return {
            key: (
                label,
                bytes(ranges.read(part.root if part.is_tar else file_io.join(part.root, name), offset, length)),
            )
            for key, name, label, offset, length in rows
        }


def expected() -> dict[str, dict[str, tuple[int, bytes]]]:
    train = {
        f"{wnid}/{name.partition('.')[0]}": (CLASSES.index(wnid), data)
        for wnid, members in imagenet.training().items()
        for name, data in members
    }
    members, ids = imagenet.validation()
    validation = {
        name.partition(".")[0]: (CLASSES.index(WNIDS[number - 1]), data)
        for (name, data), number in zip(members, ids, strict=True)
    }
    return {"train": train, "validation": validation}


def test_tars_are_listed_without_being_unpacked(tmp_path: Path) -> None:
    found = listed(imagenet.as_it_comes(tmp_path))
    assert found.classes == CLASSES
    assert found.titles == tuple(WORDS[WNIDS.index(wnid)] for wnid in CLASSES)
    assert {split: images(found, split) for split in found.splits} == expected()
    assert found.splits["train"].root == str(tmp_path / TRAIN)


@pytest.mark.parametrize("flat", [True, False])
def test_folders_give_the_same(tmp_path: Path, flat: bool) -> None:
    found = listed(imagenet.in_folders(tmp_path / "folders", flat))
    assert {split: images(found, split) for split in found.splits} == expected()
    assert found.classes == CLASSES
    assert bool(found.titles) == flat, "without a devkit there are no titles"
    if flat:
        assert found.digest() == listed(imagenet.as_it_comes(tmp_path / "tars")).digest()


def test_a_store_gives_the_same(tmp_path: Path) -> None:
    for path in imagenet.as_it_comes(tmp_path).iterdir():
        file_io.write_bytes(f"memory://ilsvrc/{path.name}", path.read_bytes())
    found = listed("memory://ilsvrc")
    assert found.digest() == listed(tmp_path).digest()
    assert images(found, "train") == expected()["train"]


def test_each_part_may_lie_elsewhere(tmp_path: Path) -> None:
    imagenet.as_it_comes(tmp_path / "a")
    imagenet.in_folders(tmp_path / "b")
    places = {
        "train": str(tmp_path / "a" / TRAIN),
        "validation": str(tmp_path / "b/val"),
        "devkit": str(tmp_path / "a/ILSVRC2012_devkit_t12.tar.gz"),
    }
    assert listed("", **places).digest() == listed(tmp_path / "a").digest()
    with pytest.raises(ConfigError, match=r"source\.url: needed"):
        listed("", validation=places["validation"])


def test_without_validation_images_a_share_is_held_out(tmp_path: Path) -> None:
    (imagenet.as_it_comes(tmp_path) / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(DataError, match=r"no validation images: set --source\.holdout"):
        listed(tmp_path)
    found = listed(tmp_path, holdout=0.2)
    assert images(found, "train") | images(found, "validation") == expected()["train"]
    assert {len(found.splits["train"]), len(found.splits["validation"])} == {25, 6}


def test_a_class_without_training_images_is_still_a_class(tmp_path: Path) -> None:
    train = {wnid: members for wnid, members in imagenet.training().items() if wnid != CLASSES[1]}
    found = listed(imagenet.as_it_comes(tmp_path, train))
    assert found.classes == CLASSES
    assert set(found.splits["train"].labels.tolist()) == {0, 2, 3}


# ------------------------------------------------------------------ names that point elsewhere
def test_names_in_tars_become_keys_and_never_paths(tmp_path: Path) -> None:
    train: dict[str, Members] = {wnid: [(f"{wnid}_0.JPEG", b"x")] for wnid in WNIDS}
    train[WNIDS[0]] = [("../../../evil.JPEG", b"a"), ("/etc/cron.JPEG", b"b"), ("notes.txt", b"c")]
    found = listed(imagenet.as_it_comes(tmp_path / "in", train))
    assert {key for key in found.splits["train"].keys if key.startswith(WNIDS[0])} == {
        f"{WNIDS[0]}/evil",
        f"{WNIDS[0]}/etc/cron",
    }
    assert found.ignored == {"txt": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ------------------------------------------------------------------ truncation
def test_a_training_tar_that_is_cut_is_an_error_with_its_byte(tmp_path: Path) -> None:
    path = imagenet.as_it_comes(tmp_path, {wnid: [(f"{wnid}_0.JPEG", b"x" * 700)] for wnid in WNIDS}) / TRAIN
    data = path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        outer = tar.getmembers()
    end = outer[-1].offset_data + -(-outer[-1].size // 512) * 512
    cuts = {"header": outer[2].offset + 100, "body": outer[2].offset_data + 900, "between": outer[2].offset, "end": end}
    for cut in cuts.values():
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=rf"ILSVRC2012_img_train\.tar: truncated at byte {cut}"):
            listed(tmp_path)


def test_a_validation_tar_that_is_cut_is_an_error(tmp_path: Path) -> None:
    path = imagenet.as_it_comes(tmp_path) / "ILSVRC2012_img_val.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"ILSVRC2012_img_val\.tar: truncated at byte 5000"):
        listed(tmp_path)


# ------------------------------------------------------------------ what does not fit
def refused(folder: Path, said: str, **fields: object) -> None:
    with pytest.raises(DataError, match=said):
        listed(folder, **fields)


def test_a_class_that_the_devkit_does_not_know(tmp_path: Path) -> None:
    train = {**imagenet.training(), "n99999999": [("a.JPEG", b"x")]}
    refused(imagenet.as_it_comes(tmp_path, train), r"img_train\.tar: class 'n99999999' is not among the 4 classes")


def test_one_class_twice(tmp_path: Path) -> None:
    inner = imagenet.tar([("a.JPEG", b"x")])
    imagenet.write(tmp_path, [(TRAIN, imagenet.tar([("n01.tar", inner), ("more/n01.tar", inner)]))])
    refused(tmp_path, r"'n01\.tar' and 'more/n01\.tar' are both of class n01", holdout=0.0)


def test_one_class_only(tmp_path: Path) -> None:
    imagenet.write(tmp_path, [(TRAIN, imagenet.tar([("n01.tar", imagenet.tar([("a.JPEG", b"x")]))]))])
    refused(tmp_path, r"1 class\(es\) \(n01\): at least 2", holdout=0.0)


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path, "neither ILSVRC2012_img_train.tar nor train nor ILSVRC/Data/CLS-LOC/train there")
    refused(tmp_path, r"x\.tar: missing", train=str(tmp_path / "x.tar"), holdout=0.0)
    imagenet.write(tmp_path, [(TRAIN, b"")])
    refused(tmp_path, "empty: 0 bytes are no tar", holdout=0.0)


def test_labels_and_images_that_do_not_fit(tmp_path: Path) -> None:
    imagenet.in_folders(tmp_path)
    (tmp_path / "val/ILSVRC2012_val_00000003.JPEG").unlink()
    refused(tmp_path, "a label for 'ILSVRC2012_val_00000003', which is missing")


def test_a_flat_folder_needs_the_devkit(tmp_path: Path) -> None:
    imagenet.as_it_comes(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    refused(tmp_path, r"source\.devkit: needed: the labels of .*img_val\.tar are in")


# ------------------------------------------------------------------ devkit
def devkit_at(folder: Path, changed: Mapping[str, bytes] | None = None) -> str:
    imagenet.write(folder, {**dict(imagenet.devkit([1, 2, 3])), **(changed or {})}.items())
    return str(folder)


def test_classes_are_the_synsets_without_children(tmp_path: Path) -> None:
    kit = ilsvrc.load_devkit(devkit_at(tmp_path))
    assert kit.words == dict(zip(WNIDS, WORDS, strict=True))
    names = [ilsvrc.VALIDATION_NAME.format(number) for number in (1, 2, 3)]
    assert kit.wnids == dict(zip(names, WNIDS, strict=False))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (ilsvrc.META_PATH, b"not a mat file at all", r"meta\.mat: damaged"),
        (ilsvrc.META_PATH, b"", r"meta\.mat: damaged"),
        (ilsvrc.META_PATH, imagenet.meta_mat()[:300], r"meta\.mat: damaged"),
        (ilsvrc.META_PATH, imagenet.meta_mat((), ()), "no synset without children"),
        (ilsvrc.META_PATH, imagenet.meta_mat(("n1", "n1"), ("a", "b")), r"synset 2 \(n1\) is there twice"),
        (ilsvrc.GROUND_TRUTH_PATH, b"1\ntwo\n3\n", "ground_truth.txt: damaged"),
    ],
)
def test_a_damaged_devkit_is_an_error(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ilsvrc.load_devkit(devkit_at(tmp_path, {name: data}))


def test_an_id_of_a_synset_with_children_is_no_label(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: 5 is the id of no class"):
        ilsvrc.load_devkit(devkit_at(tmp_path, {ilsvrc.GROUND_TRUTH_PATH: b"1\n5\n3\n"}))


def test_a_devkit_that_lacks_a_file_or_is_cut(tmp_path: Path) -> None:
    folder = devkit_at(tmp_path / "kit")
    (tmp_path / "kit" / ilsvrc.META_PATH).unlink()
    with pytest.raises(DataError, match=r"data/meta\.mat: missing"):
        ilsvrc.load_devkit(folder)
    packed = imagenet.as_it_comes(tmp_path / "tars") / "ILSVRC2012_devkit_t12.tar.gz"
    packed.write_bytes(packed.read_bytes()[:400])
    with pytest.raises(DataError, match=r"devkit_t12\.tar\.gz: (no readable tar|truncated)"):
        ilsvrc.load_devkit(str(packed))
    with pytest.raises(DataError, match=r"none\.tar\.gz: missing"):
        ilsvrc.load_devkit(str(tmp_path / "none.tar.gz"))


# ------------------------------------------------------------------ Kaggle's lists
def test_kaggles_files_give_the_same(tmp_path: Path) -> None:
    kaggle = imagenet.as_kaggle_has_it(tmp_path / "kaggle")
    of_tars = listed(imagenet.as_it_comes(tmp_path / "tars"))
    found = listed(kaggle)
    assert {split: images(found, split) for split in found.splits} == expected()
    assert (found.classes, found.titles, found.digest()) == (of_tars.classes, of_tars.titles, of_tars.digest())
    parts = listed(kaggle / "ILSVRC/Data/CLS-LOC", devkit=str(kaggle / ilsvrc.SOLUTION))
    assert parts.digest() == found.digest()


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        (ilsvrc.SOLUTION, "ILSVRC2012_val_00000001,n02105855 1 2 3 4", r"no label for .*\(1 labels, 10 images\)"),
        (ilsvrc.SOLUTION, "a,n02105855 1 2 3 4\na,n02105855 1 2 3 4", "line 2: must be a new image"),
        (
            ilsvrc.SOLUTION,
            "a,n02105855 1 2 3 4 n01440764 1 2 3 4",
            "line 1: must be a new image and boxes of one class",
        ),
        (ilsvrc.SOLUTION, "a,n00000000 1 2 3 4", "line 1: must be a new image and boxes of one class"),
        (ilsvrc.SOLUTION, "ImageId,PredictionString\n\n", "line 2: must be a new image and boxes of one class"),
        (ilsvrc.SOLUTION, "\n".join(f"{n},n02105855 1 2 3 4" for n in range(10)), "no label for .*'ILSVRC2012_val_0"),
        (ilsvrc.MAPPING, "\xff", "LOC_synset_mapping.txt: no text in UTF-8"),
    ],
)
def test_lists_of_kaggle_that_do_not_fit(tmp_path: Path, name: str, lines: str, said: str) -> None:
    (imagenet.as_kaggle_has_it(tmp_path) / name).write_bytes(lines.encode("latin1"))
    refused(tmp_path, said)


def test_kaggles_solution_needs_the_names_of_the_classes(tmp_path: Path) -> None:
    (imagenet.as_kaggle_has_it(tmp_path) / ilsvrc.MAPPING).unlink()
    refused(tmp_path, r"LOC_synset_mapping\.txt: missing")
