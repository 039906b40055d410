"""Tars made elsewhere become a dataset that trains, or raise an error that names them."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.data import index, manifest
from orchestrator.data.build import indexing, shard_scan, tar_reader
from orchestrator.data.build.config import IndexConfig
from orchestrator.data.build.tar_reader import ObjectReader
from orchestrator.data.config import OrderConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataset import SampleReader
from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader
from tests.support import pictures, tiny_shards

PATTERNS = {"train": "train-*.tar", "validation": "val.tar"}


def run(place: object, **changes: Any) -> str:
    """Index what lies at a URL; what was said."""
    screen = io.StringIO()
    job = IndexConfig(**({"url": str(place)} | PATTERNS | changes))
    assert indexing.index_dataset(job, Console(file=screen, width=300)) == 0
    return screen.getvalue()


def sample(number: int, label: object = None, **members: bytes) -> list[tuple[str, bytes]]:
    given = {name: data for name, data in members.items() if data != b""}
    return [
        (f"{number:04d}.jpg", tiny_shards.jpeg(number)),
        *([] if label is None else [(f"{number:04d}.cls", str(label).encode())]),
        *((f"{number:04d}.{extension}", data) for extension, data in given.items()),
    ]


def tar(*numbers: int, label: Callable[[int], object] = lambda number: number % 3) -> bytes:
    return tiny_shards.tar([member for number in numbers for member in sample(number, label(number))])


def write(folder: Path | str, **contents: bytes) -> None:
    for name, data in contents.items():
        file_io.write_bytes(f"{folder}/{name.replace('_', '-')}.tar", data)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Two training tars and one for validation, with `cls` labels 0 .. 2."""
    write(tmp_path, train_0=tar(0, 1, 2), train_1=tar(3, 4, 5, 6), val=tar(0, 1))
    return tmp_path


def read_all(url: str, split: str) -> list[tuple[str, int, bytes]]:
    found = manifest.load(url)
    reader = SampleReader(url, found, split)
    held = [reader.read(at, n) for at, shard in enumerate(found.shards(split)) for n in range(shard.samples)]
    result = [(one.key, one.label, bytes(one.image)) for one in held]
    reader.close()
    return result


# ------------------------------------------------------------------ adopting
def test_what_shard_writer_wrote_is_read(tmp_path: Path) -> None:
    wanted = []
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=5, verbose=0) as writer:
        for n in range(13):
            image, label = tiny_shards.jpeg(n), n % 4
            writer.write({"__key__": f"n{label}/img{n:03d}", "jpg": image, "cls": label, "txt": "words"})
            wanted.append((f"n{label}/img{n:03d}", label, image))
    said = run(tmp_path, train="train-{000000..000002}.tar", validation="")
    assert read_all(str(tmp_path), "train") == wanted
    found = manifest.load(str(tmp_path))
    assert (found.name, found.classes, found.tars) == (tmp_path.name, ("0", "1", "2", "3"), "")
    assert "train: 13 samples of 4 classes in 3 shards" in said
    assert "label mixing: " in said
    assert not (tmp_path / indexing.INDEXING_FOLDER).exists()


def test_sums_are_those_of_the_tars(foreign: Path) -> None:
    run(foreign)
    found = manifest.load(str(foreign))
    assert {split: [shard.samples for shard in found.shards(split)] for split in found.splits} == {
        "train": [3, 4], "validation": [2]
    }  # fmt: skip
    for shard in (*found.shards("train"), *found.shards("validation")):
        data = (foreign / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert index.load(str(foreign), shard).to_bytes() == shard_scan.index_tar(data, "x").to_bytes()


def test_the_same_tars_give_the_same_bytes(foreign: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(foreign, to=str(tmp_path / name), name="x", threads=1 if name == "one" else 4)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) == 4


def test_indexes_elsewhere(foreign: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in foreign.iterdir())
    run(foreign, to="memory://adopted/here")
    assert sorted(path.name for path in foreign.iterdir()) == before, "the tars' folder may be read-only"
    with pytest.raises(DataError, match=rf"must lie below memory://adopted/here, got {foreign}; set --allow-elsewhere"):
        manifest.load("memory://adopted/here")
    found = manifest.load("memory://adopted/here", allow_elsewhere=True)
    assert found.tars == str(foreign)
    assert found.tar_url("memory://adopted/here", found.shards("train")[0]) == str(foreign / "train-0.tar")


def test_tars_in_any_storage() -> None:
    write("memory://foreign/deep/train", a=tar(0, 1, 2), b=tar(3, 4))
    run("memory://foreign/deep", train="train/{a,b}.tar", validation="", name="mem")
    assert [(key, label) for key, label, _ in read_all("memory://foreign/deep", "train")] == [
        (f"{n:04d}", n % 3) for n in range(5)
    ]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "JPG", "JPEG", "Png"])
