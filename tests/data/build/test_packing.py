"""Packing as a whole: shards that are fair samples, the same bytes from any packer, nothing lost, all reported."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.config.errors import ConfigError
from orchestrator.data import index, manifest
from orchestrator.data.build import packing, packing_plan, shard_packer, shard_scan
from orchestrator.data.build.config import FolderSource, IlsvrcSource, PackConfig, ShardLayout, Source
from orchestrator.data.build.packing import Packing
from orchestrator.data.build.packing_plan import PackedShard
from orchestrator.data.build.sources import listing
from orchestrator.data.build.sources.listing import ImageRow
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.storage import file_io
from tests.support import imagenet, pictures, tiny_shards


def silent(_text: str) -> None:
    pass


def command(source: Source, url: Path | str, max_bad: float = 0.001, **layout: Any) -> PackConfig:
    chosen = ShardLayout(**{"shard_mib": 0.01, "min_shards": 3, **layout})
    return PackConfig(source=source, url=str(url), layout=chosen, max_bad=max_bad).resolve()


def begun(config: PackConfig) -> Packing:
    found = packing.start_packing(config, silent)
    assert isinstance(found, Packing)
    return found


def pack(config: PackConfig, backwards: bool = False) -> Manifest:
    """Pack in one process, shard after shard."""
    under_way = begun(config)
    entries = dict(under_way.finished)
    left = under_way.list_unfinished()
    for shard in left[::-1] if backwards else left:
        entries[shard] = PackedShard.from_dict(shard_packer.pack_shard(under_way.make_task(shard, 2).to_dict()))
    return packing.finish_packing(under_way, entries)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(url: str, split: str) -> dict[str, tuple[int, bytes, str]]:
    """Label, bytes and extension of each image by key, read by plain webdataset from local tars."""
    found = manifest.load(url)
    paths = [file_io.join(url, shard.name) for shard in found.shards(split)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    by_key = {}
    for sample in samples:
        (extension,) = {"jpg", "png"} & sample.keys()
        by_key[sample["__key__"]] = (int(sample["cls"]), sample[extension], extension)
    assert len(by_key) == len(samples) == found.count_samples(split)
    return by_key


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> IlsvrcSource:
    return IlsvrcSource(url=str(imagenet.as_it_comes(tmp_path_factory.mktemp("ilsvrc"))))


def tree(folder: Path, per_class: int = 12, more: dict[str, bytes] | None = None) -> FolderSource:
    """Two classes in folders, a fifth held out."""
    images = {f"{c}/{n:03d}.jpg": tiny_shards.jpeg(n, 40 + n, 30) for c in ("ant", "bee") for n in range(per_class)}
    imagenet.write(folder, {**images, **(more or {})}.items())
    return FolderSource(url=str(folder), holdout=0.2)


# ------------------------------------------------------------------ the plan
def a_listing(sizes: list[int], lengths: list[int] | None = None) -> listing.SplitListing:
    rows = [(c, n) for c, size in enumerate(sizes) for n in range(size)]
    bytes_of = lengths or [1000]
    return listing.build_split_listing(
        "/x", False, [ImageRow(f"{c}/{n}", "x", c, 0, bytes_of[(c + n) % len(bytes_of)]) for c, n in rows]
    )  # fmt: skip


def assigned(
    found: listing.SplitListing, seed: int, split: str, shard_bytes: float, fewest: int, ratio: float = 1.0
) -> list[NDArray[np.int64]]:
    layout = ShardLayout(seed=seed, shard_mib=shard_bytes / 2**20, min_shards=fewest)
    return packing_plan.assign_shards(found, layout, split, ratio)


@given(
    st.lists(st.integers(0, 80), min_size=2, max_size=8).filter(any),
    st.lists(st.integers(0, 50_000), min_size=1, max_size=9),
    st.integers(0, 9),
    st.floats(5e3, 1e6),
    st.integers(1, 12),
)
@settings(max_examples=60)
def test_every_row_is_in_one_shard(
    sizes: list[int], lengths: list[int], seed: int, shard_bytes: float, fewest: int
) -> None:
    found = a_listing(sizes, lengths)
    made = assigned(found, seed, "train", shard_bytes, fewest)
    assert sorted(np.concatenate(made).tolist()) == list(range(sum(sizes)))
    assert all(len(part) for part in made)
    stored_bytes = found.lengths + packing_plan.SAMPLE_OVERHEAD_BYTES
    largest = max(int(stored_bytes[part].sum()) for part in made)
    assert largest <= shard_bytes + stored_bytes.max() or len(made) == 1
    for mine, again in zip(made, assigned(found, seed, "train", shard_bytes, fewest), strict=True):
        assert mine.tolist() == again.tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [[100] * 10, [500, 50, 5, 300], [1300, 732, 1000], [1] * 40])
def test_classes_are_balanced_over_shards(sizes: list[int], seed: int) -> None:
    found = a_listing(sizes, [900, 1000, 1100])
    made = assigned(found, seed, "train", 8e9, 8)
    assert len(made) == 8
    for part in made:
        expected = np.array(sizes) * len(part) / sum(sizes)
        counts = np.bincount(found.labels[part], minlength=len(sizes))
        # Cut by bytes, not by the positions of a class: an image more or less at each end.
        assert np.abs(counts - expected).max() <= 2


def test_the_shuffle_is_global_and_the_seed_its_only_input() -> None:
    found = a_listing([400, 400])
    one, other = (assigned(found, seed, "train", 8e9, 4) for seed in (1, 2))
    assert [part.tolist() for part in one] != [part.tolist() for part in other]
    for part in one:
        own = found.labels[part]
        assert 60 < int((np.diff(own) != 0).sum()) < 140, "labels of neighbours are no more alike than by chance"
        ranks = part % 400
        assert ranks.min() < 40
        assert ranks.max() > 360
    other_split = assigned(found, 1, "validation", 8e9, 4)
    assert [part.tolist() for part in one] != [part.tolist() for part in other_split]


def test_shards_are_cut_by_bytes() -> None:
    found = a_listing([300, 300], [1000, 100_000])
    made = assigned(found, 0, "train", 2e6, 1)
    sums = [int((found.lengths[part] + packing_plan.SAMPLE_OVERHEAD_BYTES).sum()) for part in made]
    assert len(made) == 16
    assert max(sums) - min(sums) <= 2 * 102_000
    half = assigned(found, 0, "train", 2e6, 1, ratio=0.5)
    assert len(half) == 9, "headers and labels stay as they are"


def test_there_are_no_more_shards_than_images() -> None:
    assert len(assigned(a_listing([2, 1]), 0, "train", 1e9, 8)) == 3


# ------------------------------------------------------------------ what is packed
def test_ilsvrc_is_packed_to_the_byte(tars: IlsvrcSource, tmp_path: Path) -> None:
    made = pack(command(tars, tmp_path))
    assert (made.name, made.classes, len(made.titles)) == ("ilsvrc2012", imagenet.CLASSES, 4)
    expected = {
        f"{wnid}/{name.partition('.')[0]}": (imagenet.CLASSES.index(wnid), data)
        for wnid, members in imagenet.training().items()
        for name, data in members
    }
    found = stored(str(tmp_path), "train")
    assert {key: (label, data) for key, (label, data, _) in found.items()} == expected
    pngs = {key for key, (_, _, extension) in found.items() if extension == "png"}
    assert pngs == {"n02105855/n02105855_1000"}, "named by its content"
    members, ids = imagenet.validation()
    wanted = {
        name.partition(".")[0]: (imagenet.CLASSES.index(imagenet.WNIDS[number - 1]), data, "jpg")
        for (name, data), number in zip(members, ids, strict=True)
    }
    assert stored(str(tmp_path), "validation") == wanted
    assert made == manifest.load(str(tmp_path))
    assert not (tmp_path / packing_plan.PACKING_FOLDER).exists()


def test_indexes_are_those_of_the_tars(tars: IlsvrcSource, tmp_path: Path) -> None:
    made = pack(command(tars, tmp_path))
    for shard in (shard for name in made.splits for shard in made.shards(name)):
        read = shard_scan.index_tar((tmp_path / shard.name).read_bytes(), shard.name)
        kept = index.load(str(tmp_path), shard)
        assert (list(read.keys), read.labels.tolist(), read.offsets.tolist()) == (
            list(kept.keys), kept.labels.tolist(), kept.offsets.tolist()
        )  # fmt: skip


def test_folders_and_tars_give_the_same_dataset(tars: IlsvrcSource, tmp_path: Path) -> None:
    folders = IlsvrcSource(url=str(imagenet.in_folders(tmp_path / "in")))
    one, other = pack(command(tars, tmp_path / "a")), pack(command(folders, tmp_path / "b"))
    assert one == other
    tars_only = {name for name in content(tmp_path / "a") if name.endswith(".tar")}
    for name in tars_only:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_any_order_and_any_place_gives_the_same_bytes(tars: IlsvrcSource, tmp_path: Path) -> None:
    pack(command(tars, tmp_path / "a"))
    pack(command(tars, tmp_path / "b"), backwards=True)
    pack(command(tars, "memory://packed/c"))
    expected = content(tmp_path / "a")
    assert content(tmp_path / "b") == expected
    assert {name: file_io.read_bytes(f"memory://packed/c/{name}") for name in expected} == expected
    assert file_io.list_names("memory://packed/c") == sorted({name.partition("/")[0] for name in expected})


def test_another_seed_is_another_dataset(tars: IlsvrcSource, tmp_path: Path) -> None:
    one, other = pack(command(tars, tmp_path / "a")), pack(command(tars, tmp_path / "b", seed=1))
    assert one.digest() != other.digest()
    assert stored(str(tmp_path / "a"), "train") == stored(str(tmp_path / "b"), "train")


def test_what_the_manifest_reports_of_its_making(tars: IlsvrcSource, tmp_path: Path) -> None:
    made = pack(command(tars, tmp_path)).made
    assert set(made) == {"source", "holdout", "seed", "shard_mib", "min_shards", "resize", "decode", "listing"}
    text = json.dumps(made) + (tmp_path / packing.REPORT_NAME).read_text()
    assert str(tmp_path) not in text
    assert tars.url not in text


def test_larger_images_are_reduced_when_asked(tmp_path: Path) -> None:
    source = tree(
        tmp_path / "in",
        more={"ant/large.jpg": tiny_shards.jpeg(0, 400, 300), "ant/l.png": tiny_shards.encoded("L", "PNG")},
    )
    made = pack(command(source, tmp_path / "out", resize=30))
    found = stored(str(tmp_path / "out"), "train") | stored(str(tmp_path / "out"), "validation")
    assert found["ant/003"][1] == (tmp_path / "in/ant/003.jpg").read_bytes(), "30 high already"
    assert len(found["ant/large"][1]) < (tmp_path / "in/ant/large.jpg").stat().st_size / 10
    assert found["ant/l"][2] == "png"
    assert (made.made["resize"], made.made["quality"]) == (30, 95)
    splits = json.loads((tmp_path / "out" / packing.REPORT_NAME).read_text())["splits"]
    assert sum(split["resized"] for split in splits.values()) == 1


# ------------------------------------------------------------------ the report
def test_every_oddity_is_counted(tars: IlsvrcSource, tmp_path: Path) -> None:
    pack(command(tars, tmp_path))
    report = json.loads((tmp_path / packing.REPORT_NAME).read_text())
    train = report["splits"]["train"]
    assert train["met"] == dict.fromkeys(imagenet.odd(), 1)
    assert (train["images"], train["left_out"], train["classes_without_images"]) == (31, [], [])
    assert (train["fewest_of_a_class"], train["most_of_a_class"]) == (6, 13)


def test_broken_images_are_left_out_and_listed(tmp_path: Path) -> None:
    train = imagenet.training(more=imagenet.broken())
    folder = imagenet.as_it_comes(tmp_path / "in", {wnid: m for wnid, m in train.items() if wnid != "n01440764"})
    config = command(IlsvrcSource(url=str(folder)), tmp_path / "out")
    under_way = begun(config)
    entries = {
        shard: PackedShard.from_dict(shard_packer.pack_shard(under_way.make_task(shard, 1).to_dict()))
        for shard in under_way.list_unfinished()
    }
    packing.check_bad_limit(under_way.plan, entries, 0.001)  # ten always may be
    made = packing.finish_packing(under_way, entries)
    assert made.count_samples("train") == 25
    split = json.loads((tmp_path / "out" / packing.REPORT_NAME).read_text())["splits"]["train"]
    assert Counter(bad["defect"] for bad in split["left_out"]) == Counter(
        ["empty", "no-image", "too-large", "undecodable"]
    )
    assert {bad["source"].partition("/")[0] for bad in split["left_out"]} == {"n02105855.tar"}
    assert all(bad["key"] and bad["reason"] and bad["class"] == "n02105855" for bad in split["left_out"])
    assert split["classes_without_images"] == ["n01440764"]
    assert "broken" not in stored(str(tmp_path / "out"), "train")


def test_too_many_broken_images_are_errors_by_name(tmp_path: Path) -> None:
    bad = {f"ant/bad{n:02d}.jpg": b"nothing" for n in range(11)}
    config = command(tree(tmp_path / "in", more=bad), tmp_path / "out")
    under_way = begun(config)
    entries = {
        shard: PackedShard.from_dict(shard_packer.pack_shard(under_way.make_task(shard, 1).to_dict()))
        for shard in under_way.list_unfinished()
    }
    with pytest.raises(DataError, match=r"11 of the first 35 images are broken, of 35 at most 10 may be.*\(ant/bad"):
        packing.check_bad_limit(under_way.plan, entries, 0.001)
    packing.check_bad_limit(under_way.plan, entries, 0.5)
    assert not (tmp_path / "out" / manifest.FILE_NAME).exists()


def test_a_shard_of_broken_images_alone_is_no_shard(tmp_path: Path) -> None:
    source = FolderSource(url=str(tmp_path / "in"), holdout=0.0)
    imagenet.write(
        tmp_path / "in", [("a/1.jpg", tiny_shards.jpeg(1)), ("a/2.jpg", b""), ("b/1.jpg", tiny_shards.jpeg(2))]
    )
    made = pack(command(source, tmp_path / "out"))
    assert made.count_samples("train") == 2
    assert len(made.shards("train")) == 2
    assert len(list((tmp_path / "out/train").iterdir())) == 4


def test_a_split_of_broken_images_alone_is_an_error(tmp_path: Path) -> None:
    imagenet.write(tmp_path / "in", [("a/1.jpg", b""), ("b/1.jpg", b"x")])
    with pytest.raises(DataError, match="no image of the train split can be decoded"):
        pack(command(FolderSource(url=str(tmp_path / "in"), holdout=0.0), tmp_path / "out"))
    assert not (tmp_path / "out" / manifest.FILE_NAME).exists()


# ------------------------------------------------------------------ going on
def test_a_packing_resumes_where_it_stopped(tars: IlsvrcSource, tmp_path: Path) -> None:
    pack(command(tars, tmp_path / "a"))
    config = command(tars, tmp_path / "b")
    under_way = begun(config)
    shard_list = under_way.list_unfinished()
    for shard in shard_list[1:3]:
        shard_packer.pack_shard(under_way.make_task(shard, 1).to_dict())
    # Killed between the tar and its entry, and while a temporary file was written.
    done = file_io.join(
        config.url, packing_plan.PACKING_FOLDER, "done", f"{shard_list[1][0]}-{shard_list[1][1]:06d}.json"
    )
    file_io.remove(done)
    (tmp_path / "b/train/.tmp-0123").write_bytes(b"half a tar")
    assert begun(config).list_unfinished() == [shard for shard in shard_list if shard != shard_list[2]]
    pack(config)
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_a_finished_shard_whose_tar_is_missing_or_cut_is_packed_again(tars: IlsvrcSource, tmp_path: Path) -> None:
    config = command(tars, tmp_path)
    under_way = begun(config)
    for shard in under_way.list_unfinished()[:3]:
        shard_packer.pack_shard(under_way.make_task(shard, 1).to_dict())
    (tmp_path / "train/train-000000.tar").unlink()
    (tmp_path / "train/train-000001.tar").write_bytes(b"short")
    assert ("train", 0) in begun(config).list_unfinished()
    assert ("train", 1) in begun(config).list_unfinished()
    assert ("train", 2) not in begun(config).list_unfinished()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 1}, "seed '0' is there, this command has '1'"), ({"resize": 20}, "resize '0' is there"),
     ({"shard_mib": 0.5}, "shard_mib '0.01' is there"), ({"decode": False}, "decode 'True' is there")],
)  # fmt: skip
def test_another_command_into_an_unfinished_packing_is_an_error(
    tars: IlsvrcSource, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    begun(command(tars, tmp_path))
    with pytest.raises(DataError, match=said):
        begun(command(tars, tmp_path, **change))


def test_another_source_into_an_unfinished_packing_is_an_error(tars: IlsvrcSource, tmp_path: Path) -> None:
    begun(command(tars, tmp_path / "out"))
    folders = IlsvrcSource(url=str(imagenet.in_folders(tmp_path / "in")))
    with pytest.raises(DataError, match=r"source\.url '.*' is there, this command has"):
        begun(command(folders, tmp_path / "out"))
    with pytest.raises(DataError, match="an unfinished packing with"):
        begun(command(tree(tmp_path / "tree"), tmp_path / "out"))


def test_a_damaged_plan_or_entry_is_reported(tars: IlsvrcSource, tmp_path: Path) -> None:
    config = command(tars, tmp_path)
    under_way = begun(config)
    shard_packer.pack_shard(under_way.make_task(("train", 0), 1).to_dict())
    (tmp_path / "_packing/done/train-000000.json").write_text("{")
    with pytest.raises(DataError, match=r"done/train-000000\.json: damaged: .*remove it to pack that shard again"):
        begun(config)
    (tmp_path / "_packing/plan.json").write_text("[]")
    with pytest.raises(DataError, match=r"plan\.json: damaged.*start anew"):
        begun(config)


def test_rows_that_a_node_does_not_see_are_reported(tars: IlsvrcSource, tmp_path: Path) -> None:
    task = begun(command(tars, tmp_path)).make_task(("train", 0), 1)
    with pytest.raises(DataError, match=r"not visible on node .*all nodes share"):
        shard_packer.pack_shard({**task.to_dict(), "url": str(tmp_path / "elsewhere")})


# ------------------------------------------------------------------ finished
def test_the_same_command_again_says_that_it_is_packed(tars: IlsvrcSource, tmp_path: Path) -> None:
    made = pack(command(tars, tmp_path))
    before = content(tmp_path)
    assert packing.start_packing(command(tars, tmp_path), silent) == made
    assert content(tmp_path) == before


def test_what_a_kill_after_the_manifest_left_is_removed(tars: IlsvrcSource, tmp_path: Path) -> None:
    config = command(tars, tmp_path)
    under_way = begun(config)
    plan = (tmp_path / "_packing/plan.json").read_bytes()
    made = pack(config)
    imagenet.write(tmp_path, [("_packing/plan.json", plan)])
    assert under_way.plan.made == made.made
    assert packing.start_packing(config, silent) == made
    assert not (tmp_path / "_packing").exists()


def test_another_dataset_is_never_overwritten(tars: IlsvrcSource, tmp_path: Path) -> None:
    source = tree(tmp_path / "in")
    pack(command(source, tmp_path / "out"))
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match=r"the dataset 'in' is there, packed with seed 0; this command has 1"):
        packing.start_packing(command(source, tmp_path / "out", seed=1), silent)
    with pytest.raises(DataError, match=r"packed with name 'in'; this command has 'ilsvrc2012'"):
        packing.start_packing(command(tars, tmp_path / "out"), silent)
    (tmp_path / "in/ant/new.jpg").write_bytes(tiny_shards.jpeg(1))
    with pytest.raises(DataError, match="the dataset 'in' is there, packed from other images"):
        packing.start_packing(command(source, tmp_path / "out"), silent)
    assert content(tmp_path / "out") == before


# ------------------------------------------------------------------ refusals
def test_packing_into_the_source_is_an_error(tmp_path: Path) -> None:
    source = tree(tmp_path / "in")
    for url in (tmp_path / "in", tmp_path / "in/ant/packed"):
        with pytest.raises(DataError, match=r"url: .* must not lie in .*/in, which is to be packed"):
            packing.start_packing(command(source, url), silent)
    packing.start_packing(command(source, tmp_path / "input"), silent)


def test_an_image_that_is_missing_or_shorter_than_listed_is_reported(tmp_path: Path) -> None:
    config = command(tree(tmp_path / "in"), tmp_path / "out", min_shards=1, shard_mib=10.0)
    under_way = begun(config)
    (tmp_path / "in/ant/003.jpg").write_bytes(b"short")
    with pytest.raises(OSError, match=r"ant/003\.jpg: truncated"):
        for shard in under_way.list_unfinished():
            shard_packer.pack_shard(under_way.make_task(shard, 2).to_dict())
    (tmp_path / "in/ant/003.jpg").unlink()
    with pytest.raises(DataError, match=r"ant/003\.jpg: removed since it was listed"):
        for shard in under_way.list_unfinished():
            shard_packer.pack_shard(under_way.make_task(shard, 2).to_dict())


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="url: needed"):
        PackConfig(source=FolderSource(url="/x")).resolve()
    with pytest.raises(ConfigError, match="digits are packed one way only"):
        PackConfig.from_dict({"source": {"kind": "digits"}, "layout": {"seed": 1}})


def test_of_two_that_start_at_the_same_time_the_winner_packs_its_own_rows(tars: IlsvrcSource, tmp_path: Path) -> None:
    """Both saw no plan; the loser writes its rows last, and raises an error."""
    wanted = pack(command(tars, tmp_path / "alone", seed=1)).digest()
    winner, loser = (command(tars, tmp_path / "both", seed=seed).resolve() for seed in (1, 2))
    plans = [packing.plan_packing(one, packing._find_roots(one), silent) for one in (winner, loser)]
    packing_plan.save_plan(winner, *plans[0])
    with pytest.raises(DataError, match="an unfinished packing with"):
        packing_plan.save_plan(loser, *plans[1])
    assert pack(winner).digest() == wanted


# ------------------------------------------------------------------ formats and transparency
HEIC, AVIF = (b"\0\0\0\x18ftyp" + brand + bytes(90) for brand in (b"heic", b"avif"))


def transparent(number: int) -> bytes:
    pixels = tiny_shards.picture(number)
    return pictures.png(np.dstack((pixels, pixels[:, :, 0])), 6, 8)


def met(folder: Path) -> Counter[str]:
    """Counts of the report, of all splits."""
    splits = json.loads((folder / packing.REPORT_NAME).read_bytes())["splits"].values()
    return sum((Counter(split["met"]) for split in splits), Counter())


def test_transparency_is_counted_and_part_of_the_identity(tmp_path: Path) -> None:
    one = tree(tmp_path / "one", more={"bee/clear.png": transparent(1)})
    made = pack(command(one, tmp_path / "a"))
    assert made.made[manifest.BACKGROUND_KEY] == "white"
    assert met(tmp_path / "a") == {"transparent": 1}
    plain = {name: value for name, value in made.made.items() if name != manifest.BACKGROUND_KEY}
    assert made.model_copy(update={"made": plain}).digest() != made.digest()
    packed = packing.start_packing(command(one, tmp_path / "a"), silent)
    assert isinstance(packed, Manifest), "the same command again finds it packed"
    without = pack(command(tree(tmp_path / "two"), tmp_path / "b"))
    assert manifest.BACKGROUND_KEY not in without.made


def test_what_was_left_out_or_converted_is_counted_by_format(tmp_path: Path) -> None:
    more = {f"bee/h{n}.jpg": HEIC for n in range(3)} | {f"bee/a{n}.jpg": AVIF for n in range(2)}
    more |= {"bee/w.webp": tiny_shards.encoded("RGB", "WEBP"), "bee/g.gif": tiny_shards.encoded("P", "GIF")}
    pack(command(tree(tmp_path / "tree", more=more), tmp_path / "packed"))
    assert met(tmp_path / "packed") == {"heic": 3, "avif": 2, "webp": 1, "gif": 1}


def test_pictures_that_were_left_out_are_reported_by_format_whether_by_content_or_by_name(tmp_path: Path) -> None:
    more = {f"bee/h{n}.jpg": HEIC for n in range(3)} | {"bee/x.HEIC": HEIC, "bee/x.avif": AVIF, "bee/e.jpg": b""}
    under_way = begun(command(tree(tmp_path / "tree", more={**more, "bee/notes.txt": b"x"}), tmp_path / "packed"))
    entries = {
        shard: PackedShard.from_dict(shard_packer.pack_shard(under_way.make_task(shard, 2).to_dict()))
        for shard in under_way.list_unfinished()
    }
    lines = packing.describe_report(packing.build_report(under_way.plan, entries))
    (said,) = (line for line in lines if line.startswith("6 left out: 4 HEIC, "))
    assert "1 AVIF" in said and "1 empty" in said and said.endswith("; convert them to JPEG or PNG first")


def test_too_many_of_a_format_are_reported_by_format(tmp_path: Path) -> None:
    more = {f"bee/h{n}.jpg": HEIC for n in range(8)} | {f"bee/a{n}.jpg": AVIF for n in range(4)}
    under_way = begun(command(tree(tmp_path / "tree", more=more), tmp_path / "packed"))
    entries = {
        shard: PackedShard.from_dict(shard_packer.pack_shard(under_way.make_task(shard, 2).to_dict()))
        for shard in under_way.list_unfinished()
    }
    with pytest.raises(DataError, match=r"Broken \(8 HEIC, 4 AVIF\): "):
        packing.check_bad_limit(under_way.plan, entries, 0.001)
