"""Keys from names, listings sorted by key, and shares held out by hashes of keys."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.errors import ConfigError
from orchestrator.data.build import tar_writer
from orchestrator.data.build.config import FolderSource
from orchestrator.data.build.shard_scan import index_tar
from orchestrator.data.build.sources import listing
from orchestrator.data.build.sources.listing import FolderLister, ImageRow, SourceListing
from orchestrator.data.build.tar_writer import RawSample, encode_tar
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io


def rows(per_class: list[int]) -> list[ImageRow]:
    return [
        ImageRow(f"c{c}/{n:04d}", f"c{c}/{n:04d}.jpg", c, 0, 100)
        for c, size in enumerate(per_class)
        for n in range(size)
    ]


# ------------------------------------------------------------------ keys
@pytest.mark.parametrize(
    ("name", "key"),
    [("n01/n01_1.JPEG", "n01/n01_1"), ("a.b.c.jpg", "a_b_c"), ("/etc/passwd.png", "etc/passwd"),
     ("../../x.jpg", "x"), ("a/./../b.jpg", "a/b"), ("001.Albatross/a b.jpg", "001.Albatross/a_b"),
     ("图/é.png", "图/é"), ("bad\udcff.jpg", "bad_"), ("new\nline\\.jpg", "new_line_"), ("..", "_"), ("", "_"),
     ("noextension", "noextension"), (".jpg", "_jpg"), ("a//b.jpg", "a/b")],
)  # fmt: skip
def test_keys_of_names(name: str, key: str) -> None:
    assert listing.make_key(name) == key


@given(st.text(st.characters(exclude_categories=()), max_size=40))
def test_every_key_comes_back_from_a_tar(name: str) -> None:
    key = listing.make_key(name)
    list(tar_writer._check_samples([tar_writer.RawSample(key, b"", 0)], 1))
    assert list(index_tar(encode_tar([RawSample(key, b"image", 3)]), "x.tar").keys) == [key]


# ------------------------------------------------------------------ listings
def test_a_listing_is_sorted_by_key_whatever_came_first() -> None:
    made = rows([3, 2])
    one, other = listing.build_split_listing("/x", False, made), listing.build_split_listing("/y", False, made[::-1])
    assert tuple(one.keys) == tuple(other.keys) == tuple(row.key for row in made)
    assert one.labels.tolist() == [0, 0, 0, 1, 1]
    digests = {SourceListing(("a", "b"), (), {"train": split}, {}).digest() for split in (one, other)}
    assert len(digests) == 1, "the place is no part of it"


def test_another_label_length_or_key_is_another_listing() -> None:
    def digest(*made: ImageRow) -> str:
        return SourceListing(("a", "b"), (), {"train": listing.build_split_listing("/x", False, made)}, {}).digest()

    a = ImageRow("k", "k.jpg", 0, 0, 100)
    others = (a, a._replace(label=1), a._replace(length=101), a._replace(key="l"))
    assert len({digest(row) for row in others}) == 4


def test_two_images_of_one_key_are_errors_by_name() -> None:
    pair = [ImageRow("a", "a.jpg", 0, 0, 1), ImageRow("b", "b.jpg", 0, 0, 1), ImageRow("a", "a.png", 1, 0, 1)]
    with pytest.raises(DataError, match=r"'a\.jpg' and 'a\.png' would both get the key 'a'"):
        listing.build_split_listing("/x", False, pair)


def test_no_images_are_errors() -> None:
    with pytest.raises(DataError, match="/x: no images there"):
        listing.build_split_listing("/x", False, [])


# ------------------------------------------------------------------ holding out
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.sampled_from([0.05, 0.1, 0.5, 0.95]))
def test_each_class_gives_its_share_and_keeps_an_image(sizes: list[int], share: float) -> None:
    whole = listing.build_split_listing("/x", False, rows(sizes))
    train, held = listing.hold_out(whole, share)
    assert sorted([*train.keys, *held.keys]) == list(whole.keys)
    for label, size in enumerate(sizes):
        count = int((held.labels == label).sum())
        assert count <= size - 1
        assert abs(count - size * share) <= 0.5 or count == size - 1
    for part in (train, held):
        assert list(part.keys) == sorted(part.keys)
        assert [key.partition("/")[0] for key in part.keys] == [f"c{label}" for label in part.labels]


def test_who_is_held_out_does_not_depend_on_the_other_classes() -> None:
    alone = listing.hold_out(listing.build_split_listing("/x", False, rows([50])), 0.2)[1]
    beside = listing.hold_out(listing.build_split_listing("/x", False, rows([50, 30, 7])), 0.2)[1]
    assert list(alone.keys) == [key for key in beside.keys if key.startswith("c0/")]
    assert Counter(np.diff([int(key[-4:]) for key in alone.keys])).most_common(1)[0][1] < 9, "no regular choice"


# ------------------------------------------------------------------ a folder per class
Tree = dict[str, bytes]
PLAIN: Tree = {"train/cat/1.jpg": b"123", "train/cat/2.JPEG": b"", "train/ant/x.png": b"4", "val/ant/7.jpg": b"77"}


def listed(url: str, tree: Tree, **fields: object) -> SourceListing:
    for name, data in tree.items():
        file_io.write_bytes(file_io.join(url, name), data)
    source = FolderSource.from_dict({"url": url, **fields}).resolve()
    images = FolderLister(source.url, source.holdout, source.labels)
    return images.list_images(images.find_roots())


def get_rows(found: SourceListing, split: str) -> list[tuple[str, str, int, int]]:
    part = found.splits[split]
    return list(zip(part.keys, part.names, part.labels.tolist(), part.lengths.tolist(), strict=True))


@pytest.mark.parametrize("place", ["local", "file", "memory"])
@pytest.mark.parametrize("validation", ["val", "validation"])
def test_a_folder_per_class(tmp_path: Path, place: str, validation: str) -> None:
    url = {"local": f"{tmp_path}", "file": f"file://{tmp_path}", "memory": f"memory://folders/{validation}"}[place]
    found = listed(url, {name.replace("val/", f"{validation}/"): data for name, data in PLAIN.items()})
    assert (found.classes, found.titles) == (("ant", "cat"), ())
    assert get_rows(found, "train") == [
        ("ant/x", "ant/x.png", 0, 1), ("cat/1", "cat/1.jpg", 1, 3), ("cat/2", "cat/2.JPEG", 1, 0)
    ]  # fmt: skip
    assert get_rows(found, "validation") == [("ant/7", "ant/7.jpg", 0, 2)]


def test_deeper_folders_belong_to_their_class(tmp_path: Path) -> None:
    found = listed(str(tmp_path), {**PLAIN, "train/cat/images/3.jpg": b"x"})
    assert ("cat/images/3", "cat/images/3.jpg", 1, 1) in get_rows(found, "train")


def test_what_is_no_image_is_skipped_and_counted(tmp_path: Path) -> None:
    others = {
        name: b"x" for name in ("README", "train/a.txt", "train/cat/t.txt", "train/cat/.DS_Store", "val/ant/z.TXT")
    }
    found = listed(str(tmp_path), {**PLAIN, **others, "train/cat/._1.jpg": b"x", "train/.git/x.jpg": b"x"})
    assert get_rows(found, "train") == get_rows(listed(str(tmp_path / "b"), PLAIN), "train")
    assert found.ignored == {"txt": 3, "ds_store": 1, "jpg": 1, "hidden folders": 1}


def test_folders_of_the_system_are_no_classes(tmp_path: Path) -> None:
    alien = ("train/__MACOSX/cat/._1.jpg", "train/cat/@eaDir/1.jpg/SYNO.jpg", "train/lost+found/x.jpg",
             "train/$RECYCLE.BIN/x.jpg", "train/.ipynb_checkpoints/x.jpg", "train/.Trash/x.jpg", "train/cat/Thumbs.db",
             "test/1.jpg")  # fmt: skip
    (tmp_path / "train/cat").mkdir(parents=True)
    for link in ("train/README", "train/cat/notes"):
        (tmp_path / link).symlink_to("nowhere")
    found = listed(str(tmp_path), {**PLAIN, **{name: b"x" for name in alien}})
    assert get_rows(found, "train") == get_rows(listed(str(tmp_path / "b"), PLAIN), "train")
    assert found.ignored == {
        "db": 1, "folders beside train": 1, "hidden folders": 2, "links to nothing": 2, "system folders": 4
    }  # fmt: skip


@pytest.mark.parametrize("name", ["caf\udce9", "cat\x1b[31m", "a\nb"])
def test_names_of_classes_that_cannot_be_kept_or_shown(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"class '.*(udce9|x1b|n).*' must") as raised:
        listed(str(tmp_path), {**PLAIN, f"train/{name}/1.jpg": b""})
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "names", [("\u0915\u093e", "\u0915\u093f", "\u0915\u0940"), ("\U0001f600", "\U0001f621", "\U0001f622"),
              ("pe\u0302che", "pe\u0301che", "pe\u0300che"), ("\U0001f469\u200d\U0001f680", "\U0001f469\U0001f680")],
)  # fmt: skip
def test_classes_that_differ_by_marks_or_emoji(tmp_path: Path, names: tuple[str, ...]) -> None:
    tree = {f"{name}/{n}.jpg": b"x" for name in names for n in range(4)}
    found = listed(str(tmp_path), tree, holdout=0)
    assert set(found.classes) == set(names)
    keys = [key for key, *_ in get_rows(found, "train")]
    assert len(set(keys)) == len(tree)
    assert all(key.isprintable() or "\u200d" in key for key in keys)


def test_one_class_with_marks_keeps_the_key_that_it_had(tmp_path: Path) -> None:
    found = listed(str(tmp_path), {"\u0915\u093e/1.jpg": b"", "x/1.jpg": b""}, holdout=0)
    assert [key for key, *_ in get_rows(found, "train")] == ["x/1", "\u0915_/1"]


def test_an_empty_class_is_a_class(tmp_path: Path) -> None:
    (tmp_path / "train" / "bee").mkdir(parents=True)
    found = listed(str(tmp_path), PLAIN)
    assert found.classes == ("ant", "bee", "cat")
    assert found.splits["train"].labels.tolist() == [0, 2, 2]


# ------------------------------------------------------------------ holdout
def test_a_single_tree_with_a_share_held_out(tmp_path: Path) -> None:
    tree = {f"{c}/{n}.jpg": b"x" for c in ("ant", "bee") for n in range(20)}
    found = listed(str(tmp_path), tree, holdout=0.1)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 36, "validation": 4}
    assert set(listed(str(tmp_path), tree, holdout=0.0).splits) == {"train"}


def test_a_share_that_holds_out_nothing_is_an_error(tmp_path: Path) -> None:
    tree = {f"{c}/{n}.jpg": b"x" for c in ("ant", "bee") for n in range(4)}
    with pytest.raises(DataError, match=r"source\.holdout 0\.1 holds out no image: no class has more than 4; set a "):
        listed(str(tmp_path), tree, holdout=0.1)


def test_without_validation_images_it_has_to_be_stated(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no validation images: set --source\.holdout 0\.1"):
        listed(str(tmp_path), {"train/a/1.jpg": b"", "train/b/1.jpg": b""})


def test_a_share_beside_validation_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source\.holdout must not be set: the source has a validation split"):
        listed(str(tmp_path), PLAIN, holdout=0.2)


# ------------------------------------------------------------------ flat validation images
FLAT: Tree = {"train/cat/1.jpg": b"", "train/big dog/1.jpg": b"", "val/a.jpg": b"", "val/b.JPEG": b""}


@pytest.mark.parametrize(
    "lines",
    ["a.jpg cat\nb.JPEG\tbig dog\n", 'file,label\n"a.jpg","cat"\n"b.JPEG","big dog"\n\n',
     "a.jpg cat\nb.JPEG big dog\n", "\ufeffa.jpg , cat\r\nb.JPEG , big dog\r\n"],
)  # fmt: skip
def test_labels_of_flat_images(tmp_path: Path, lines: str) -> None:
    found = listed(str(tmp_path), {**FLAT, "labels.txt": lines.encode()}, labels=str(tmp_path / "labels.txt"))
    assert found.classes == ("big dog", "cat")
    assert [(key, label) for key, _, label, _ in get_rows(found, "validation")] == [("a", 1), ("b", 0)]


@pytest.mark.parametrize(
    ("lines", "said"),
    [("a.jpg cat\n", r"no label for 'b\.JPEG' \(1 labels, 2 images\)"),
     ("a.jpg cat\nb.JPEG cow\n", r"line 2: must be a file and a class of the training images, got 'b\.JPEG cow'"),
     ("a,cat\nb,cat 1 2 3\n", "line 2: must be a file and a class"),
     ("a,cat\nb,catfish\n", "line 2: .* got 'b,catfish'"),
     ("a.jpg,big\nb,cat\n", "line 1: .* got 'a.jpg,big'"), ("a.jpg,big dog x\nb,cat\n", "line 1: .* 'a.jpg,big dog x'"),
     ("f,x,y\na.jpg,cat,big dog\nb.JPEG,cat,cat\n", "line 2: must be .*, got 'a.jpg,cat,big dog'"),
     ("a.jpg cat\nb.JPEG cat\nc.jpg cat", r"a label for 'c\.jpg', which is missing \(1 such images\)"),
     ("a.jpg cat\nb.JPEG cat\na.jpg\tbig dog", r"line 3: a second label for 'a\.jpg'"),
     ("a.jpg\n", "line 1: must be a file and a class"), ("", r"no label for 'a\.jpg'"), ("\xff", "no text")],
)  # fmt: skip
def test_labels_that_do_not_fit_are_errors(tmp_path: Path, lines: str, said: str) -> None:
    tree = {**FLAT, "labels.txt": lines.encode("latin-1")}
    with pytest.raises(DataError, match=said):
        listed(str(tmp_path), tree, labels=str(tmp_path / "labels.txt"))


def test_a_label_that_begins_like_a_class_is_none(tmp_path: Path) -> None:
    """ "ice creme" is neither "ice" nor "ice cream"."""
    tree = {"train/ice/1.jpg": b"", "train/ice cream/1.jpg": b"", "val/a.jpg": b"", "val/b.jpg": b"",
            "labels.csv": b"file,label\na.jpg,ice cream\nb.jpg,ice creme\n"}  # fmt: skip
    with pytest.raises(DataError, match=r"labels\.csv: line 3: .* got 'b\.jpg,ice creme'"):
        listed(str(tmp_path), tree, labels=str(tmp_path / "labels.csv"))


def test_labels_and_names_with_accents_however_they_are_composed(tmp_path: Path) -> None:
    tree = {"train/pe\u0302che/1.jpg": b"", "train/x/1.jpg": b"", "val/e\u0301.jpg": b"",
            "labels.csv": "\u00e9.jpg,p\u00eache\n".encode()}  # fmt: skip
    found = listed(str(tmp_path), tree, labels=str(tmp_path / "labels.csv"))
    assert [found.classes[label] for _, _, label, _ in get_rows(found, "validation")] == ["pe\u0302che"]
    with pytest.raises(DataError, match=r"class 'p\\xeache' is listed twice"):
        listed(str(tmp_path), {"train/p\u00eache/1.jpg": b""}, labels=str(tmp_path / "labels.csv"))


def test_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.txt: missing"):
        listed(str(tmp_path), FLAT, labels=str(tmp_path / "labels.txt"))
    with pytest.raises(DataError, match=r"val: 2 files and no folder per class: their labels are needed"):
        listed(str(tmp_path), FLAT)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("tree", "said"),
    [({}, "empty, or no folder"),
     ({"train/a/1.jpg": b"", "val/a/1.jpg": b""}, r"1 class\(es\) \(a\): at least 2 are needed"),
     ({"train/a/t.txt": b"", "train/b/t.txt": b"", "val/a/1.jpg": b""}, "train: no images there"),
     ({**PLAIN, "val/ant/7.jpg": b"", "val/cow/1.jpg": b""}, "class 'cow' is not among the 2 classes"),
     ({**PLAIN, "validation/ant/7.jpg": b""}, "has both validation and val"),
     ({**PLAIN, "train/cat/1.png": b""}, r"'cat/1\.jpg' and 'cat/1\.png' would both get the key 'cat/1'"),
     ({"train/a.jpg": b"", "val/a/1.jpg": b""}, r"0 class\(es\) \(none\)")],
)  # fmt: skip
def test_unfit_folders_are_errors(tmp_path: Path, tree: Tree, said: str) -> None:
    with pytest.raises(DataError, match=said):
        listed(str(tmp_path), tree)


def test_links_to_nothing_and_links_that_go_round_are_errors(tmp_path: Path) -> None:
    listed(str(tmp_path), PLAIN)
    (tmp_path / "train/cat/link.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(DataError, match=r"link\.jpg: unreadable: a link to nothing"):
        listed(str(tmp_path), {})
    (tmp_path / "train/cat/link.jpg").unlink()
    (tmp_path / "train/cat/round").symlink_to("..")
    with pytest.raises(DataError, match="more than 8 folders deep"):
        listed(str(tmp_path), {})


def test_links_to_images_are_images(tmp_path: Path) -> None:
    listed(str(tmp_path), PLAIN)
    (tmp_path / "train/cat/link.jpg").symlink_to("1.jpg")
    assert ("cat/link", "cat/link.jpg", 1, 3) in get_rows(listed(str(tmp_path), {}), "train")


def test_places_have_to_be_given_and_absolute() -> None:
    with pytest.raises(ConfigError, match=r"source\.url: needed"):
        FolderSource().resolve()
    with pytest.raises(ConfigError, match=r"source\.labels: 'x' is a relative path"):
        FolderSource(url="/a", labels="x").resolve()