def test_image_extensions(tmp_path: Path, extension: str) -> None:
    write(
        tmp_path,
        train_0=tiny_shards.tar(
            [(f"{n}.{e}", d) for n in range(2) for e, d in ((extension, b"x"), ("cls", b"%d" % n))]
        ),
    )
    run(tmp_path, validation="")
    assert manifest.load(str(tmp_path)).count_samples("train") == 2


def test_tars_that_are_sorted_by_class_are_found(tmp_path: Path) -> None:
    small = OrderConfig(lanes=2, window=8)
    for name in ("sorted", "mixed"):
        place = f"memory://{name}"
        for at in range(20):
            numbers = range(20 * at, 20 * at + 20)
            labels = [n // 20 if name == "sorted" else n % 20 for n in numbers]
            images, classes = ([(f"{n}.jpg", b"x") for n in numbers], [b"%d" % label for label in labels])
            members = [*images, *((f"{n}.cls", text) for n, text in zip(numbers, classes, strict=True))]
            write(place, **{f"train_{at:02d}": tiny_shards.tar(members)})
        said = run(place, validation="", order=small, batch_size=16)
        assert ("POOR: pack anew with a global shuffle (orchestrator shards pack), or raise order.lanes" in said) == (
            name == "sorted"
        )


# ------------------------------------------------------------------ labels and classes
def json_tar(tmp_path: Path, *labels: object) -> None:
    members = [sample(n, json=json.dumps({"label": label, "w": 40}).encode()) for n, label in enumerate(labels)]
    write(tmp_path, train_0=tiny_shards.tar([member for group in members for member in group]))


def test_labels_in_json(tmp_path: Path) -> None:
    json_tar(tmp_path, 2, 0, 1)
    run(tmp_path, validation="", label_key="label")
    assert [label for _, label, _ in read_all(str(tmp_path), "train")] == [2, 0, 1]
    assert manifest.load(str(tmp_path)).made == {"labels": "json:label"}


@pytest.mark.parametrize(
    ("text", "titles"),
    [("ant\nbee\ncat\n", ()), ('["ant", "bee", "cat"]', ()), ('{"2": "cat", "0": "ant", "1": "bee"}', ()),
     ("\ufeffant\r\nbee\r\ncat\r\n\r\n", ()),
     ('{"0": ["ant", "An Ant"], "1": ["bee", "A Bee"], "2": ["cat", "A Cat"]}', ("An Ant", "A Bee", "A Cat"))],
)  # fmt: skip
def test_names_of_classes(tmp_path: Path, text: str, titles: tuple[str, ...]) -> None:
    (tmp_path / "classes.txt").write_text(text)
    json_tar(tmp_path, "cat", 0, "bee")
    run(tmp_path, validation="", label_key="label", classes=str(tmp_path / "classes.txt"))
    found = manifest.load(str(tmp_path))
    assert (found.classes, found.titles) == (("ant", "bee", "cat"), titles)
    assert [label for _, label, _ in read_all(str(tmp_path), "train")] == [2, 0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [("ant\n", "1 classes; at least 2"), ("", "0 classes"), ("ant\n\nbee\n", "every class must have a name, got ''"),
     ("ant\nant\n", "class 'ant' is listed twice"), ("[1, 2]", "every class must have a name, got 1"), ("[", "damaged"),
     ('{"cat": 2, "ant": 0}', "keys must be 0, 1, 2"),
     ('{"1": "a", "2": "b"}', "keys must be 0, 1, 2 ..., lacks '0'"),
     ('[["a", "b"], ["c"]]', "damaged: zip"), ("[" * 100_000, "damaged: JSON nested too deeply"),
     ("a\nb\x1b[31m\n", "must not hold control characters"),
     ('["a", "\\ud800"]', "must be text in UTF-8"), ("pe\u0302che\np\u00eache\n", "is listed twice")],
)  # fmt: skip
def test_unfit_names_of_classes(foreign: Path, text: str, said: str) -> None:
    (foreign / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=f"classes: {foreign}/classes.txt: .*{said}"):
        run(foreign, classes=str(foreign / "classes.txt"))


def test_class_names_with_titles_are_matched_whole(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('[["n01", "tench, Tinca tinca"], ["n02", "goldfish"], ["n03", "dog"]]')
    json_tar(tmp_path, "n03", "n02", "n01", 1)
    run(tmp_path, validation="", label_key="label", classes=str(tmp_path / "classes.json"))
    found = manifest.load(str(tmp_path))
    assert (found.classes[0], found.titles[0]) == ("n01", "tench, Tinca tinca")
    assert [label for _, label, _ in read_all(str(tmp_path), "train")] == [2, 1, 0, 1]
    for part in ("tench", "n0", "N03"):
        json_tar(tmp_path, part)
        with pytest.raises(DataError, match="one of the 3 names of classes, got"):
            run(tmp_path, validation="", label_key="label", classes=str(tmp_path / "classes.json"), name=part,
                to=str(tmp_path / part))  # fmt: skip


def test_names_in_cls_members(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("p\u00eache\n1\nice cream\n")
    names = ("pe\u0302che", "ice cream\r\n", "\ufeff1")
    write(tmp_path, train_0=tar(0, 1, 2, label=lambda n: names[n]))
    run(tmp_path, validation="", classes=str(tmp_path / "classes.txt"))
    assert [label for _, label, _ in read_all(str(tmp_path), "train")] == [0, 2, 1]
    write(tmp_path, train_0=tar(0, 1, label=lambda n: ("ice cream", "ice")[n]))
    with pytest.raises(DataError, match="must be a whole number or one of the 3 names of classes, got 'ice'"):
        run(tmp_path, validation="", classes=str(tmp_path / "classes.txt"), to=str(tmp_path / "b"))


def test_the_flag_for_labels_is_named(foreign: Path, tmp_path: Path) -> None:
    json_tar(tmp_path / "json", 1, 0)
    with pytest.raises(DataError, match=r"\.json \(2\); .* --label-key, .* or a field of the json"):
        run(tmp_path / "json", validation="")


def test_a_class_without_samples_is_reported(foreign: Path) -> None:
    (foreign / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    said = run(foreign, classes=str(foreign / "classes.txt"))
    assert "train: 1 of 4 classes have no sample: dog" in said
    assert "validation: 2 of 4 classes have no sample: cat, dog" in said


@pytest.mark.parametrize(
    ("label", "said"),
    [(-1, "must be a class in .* got -1"), (10**6, r"its label must be a class in 0 \.\. 999999, got 1000000"),
     ("two", "its label must be a whole number, got 'two'; give the names"), ("1.0", "a whole number"),
     ("x" * 2000, "got 'x{40}'; give"),
     ("", "a whole number"), ("9" * 30, "a whole number"), ("1_0", "a whole number"), ("1" * 100, "a whole number")],
)  # fmt: skip
def test_labels_that_are_none(foreign: Path, label: object, said: str) -> None:
    write(foreign, train_1=tar(3, 4, label=lambda n: label if n == 4 else 0))
    with pytest.raises(DataError, match=rf"{foreign}/train-1.tar: sample '0004': .*{said}"):
        run(foreign)
    assert not (foreign / manifest.FILE_NAME).exists()


@pytest.mark.parametrize(
    ("label", "said"),
    [("dog", "one of the 3 names of classes, got 'dog'"), (3, r"its label must be a class in 0 \.\. 2, got 3"),
     (True, "a whole number .*'True'"), (1.0, "a whole number"), (None, "a whole number"), ([1], "a whole number"),
     (10**40, "a whole number")],
)  # fmt: skip
def test_labels_outside_given_classes(tmp_path: Path, label: object, said: str) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    json_tar(tmp_path, 0, label)
    with pytest.raises(DataError, match=rf"train-0.tar: sample '0001': .*{said}"):
        run(tmp_path, validation="", label_key="label", classes=str(tmp_path / "classes.txt"))


@pytest.mark.parametrize(
    ("data", "said"),
    [(b'{"w": 1}', "its json has no field 'label'; it has 'w'"), (b"[1]", "no field 'label'; it has no fields"),
     (b"{", "its json is damaged"), (b"[" * 100_000, "its json is damaged"),
     (b'{"label": "ant"}', "must be a whole number, got 'ant'; give the names with --classes")],
)  # fmt: skip
def test_json_without_a_label(tmp_path: Path, data: bytes, said: str) -> None:
    write(tmp_path, train_0=tiny_shards.tar([*sample(0, json=b'{"label": 1}'), *sample(1, json=data)]))
    with pytest.raises(DataError, match=f"sample '0001': .*{said}"):
        run(tmp_path, validation="", label_key="label")


def test_one_class_is_none(tmp_path: Path) -> None:
    write(tmp_path, train_0=tar(0, 1, label=lambda _: 0))
    with pytest.raises(DataError, match="all labels are 0: at least 2 classes"):
        run(tmp_path, validation="")


# ------------------------------------------------------------------ tars that are errors
@pytest.mark.parametrize(
    ("members", "said"),
    [([*sample(0, 0), *sample(1)], r"sample '0001' lacks an image or a label: it has an image only \(1 such"),
     ([*sample(0), *sample(1)], r"it has an image only \(2 such samples\)"),
     ([*sample(0, 0), ("a.cls", b"1")], "sample 'a' lacks an image or a label: it has a label only"),
     ([*sample(0, 0), *sample(0, 0)], "sample '0000' has two images"),
     ([*sample(0, 0), ("./0000.png", b"x")], "sample '0000' has two images"),
     ([("a.txt", b"x")], r"members of samples that have none of .jpg, .jpeg, .png, .cls: .txt \(1\).* of the json$"),
     ([], "no sample in it; name tars that have samples$"),
     ([("/a.jpg", b"x"), ("/a.cls", b"0")], "member '/a.jpg' at byte 0 must be relative"),
     ([("../a.jpg", b"x")], "member '../a.jpg'")],
)  # fmt: skip
def test_unfit_tars(foreign: Path, members: Sequence[tuple[str, bytes]], said: str) -> None:
    write(foreign, train_1=tiny_shards.tar(members))
    with pytest.raises(DataError, match=rf"{foreign}/train-1.tar: .*{said}"):
        run(foreign)
    assert not (foreign / manifest.FILE_NAME).exists()


@pytest.mark.parametrize("keep", [0, 512, 700, 5000])
def test_a_cut_tar(foreign: Path, keep: int) -> None:
    write(foreign, train_1=tar(3, 4, 5, 6)[:keep])
    with pytest.raises(DataError, match=rf"{foreign}/train-1.tar: (truncated at byte {keep}|empty)"):
        run(foreign)


def test_keys_that_are_in_two_tars(foreign: Path) -> None:
    write(foreign, train_2=tar(9, 5, 6))
    with pytest.raises(DataError, match=r"key '0005' is in train-1.tar and in train-2.tar \(2 such keys\)"):
        run(foreign)


def test_all_errors_are_reported(foreign: Path) -> None:
    write(foreign, train_1=b"", train_2=tar(7, 8, label=lambda _: -1))
    screen = io.StringIO()
    with pytest.raises(DataError, match=r"^2 tars cannot be indexed; "):
        indexing.index_dataset(IndexConfig(url=str(foreign), train="train-*.tar"), Console(file=screen, width=300))
    assert "train-1.tar: empty" in screen.getvalue()
    assert "train-2.tar: sample '0007': its label must be a class" in screen.getvalue()


def test_the_rest_of_many_bad_tars_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, **{f"train_{n:03d}": b"" for n in range(100)})
    with pytest.raises(DataError, match=r"^20 tars cannot be read, the rest was not tried"):
        run(tmp_path, validation="", threads=1)


# ------------------------------------------------------------------ what is asked for
@pytest.mark.parametrize(
    ("changes", "said"),
    [({"train": "train-{0..2}.tar"}, "train: .*: train-2.tar is missing"),
     ({"train": "tr*.tgz"}, "nothing there matches 'tr"), ({"train": "away/*.tar"}, "nothing there matches"),
     ({"validation": "missing.tar"}, "validation: .*missing.tar is missing"),
     ({"train": "{train-0,val}.tar"}, "val.tar must not be a training tar"),
     ({"train": "{train-0,train-0}.tar"}, "names train-0.tar twice"),
     ({"train": "train-{x}.tar"}, "train-{x}.tar is missing"), ({"train": "train-{1.tar"}, "must have pairs of braces"),
     ({"train": "train-{0..9999999999}.tar"}, "over 1000000 names"),
     ({"train": "{0..99999}{0..99999}"}, "over 1000000 names"),
     ({"train": "*/x.tar"}, "in the last part of a name only"), ({"train": "../x.tar"}, "must be a path below"),
     ({"train": "/x.tar"}, "must be a path below"), ({"train": "s3://a/x.tar"}, "must be a path below"),
     ({"url": ""}, "give the folder"), ({"train": "", "validation": ""}, "give the folder"),
     ({"url": "here/there"}, "relative path"), ({"to": "there"}, "to: 'there' is a relative path"),
     ({"classes": "c.txt"}, "classes: 'c.txt' is a relative path"),
     ({"classes": "/nowhere/c.txt"}, "classes: /nowhere/c.txt: missing")],
)  # fmt: skip
def test_what_cannot_be_meant(foreign: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        run(foreign, **changes)


def test_secrets_do_not_go_into_the_manifest(tmp_path: Path) -> None:
    for url, why in (("s3://user:hunter2@bucket/x", "without user name"), ("s3://bucket/x?key=hunter2", "or query")):
        with pytest.raises(ConfigError, match=why) as caught:
            run(url, to=str(tmp_path))
        assert "hunter2" not in str(caught.value)


def test_a_place_that_cannot_be_written_to(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--to URL writes manifest and indexes elsewhere"):
        run(foreign, to=str(tmp_path / "file" / "below"))


# ------------------------------------------------------------------ again
def test_a_second_start_resumes(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(foreign, train_1=b"")
    with pytest.raises(DataError, match=r"train-1.tar: empty"):
        run(foreign)
    write(foreign, train_1=tar(3, 4, 5, 6))
    read = []
    make_reader = tar_reader.ObjectReader

    def record(ranges: RangeReader, url: str, is_hashed: bool) -> ObjectReader:
        read.append(url)
        return make_reader(ranges, url, is_hashed)

    monkeypatch.setattr(indexing, "ObjectReader", record)
    run(foreign)
    assert read == [str(foreign / "train-1.tar")]
    assert manifest.load(str(foreign)).count_samples("train") == 7
    assert not (foreign / indexing.INDEXING_FOLDER).exists()


@pytest.mark.parametrize("change", ["tar", "index", "record", "options"])
def test_what_has_changed_is_read_again(foreign: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    write(foreign, val=b"")
    with pytest.raises(DataError):
        run(foreign)
    write(foreign, val=tar(0, 1))
    if change == "tar":
        write(foreign, train_0=tar(0, 1, 2, 7))
    elif change == "index":
        (foreign / "train-0.tar.index.json").write_text("{}")
    elif change == "record":
        (foreign / indexing.INDEXING_FOLDER / "train-0.tar.json").write_text("{")
    (foreign / "classes.txt").write_text("a\nb\nc\n")
    run(foreign, classes=str(foreign / "classes.txt") if change == "options" else "")
    assert manifest.load(str(foreign)).count_samples("train") == (8 if change == "tar" else 7)
    assert len(read_all(str(foreign), "train")) == (8 if change == "tar" else 7)


def test_done_is_done(foreign: Path) -> None:
    run(foreign)
    assert "already indexed, 3 tars" in run(foreign)
    with pytest.raises(DataError, match=r"manifest.json: is there and is about other tars or labels; remove it"):
        run(foreign, label_key="label")
    (foreign / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match="is about other tars or labels"):
        run(foreign, classes=str(foreign / "classes.txt"))
    write(foreign, train_2=tar(7, 8))
    with pytest.raises(DataError, match="is about other tars"):
        run(foreign)


def test_transparent_images_are_counted_and_part_of_the_identity(foreign: Path) -> None:
    assert "are transparent" not in run(foreign)
    digest = manifest.load(str(foreign)).digest()
    pixels = tiny_shards.picture(1)
    clear = pictures.png(np.dstack((pixels, pixels[:, :, 0])), 6, 8)
    write(foreign, val=tiny_shards.tar([("a.png", clear), ("a.cls", b"1"), ("b.png", clear[:-30]), ("b.cls", b"0")]))
    file_io.remove(str(foreign / "manifest.json"))
    assert "validation: 1 images are transparent: they are laid on white" in run(foreign)
    made = manifest.load(str(foreign))
    assert made.made[manifest.BACKGROUND_KEY] == "white"
    assert made.digest() != digest
    assert "already indexed" in run(foreign)


# ------------------------------------------------------------------ patterns
def test_globs_look_into_each_folder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.tar", "a/2.tar", "a/2.tar.index.json", "b/1.tar", "b/x.txt", "info.json"):
        file_io.write_bytes(f"memory://names/{name}", b"x")
    listed = []
    sizes = file_io.list_sizes
    monkeypatch.setattr(file_io, "list_sizes", lambda url, names: listed.append(url) or sizes(url, names))  # type: ignore[func-returns-value]
    assert list(indexing.match_shards("memory://names", "{b,a}/*.tar*", "train")) == ["b/1.tar", "a/1.tar", "a/2.tar"]
    assert sorted(listed) == ["memory://names/a", "memory://names/b"]
    assert list(indexing.match_shards("memory://names", "a/[2-9].tar", "train")) == ["a/2.tar"]
    assert list(indexing.match_shards("memory://names", "{b,a}/{2..1}?tar", "train")) == [
        "b/1.tar",
        "a/2.tar",
        "a/1.tar",
    ]
