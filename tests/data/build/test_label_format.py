"""Which member is the image and which the label: as webdataset groups them, and nothing is lost silently."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from webdataset.tariterators import group_by_keys, tar_file_iterator

from orchestrator.config.errors import ConfigError
from orchestrator.data import index, manifest
from orchestrator.data.build import indexing, label_format, tar_reader, verify
from orchestrator.data.build.config import IndexConfig, VerifyConfig
from orchestrator.data.build.tar_reader import TarMember
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataset import SampleReader
from orchestrator.storage import file_io
from tests.support import tiny_shards

Members = Sequence[tuple[str, bytes]]


def run(place: Path, **changes: Any) -> str:
    """Index train-*.tar; what was said."""
    screen = io.StringIO()
    assert (
        indexing.index_dataset(
            IndexConfig(**({"url": str(place), "train": "train-*.tar"} | changes)), Console(file=screen, width=500)
        )
        == 0
    )
    return screen.getvalue()


def checked(place: Path) -> str:
    screen = io.StringIO()
    assert verify.verify_dataset(VerifyConfig(url=str(place)), Console(file=screen, width=500)) == 0
    return screen.getvalue()


def read_all(place: Path) -> list[tuple[str, int, bytes]]:
    found = manifest.load(str(place))
    reader = SampleReader(str(place), found, "train")
    held = [reader.read(at, n) for at, shard in enumerate(found.shards("train")) for n in range(shard.samples)]
    reader.close()
    return [(one.key, one.label, bytes(one.image)) for one in held]


def iter_members(
    data: bytes, extensions: Sequence[str], others: dict[str, list[str]] | None = None
) -> Iterator[TarMember]:
    return tar_reader.iter_members(
        lambda start, length: data[start : start + length], len(data), "x", extensions, others
    )


def write(place: Path, **contents: Members) -> None:
    for name, members in contents.items():
        file_io.write_bytes(f"{place}/{name.replace('_', '-')}.tar", tiny_shards.tar(members))


def members(count: int, image: str, label: str, key: str = "") -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(count)
        for member in ((f"{key}{n:02d}.{image}", tiny_shards.jpeg(n)), (f"{key}{n:02d}.{label}", b"%d" % (n % 3)))
    ]


# ------------------------------------------------------------------ the rule of webdataset
_PARTS = st.lists(st.sampled_from(["a", "b", "x y", "\u00e9"]), min_size=1, max_size=2).map("/".join)
_ENDS = st.lists(st.sampled_from(["jpg", "JPG", "cls", "5x", "seg", "png", "txt", ""]), min_size=1, max_size=3).map(
    ".".join
)


@given(
    st.lists(st.tuples(_PARTS, _ENDS).map(".".join), max_size=12, unique_by=str.lower),
    st.sampled_from(["", "d.e/", "./"]),
)
def test_samples_are_those_of_webdataset(names: list[str], folder: str) -> None:
    """Members of one sample stand together here, as webdataset needs them."""
    names = sorted(names, key=lambda name: name.rpartition("/")[0] + "/" + name.rpartition("/")[2].partition(".")[0])
    data = tiny_shards.tar([(folder + name, name.encode()) for name in names])
    wanted = {
        sample["__key__"].removeprefix("./"): (sample["jpg"], sample["seg.png"])
        for sample in group_by_keys({**one, "__url__": "x"} for one in tar_file_iterator(io.BytesIO(data)))
        if "jpg" in sample and "seg.png" in sample
    }
    found: dict[str, dict[str, bytes]] = {}
    for member in iter_members(data, ("jpg", "seg.png")):
        found.setdefault(member.key, {})[member.extension] = bytes(member.payload)
    assert {key: (one["jpg"], one["seg.png"]) for key, one in found.items() if len(one) == 2} == wanted


@pytest.mark.parametrize("name", ["a/._b.jpg", ".b.jpg", "a/.jpg", "README", "a.b/c"])
def test_names_that_have_no_key_are_no_samples(name: str) -> None:
    others: dict[str, list[str]] = {}
    assert list(iter_members(tiny_shards.tar([(name, b"x")]), ("jpg",), others)) == []
    assert not others


# ------------------------------------------------------------------ dotted names and names of several parts
@pytest.fixture
def dotted(tmp_path: Path) -> Path:
    """4 of 12 samples have a dot in their names."""
    write(tmp_path, train_0=[*members(8, "jpg", "cls"), *members(4, "5x.jpg", "5x.cls", "zoom1-")])
    return tmp_path


def test_dotted_names_are_asked_about(dotted: Path) -> None:
    with pytest.raises(DataError) as raised:
        run(dotted)
    said = str(raised.value)
    assert "members of samples that have none of .jpg, .jpeg, .png, .cls: .5x.cls (4), .5x.jpg (4); a key" in said
    assert "name image and label with --image-key and --label-key" in said
    assert "or set --image-key jpg to leave them out" in said
    assert not (dotted / manifest.FILE_NAME).exists()


def test_dotted_names_are_taken_by_the_flags_that_are_reported(dotted: Path) -> None:
    assert "left out" not in run(dotted, image_key="jpg;5x.jpg", label_key="cls;5x.cls")
    assert [label for _, label, _ in read_all(dotted)] == [n % 3 for n in range(8)] + [0, 1, 2, 0]
    assert manifest.load(str(dotted)).made == {"labels": "cls;5x.cls", "images": "jpg;5x.jpg"}
    assert "train: 12 samples of 3 classes in 1 shards" in checked(dotted)


def test_what_is_left_out_is_reported_by_index_and_verify(dotted: Path) -> None:
    assert "warning: train: left out: members of samples that have none of .jpg, .cls: .5x.cls (4), .5x.jpg (4)" in run(
        dotted, image_key="jpg"
    )
    said = checked(dotted)
    assert "warning: train: left out: members of samples that have none of .jpg, .cls: .5x.cls (4), .5x.jpg (4)" in said
    assert "no errors, but 1 warning" in said
    assert "nothing is wrong" not in said


def test_an_earlier_start_keeps_what_was_left_out(dotted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(dotted, train_1=members(2, "jpg", "cls", "other"))
    save = manifest.save
    monkeypatch.setattr(manifest, "save", lambda *_: (_ for _ in ()).throw(DataError("killed")))
    with pytest.raises(DataError, match="killed"):
        run(dotted, image_key="jpg")
    monkeypatch.setattr(manifest, "save", save)
    monkeypatch.setattr(tar_reader, "iter_members", None)
    assert "left out: members of samples that have none of .jpg, .cls: .5x.cls (4), .5x.jpg (4)" in run(
        dotted, image_key="jpg"
    )


def test_a_readme_is_no_loss(tmp_path: Path) -> None:
    write(tmp_path, train_0=[*members(4, "jpg", "cls"), ("README.txt", b"x")])
    assert "train: left out: members of samples that have none of .jpg, .jpeg, .png, .cls: .txt (1)" in run(tmp_path)
    assert "nothing is wrong" in checked(tmp_path)


@pytest.mark.parametrize(
    ("image", "label", "flags"),
    [("input.jpg", "output.cls", {"image_key": "input.jpg", "label_key": "output.cls"}),
     ("image.jpg", "cls", {"image_key": "image.jpg"}), ("jpg", "cls.txt", {"label_key": "cls.txt"}),
     ("jpg", "label", {"label_key": ".label"}), ("Input.JPG", "CLS", {"image_key": ".input.jpg"})],
)  # fmt: skip
def test_fields_of_several_parts(tmp_path: Path, image: str, label: str, flags: dict[str, str]) -> None:
    write(tmp_path, train_0=members(6, image, label))
    with pytest.raises(DataError) as raised:
        run(tmp_path)
    for member in {image, label} - {"jpg", "cls", "CLS"}:
        assert f".{member.lower()} (6)" in str(raised.value)
    run(tmp_path, **flags)
    assert [label for _, label, _ in read_all(tmp_path)] == [0, 1, 2, 0, 1, 2]
    assert "nothing is wrong" in checked(tmp_path)


def test_two_tars_of_other_fields(tmp_path: Path) -> None:
    write(tmp_path, train_0=members(4, "jpg", "cls"), train_1=members(4, "rgb.jpg", "y.cls", "b"))
    with pytest.raises(DataError, match=r"\.rgb\.jpg \(4\), \.y\.cls \(4\)"):
        run(tmp_path)
    run(tmp_path, image_key="jpg;rgb.jpg", label_key="cls;y.cls")
    assert len(read_all(tmp_path)) == 8


def test_an_image_and_a_mask(tmp_path: Path) -> None:
    both = [
        m
        for n in range(4)
        for m in ((f"{n}.png", b"mask"), (f"{n}.jpg", tiny_shards.jpeg(n)), (f"{n}.cls", b"%d" % (n % 2)))
    ]
    write(tmp_path, train_0=both)
    with pytest.raises(
        DataError, match=r"sample '0' has two images \(\.png and \.jpg: set --image-key to one of them\)"
    ):
        run(tmp_path)
    for preferred in ("jpg", "jpg;png"):
        run(tmp_path, to=str(tmp_path / preferred), image_key=preferred)
        (found,) = manifest.load(str(tmp_path / preferred), allow_elsewhere=True).shards("train")
        assert index.load(str(tmp_path / preferred), found).lengths.tolist() == [
            len(tiny_shards.jpeg(n)) for n in range(4)
        ]


# ------------------------------------------------------------------ keys of labels
@pytest.mark.parametrize(
    ("key", "made"),
    [("", "cls"), ("label", "json:label"), ("json:label", "json:label"), ("meta.json:a:b", "meta.json:a:b"),
     ("output.cls", "output.cls"), ("a.b", "json:a.b"), ("json:a.cls", "json:a.cls"), (".Label", "label"),
     ("cls;y.cls", "cls;y.cls"), ("class", "json:class")],
)  # fmt: skip
def test_keys_of_labels_come_back_from_the_manifest(key: str, made: str) -> None:
    found = label_format.parse_flags("", key)
    assert found.to_manifest_values() == {"labels": made}
    assert label_format.parse_manifest_values(found.to_manifest_values()) == found


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"image_key": "jpg;"}, "image_key: must be extensions"), ({"image_key": "a/b"}, "image_key: must be"),
     ({"label_key": "cls;cls"}, "label_key: must be extensions such as .*, each once"),
     ({"image_key": "jpg", "label_key": ".jpg"}, "label_key: 'jpg' must not be an image, too")],
)  # fmt: skip
def test_keys_that_mean_nothing(tmp_path: Path, keys: dict[str, str], said: str) -> None:
    write(tmp_path, train_0=members(2, "jpg", "cls"))
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, **keys)


# ------------------------------------------------------------------ tars of all kinds
def test_a_tar_without_members_is_named(tmp_path: Path) -> None:
    write(tmp_path, train_0=members(4, "jpg", "cls"), train_1=[])
    with pytest.raises(DataError, match=r"train-1.tar: no sample in it; name tars that have samples"):
        run(tmp_path)


def old_gnu(member_list: Members) -> bytes:
    """A tar as GNU tar writes it with access times, which stand where ustar has the first part of a long name."""
    data = bytearray(tiny_shards.tar(member_list))
    at = 0
    while any(data[at : at + 512]):
        size = int(data[at + 124 : at + 135], 8)
        data[at + 257 : at + 265] = b"ustar  \0"
        data[at + 345 : at + 369] = b"15302743634\0" * 2
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        at += 512 + -(-size // 512) * 512
    return bytes(data)


def test_access_times_are_no_part_of_a_name(tmp_path: Path) -> None:
    file_io.write_bytes(f"{tmp_path}/train-0.tar", old_gnu(members(3, "jpg", "cls")))
    with tarfile.open(tmp_path / "train-0.tar") as tar:
        assert tar.getnames()[0] == "15302743634/00.jpg", "else this shows nothing"
    run(tmp_path)
    assert [key for key, _, _ in read_all(tmp_path)] == ["00", "01", "02"]


def test_volume_labels_and_lists_of_folders_are_skipped() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as out:
        for kind, body in ((b"V", b""), (b"D", b"Yx.jpg\0\0")):
            info = tarfile.TarInfo("photos.jpg")
            info.type, info.size = kind, len(body)
            out.addfile(info, io.BytesIO(body))
    assert list(iter_members(buffer.getvalue(), ("jpg",))) == []


def test_names_that_are_not_utf8_become_keys_that_can_be_kept(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as out:
        for name, body in members(2, "jpg", "cls", "\u00e9"):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            out.addfile(info, io.BytesIO(body))
    file_io.write_bytes(f"{tmp_path}/train-0.tar", buffer.getvalue())
    run(tmp_path)
    assert [key for key, _, _ in read_all(tmp_path)] == ["\\xe900", "\\xe901"]


def test_names_that_steer_a_terminal_are_shown_with_escapes(tmp_path: Path) -> None:
    twice = [
        *members(2, "jpg", "cls", "\x1b]0;a\x07"),
        *members(2, "jpg", "cls", "\x1b[31mb"),
        ("\x1b[2Jx.5.jpg", b"x"),
    ]
    write(tmp_path, train_0=twice)
    said = run(tmp_path, image_key="jpg") + checked(tmp_path)
    assert "images are twice in train" in said
    assert said.replace("\n", "").isprintable()


def test_a_tar_whose_own_name_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, train_0=members(2, "jpg", "cls"))
    (tmp_path / "train-0.tar").rename(tmp_path / "train-\udce9.tar")
    with pytest.raises(DataError, match=r"train: the name of 'train-\\udce9.tar' must be UTF-8"):
        run(tmp_path)
