import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli import predict
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest
from orchestrator.data.data_errors import DataError
from orchestrator.ensemble import ensemble_registry
from orchestrator.ensemble.config import ModelChoice, PredictConfig
from orchestrator.evaluation.classifier import Classifier
from tests.support import ensembles, tiny_shards


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with ensembles.one_thread():
        yield


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ensembles of the same three runs, and a newer one that is not whole."""
    folder = tmp_path_factory.mktemp("runs")
    ensembles.members(folder)
    ensembles.ensemble(folder, "older", ("m1", "m2"), since=100.0)
    ensembles.ensemble(folder, "newer", since=200.0)
    ensembles.ensemble(folder, "partial", ("m1", "m4"), since=300.0)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("b.jpg", "a.JPEG", "c.png")):
        (folder / name).write_bytes(tiny_shards.jpeg(number, 40, 30 + number))
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7Mac OS X")
    return folder


def chosen(storage: Path, **fields: Any) -> ModelChoice:
    return ModelChoice(storage=str(storage), **fields)


def finals(storage: Path, *names: str) -> tuple[str, ...]:
    return tuple(str(storage / "models" / name / "final") for name in names)


def predicted(storage: Path, *images: str, **fields: Any) -> tuple[int, Console]:
    console = Console(width=60, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    config = PredictConfig(images=images, chosen=chosen(storage), **fields)
    status = predict.run_predict(config, console)
    console.file.close()
    return status, console


# ------------------------------------------------------------------ which models
def test_by_default_the_last_whole_ensemble(storage: Path) -> None:
    found = predict.resolve_source(chosen(storage))
    assert found.weights_urls == finals(storage, "m1", "m2", "m3")
    assert found.description == "newer, the newest complete one of 3 trained (3 models)"


def made(storage: Path, name: str, made_by: str, created: float, of: tuple[str, ...] = ("m1", "m2", "m3")) -> None:
    record = {"members": list(of), "recipes": {}, "made_by": made_by, "created": created}
    folder = storage / "ensembles" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ensemble.json").write_text(json.dumps(record))


def test_what_was_looked_at_last_is_not_what_answers(tmp_path: Path) -> None:
    ensembles.members(tmp_path)
    made(tmp_path, "trained", "train_ensemble", 100.0)
    made(tmp_path, "older", "train_ensemble", 50.0, ("m1",))
    made(tmp_path, "evaluated", "evaluate", 300.0, ("m2",))
    holder = tmp_path / "ensembles" / "older" / "lease"  # worked on again, as an evaluation of all its members does
    holder.mkdir()
    (holder / "000001.json").write_text(json.dumps({"host": "there", "pid": 1, "job": "", "since": 900.0}))
    (holder / "000001.released").write_text("")
    assert (
        predict.resolve_source(chosen(tmp_path)).description
        == "trained, the newest complete one of 2 trained (3 models)"
    )
    assert predict.resolve_source(chosen(tmp_path, model="evaluated")).weights_urls == finals(tmp_path, "m2")


def test_the_registered_champion_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = ensembles.members(tmp_path)
    made(tmp_path, "trained", "train_ensemble", 100.0)
    (tmp_path / "mlflow.db").touch()
    asked: list[str] = []

    def registered(champions: list[str]) -> None:
        def ask(uri: str) -> list[str]:
            asked.append(uri)
            return champions

        monkeypatch.setattr(ensemble_registry, "find_champions", ask)

    def fetch(uri: str, model: str, scratch: str) -> tuple[list[str], list[str]]:
        assert model == "models:/tiny@champion"
        return [f"{runs[1]}/final"], ["an ant", "a bee", "a cat"]

    monkeypatch.setattr(ensemble_registry, "fetch_weights", fetch)
    told: list[str] = []
    registered(["models:/tiny@champion"])
    assert predict.load_classifier(chosen(tmp_path), told.append).names == ("an ant", "a bee", "a cat")
    assert told[-1].startswith("model: models:/tiny@champion (1 model): the champion registered in sqlite:///")
    assert asked == [f"sqlite:///{tmp_path}/mlflow.db"]
    registered([])
    assert len(predict.load_classifier(chosen(tmp_path), told.append)) == 3
    assert told[-1].startswith("model: trained (3 models): no champion is registered in sqlite:///")
    registered(["models:/a@champion", "models:/b@champion"])
    with pytest.raises(ConfigError, match=r"2 champions .* --model to one: models:/a@champion, models:/b@champion"):
        predict.load_classifier(chosen(tmp_path), told.append)
    assert len(predict.load_classifier(chosen(tmp_path, model="trained"), told.append)) == 3  # what is named needs none


def test_without_a_registry_it_says_which_one_answers(storage: Path) -> None:
    told: list[str] = []
    predict.load_classifier(chosen(storage), told.append)
    assert told == ["model: newer, the newest complete one of 3 trained (3 models): no model is registered"]


def test_by_name_url_and_number(storage: Path) -> None:
    assert predict.resolve_source(chosen(storage, model="older")).weights_urls == finals(storage, "m1", "m2")
    by_url = ModelChoice(model=str(storage / "ensembles" / "newer"), members=(3, 1))
    assert predict.resolve_source(by_url).weights_urls == finals(storage, "m3", "m1")
    assert predict.resolve_source(by_url).description == "newer (models 3,1 of 3)"
    assert predict.resolve_source(chosen(storage, model="m2")).weights_urls == finals(storage, "m2")
    # What is finished of a partial ensemble can be used, when that is what is asked for.
    assert predict.resolve_source(chosen(storage, model="partial", members=(1,))).weights_urls == finals(storage, "m1")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "partial"}, "model: partial: its model 2, m4, is not finished"),
        ({"model": "newwer"}, "no such run, ensemble or sweep in .*; did you mean newer"),
        ({"members": (4,)}, "members: must be different numbers from 1 to 3, got 4"),
        ({"members": (0, 1)}, "from 1 to 3, got 0,1"),
        ({"members": (2, 2)}, "from 1 to 3, got 2,2"),
    ],
)
def test_models_that_are_not_there(storage: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        predict.resolve_source(chosen(storage, **fields))


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"members": []}'])
def test_an_ensemble_whose_record_is_damaged_is_named_with_its_file(tmp_path: Path, record: bytes) -> None:
    ensembles.ensemble(tmp_path, "damaged")
    (tmp_path / "ensembles" / "damaged" / "ensemble.json").write_bytes(record)
    with pytest.raises(ConfigError, match=r"^model: .*/damaged/ensemble\.json: "):
        predict.resolve_source(chosen(tmp_path, model="damaged"))


def test_no_whole_ensemble(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no ensemble in .* is completely trained \(0 there\)"):
        predict.resolve_source(chosen(tmp_path))
    ensembles.ensemble(tmp_path, "lonely")
    with pytest.raises(ConfigError, match=r"\(1 there\)"):
        predict.resolve_source(chosen(tmp_path))


def test_damaged_weights_are_told_and_named(tmp_path: Path) -> None:
    ensembles.members(tmp_path, ["m1"])
    ensembles.ensemble(tmp_path, of=["m1"])
    (tmp_path / "models" / "m1" / "final" / "state.pt").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"model: .*m1/final.*state\.pt.*damaged"):
        predict.load_classifier(chosen(tmp_path), lambda _: None)


def test_titles_come_from_the_dataset_that_a_run_was_trained_on(tmp_path: Path) -> None:
    packed = tiny_shards.dataset(tmp_path / "data")
    titled = packed.model_copy(update={"titles": ("an ant", "a bee", "a cat")})
    manifest.save(str(tmp_path / "data"), titled)
    (run,) = ensembles.members(tmp_path, ["m1"])
    ensembles.ensemble(tmp_path, of=["m1"])
    spec = {"destination": {"data": str(tmp_path / "data")}, "dataset_digest": titled.digest()}
    Path(run, "spec.json").write_text(json.dumps(spec))
    assert predict.resolve_source(chosen(tmp_path)).titles == titled.titles
    for other in ({**spec, "dataset_digest": "another"}, {**spec, "destination": {"data": "/nowhere"}}, {}):
        Path(run, "spec.json").write_text(json.dumps(other))
        assert predict.resolve_source(chosen(tmp_path)).titles == ()


# ------------------------------------------------------------------ which images
def test_images_of_folders_by_their_extensions(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    files = [str(photos / name) for name in ("a.JPEG", "b.jpg", "c.png")]
    assert predict.find_images(["."]) == files
    assert predict.find_images(["c.png", str(photos) + "/"]) == [files[2], *files]
    # What is named is taken for an image, whatever it is called.
    assert predict.find_images(["notes.txt", "none.jpg"]) == [str(photos / "notes.txt"), str(photos / "none.jpg")]
    assert predict.find_images(["s3ish://is.never/asked.jpg"][:0]) == []


def test_pictures_of_other_formats_in_a_folder_get_an_answer(tmp_path: Path) -> None:
    for name in ("a.HEIC", "b.avif", "c.jpg", "._a.heic", "map.svg", "paper.pdf", "heic"):
        (tmp_path / name).write_bytes(b"")
    assert [Path(url).name for url in predict.find_images([str(tmp_path)])] == ["a.HEIC", "b.avif", "c.jpg"]


def test_a_folder_without_images_is_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder without images; subfolders are not searched"):
        predict.find_images([str(photos.parent)])


def test_images_of_other_storage(photos: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        memory.pipe_file("/pictures/a.jpg", (photos / "b.jpg").read_bytes())
        assert predict.find_images(["memory://pictures"]) == ["memory://pictures/a.jpg"]
        status, _ = predicted(storage, "memory://pictures", json_lines=True)
    finally:
        memory.rm("/pictures", recursive=True)
    assert status == 0
    assert json.loads(capsys.readouterr().out)["image"] == "memory://pictures/a.jpg"


@pytest.fixture
def web(photos: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photos))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_images_of_the_web(web: str, storage: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = predicted(storage, f"{web}/b.jpg?key=secret", f"{web}/none.jpg", str(photos / "b.jpg"), json_lines=True)
    assert status == 1
    first, missing, local = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["image"] == f"{web}/b.jpg"  # no key is shown
    assert missing == {"image": f"{web}/none.jpg", "error": "nothing there"}
    # Of one batch: the place of an image in it may round its sums differently.
    assert [list(guess.values())[:2] for guess in first["predictions"]] == [
        list(guess.values())[:2] for guess in local["predictions"]
    ]
    probabilities = [[guess["probability"] for guess in one["predictions"]] for one in (first, local)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-6)


# ------------------------------------------------------------------ what is told
def test_json_has_what_the_classifier_says(storage: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.jpg").write_bytes(b"no image")
    status, _ = predicted(storage, str(photos), json_lines=True, crops=144, top=2)
    out, err = capsys.readouterr()
    assert status == 1
    assert "model: newer, the newest complete one of 3 trained (3 models): no model is registered" in err
    assert "1 of 4 images could not be read" in err
    rows = [json.loads(line) for line in out.splitlines()]
    names = ("a.JPEG", "b.jpg", "broken.jpg", "c.png")
    assert [row["image"] for row in rows] == [str(photos / name) for name in names]
    assert rows[2]["error"].startswith("no JPEG or PNG")
    known = Classifier(finals(storage, "m1", "m2", "m3"))
    for name, row in zip(names, rows, strict=True):
        if "error" not in row:
            (guesses,) = known.classify([(photos / name).read_bytes()], 144, 2)
            assert isinstance(guesses, list)
            assert [one["label"] for one in row["predictions"]] == [guess.label for guess in guesses]
            assert row["predictions"][0]["probability"] == pytest.approx(guesses[0].probability, abs=1e-6)


def test_json_has_names_that_are_not_utf_8_as_escapes(
    storage: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(os.fsencode(str(photos)) + b"/caf\xe9.jpg")
    Path(name).write_bytes((photos / "b.jpg").read_bytes())
    assert predicted(storage, name, f"{name}.none", json_lines=True)[0] == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in found] == [f"{photos}/caf\\udce9.jpg", f"{photos}/caf\\udce9.jpg.none"]
    for row in found:
        json.dumps(row, ensure_ascii=False).encode()  # raises for a lone surrogate


def test_a_table_fits_the_terminal(storage: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = photos / ("very-" * 20 + "long.jpg")
    long.write_bytes((photos / "b.jpg").read_bytes())
    (photos / "broken.jpg").write_bytes(b"no image")
    status, console = predicted(storage, str(photos), str(photos / "none [bold].jpg"))
    shown = console.export_text()
    assert status == 1
    assert max(map(len, shown.splitlines())) <= 60
    assert "none [bold].jpg" in shown.replace("\n", "") or "[bold]" in shown  # no markup is read into names
    assert shown.count(" % ") == 3 * 4  # three classes of four images
    assert "not read: nothing there" in " ".join(shown.split())
    assert capsys.readouterr().out == ""


def test_too_large_a_file_is_not_read(
    storage: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "MAX_IMAGE_BYTES", 100)
    assert predicted(storage, str(photos / "b.jpg"), json_lines=True)[0] == 1
    assert "must have at most 100 bytes" in json.loads(capsys.readouterr().out)["error"]


def test_no_image_is_refused(storage: Path) -> None:
    with pytest.raises(ConfigError, match="images: give at least one image"):
        predicted(storage)


def test_images_of_one_name_are_told_apart() -> None:
    images = ["/a/x.jpg", "/b/x.jpg", "/b/y.jpg", "/b/y.jpg"]
    assert predict.shorten_names(images) == {"/a/x.jpg": "/a/x.jpg", "/b/x.jpg": "/b/x.jpg", "/b/y.jpg": "y.jpg"}
