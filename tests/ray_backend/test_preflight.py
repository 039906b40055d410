import io
import threading
from concurrent.futures import Future
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from mlflow.tracking import MlflowClient
from ray.exceptions import NodeDiedError, RayTaskError, RuntimeEnvSetupError, TaskUnschedulableError, WorkerCrashedError
from rich.console import Console

from orchestrator.cli.exit_status import run_command
from orchestrator.config.errors import ConfigError
from orchestrator.data.build import indexing
from orchestrator.data.build.config import IndexConfig
from orchestrator.data.build.tar_writer import encode_tar, write_dataset
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.ray_backend import launch_errors, preflight, session
from orchestrator.ray_backend.launch_errors import ClusterError, PreflightError
from orchestrator.ray_backend.lease import LeaseHeldError, LeaseOwner
from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.scheduler import dry_run
from orchestrator.storage import file_io
from orchestrator.storage.commit import CommitError
from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.tracker import Tracker
from tests.support import plugin_metrics, runs, tiny_shards
from tests.support.launched import recipe

T = TypeVar("T")
NODE: dict[str, Any] = {"NodeID": "n", "NodeManagerAddress": "10.0.0.9", "Alive": True}


@pytest.fixture
def packed(tmp_path: Path) -> Manifest:
    return tiny_shards.dataset(tmp_path / "data")


def check(folder: Path, **places: str | bool) -> Manifest:
    asked = Destination.from_dict({"data": str(folder / "data"), "storage": str(folder / "runs"), **places})
    return preflight.prepare_dataset(asked, asked.resolve())


def problems(folder: Path, **places: str | bool) -> tuple[str, ...]:
    with pytest.raises(PreflightError) as raised:
        check(folder, **places)
    return raised.value.problems


# ------------------------------------------------------------------ dataset
def test_a_whole_dataset_passes(packed: Manifest, tmp_path: Path) -> None:
    assert check(tmp_path) == packed


def test_a_folder_without_a_dataset_is_reported(tmp_path: Path) -> None:
    (text,) = problems(tmp_path)
    assert f"{tmp_path}/data/manifest.json: no manifest there" in text


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_shard_is_named(packed: Manifest, tmp_path: Path, split: str) -> None:
    name = packed.shards(split)[1].name
    (tmp_path / "data" / name).unlink()
    assert problems(tmp_path) == (
        f"data: {tmp_path}/data/{name}: missing, the manifest lists it; pack or index the dataset again",
    )


@pytest.mark.parametrize("change", [-512, 512])
def test_a_truncated_or_replaced_shard_is_named_with_both_sizes(packed: Manifest, tmp_path: Path, change: int) -> None:
    shard = packed.shards("train")[-1]
    path = tmp_path / "data" / shard.name
    path.write_bytes(path.read_bytes()[: shard.bytes + min(change, 0)] + b"\0" * max(change, 0))
    (text,) = problems(tmp_path)
    assert text.startswith(f"data: {path}: {shard.bytes + change} bytes, the manifest says {shard.bytes}:")


@pytest.fixture
def adopted(tmp_path: Path) -> Path:
    """The folder of foreign tars whose manifest and indexes lie in `data`."""
    tars = tmp_path / "tars"
    for name, first in (("train-0", 0), ("train-1", 8), ("val", 500)):
        file_io.write_bytes(str(tars / f"{name}.tar"), encode_tar(tiny_shards.samples(8, first)))
    job = IndexConfig(url=str(tars), train="train-*.tar", validation="val.tar", to=str(tmp_path / "data"))
    indexing.index_dataset(job, Console(file=io.StringIO()))
    return tars


def test_tars_elsewhere_need_a_flag_and_are_trained_on(adopted: Path, tmp_path: Path) -> None:
    (text,) = problems(tmp_path)
    assert f"must lie below {tmp_path}/data, got {adopted}; set --allow-elsewhere" in text
    found = check(tmp_path, allow_elsewhere=True)
    recipe = runs.recipe(batch_size=8)
    destination = Destination(data=str(tmp_path / "data"), storage=str(tmp_path / "runs"), allow_elsewhere=True)
    spec = RunSpec(recipe=recipe, placement=Placement(), destination=destination, dataset_digest=found.digest())
    assert runs.train(spec.build_train_job(stop_flag=str(tmp_path / "stop"), successor="")).status == "finished"


@pytest.mark.parametrize(("keep", "said"), [(None, "missing, the manifest lists it"), (512, "512 bytes, the manifest"),
                                            (-1, "damaged: not the checksum")])  # fmt: skip
def test_a_tar_elsewhere_is_checked_where_it_lies(adopted: Path, tmp_path: Path, keep: int | None, said: str) -> None:
    path, data = adopted / "train-1.tar", (adopted / "train-1.tar").read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(data[:keep] + b"x" * (keep < 0))
    (text,) = problems(tmp_path, allow_elsewhere=True)
    assert f"{path}: {said}" in text


def test_the_flag_is_no_part_of_a_runs_identity(packed: Manifest, tmp_path: Path) -> None:
    specs = [
        RunSpec(
            recipe=runs.recipe(batch_size=8),
            placement=Placement(),
            destination=Destination(data=str(tmp_path / "data"), storage=str(tmp_path), allow_elsewhere=allowed),
            dataset_digest=packed.digest(),
        )
        for allowed in (False, True)
    ]
    assert specs[0].identity == specs[1].identity


def test_a_damaged_manifest_is_reported(packed: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "data" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    (text,) = problems(tmp_path)
    assert "manifest.json: damaged" in text


def test_a_dataset_on_a_web_server_without_lists_passes(packed: Manifest, tmp_path: Path) -> None:
    class Unlisted(SimpleHTTPRequestHandler):
        """Serves files and no folders."""

        def list_directory(self, path: object) -> None:
            self.send_error(403)

        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "data").rename(tmp_path / "a b#1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Unlisted, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/a%20b%231"
            assert check(tmp_path, data=url) == packed
            odd = tmp_path / "a b#1" / "x y%25#.tar"
            odd.write_bytes(b"123")
            place = file_io.join(url, odd.name)
            assert preflight._list_sizes([place]) == {place: 3}
            (tmp_path / "a b#1" / packed.shards("train")[0].name).unlink()
            assert "missing, the manifest lists it" in problems(tmp_path, data=url)[0]
        finally:
            server.shutdown()
            thread.join()


def test_the_embedded_digits_are_packed_once(tmp_path: Path) -> None:
    first = check(tmp_path, data="digits")
    assert {split: first.count_samples(split) for split in first.splits} == {"train": 1437, "validation": 360}
    shard = tmp_path / "runs" / "data" / "digits" / first.shards("train")[0].name
    made = shard.stat().st_mtime_ns
    assert check(tmp_path, data="digits") == first
    assert shard.stat().st_mtime_ns == made


def test_a_dataset_without_validation_is_reported_before_the_workers_start(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "data"), "tiny", tiny_shards.CLASSES, {"train": tiny_shards.samples(20)}, 10)
    (text,) = problems(tmp_path)
    assert "it has no validation split" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64}, "batch_size must be at most the 13 samples of the split, got 64"),
        ({"augmentation": AugmentationConfig(stages=("decode", "no_such_module:stage"))}, "no_such_module"),
    ],
)
def test_what_workers_cannot_train_is_found_before_they_start(
    changes: dict[str, Any], message: str, packed: Manifest, tmp_path: Path
) -> None:
    url = str(tmp_path / "data")
    preflight.check_trainable(packed, url, [runs.recipe(batch_size=4)], Placement(workers=2))
    with pytest.raises(PreflightError, match=message):
        preflight.check_trainable(packed, url, [runs.recipe(**changes)], Placement(workers=2))


def test_a_dataset_without_training_images_is_reported(tmp_path: Path) -> None:
    found = write_dataset(
        str(tmp_path / "data"), "tiny", tiny_shards.CLASSES, {"validation": tiny_shards.samples(20)}, 10
    )
    with pytest.raises(PreflightError, match="no train split"):
        preflight.check_trainable(found, str(tmp_path / "data"), [runs.recipe()], Placement())


# ------------------------------------------------------------------ plug-ins
METRIC = "tests.support.plugin_metrics:Accuracy"


def execution(field: str, kind: str, **args: object) -> Placement:
    return Placement.from_dict({"execution": {field: [{"kind": kind, "args": args}]}})


@pytest.mark.parametrize(
    ("field", "kind", "args", "message"),
    [
        (
            "metrics",
            "no_such_module:Metric",
            {},
            "metric 'no_such_module:Metric': no module no_such_module on sys.path",
        ),
        ("metrics", "top_k_error", {"k": 9}, "metric 'top_k_error': k must be between 1 and 3"),
        ("metrics", "builtins:dict", {}, "metric 'builtins:dict' must have methods update and compute"),
        ("callbacks", "no_such_module:Watch", {}, "callback 'no_such_module:Watch': no module no_such_module"),
        ("callbacks", METRIC, {"num_classes": 3}, f"callback '{METRIC}' must be a Callback, got Accuracy"),
    ],
)
def test_metrics_and_callbacks_are_tried_before_anything_starts(
    field: str, kind: str, args: dict[str, object], message: str, packed: Manifest, tmp_path: Path
) -> None:
    places = Destination(data=str(tmp_path / "data"), storage=str(tmp_path / "runs"))
    recipes, placement = [runs.recipe(batch_size=4)], execution(field, kind, **args)
    with pytest.raises(PreflightError) as raised:
        preflight.check_trainable(packed, places.data, recipes, placement)
    assert raised.value.problems[0].startswith(message)
    with pytest.raises(PreflightError, match=r"1 and 3|no module|must"):
        preflight.check_destination(places, recipes, placement)


def test_every_node_imports_the_plug_ins_and_compares_their_code(
    packed: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{**NODE, "Resources": {"CPU": 2.0}}, {**NODE, "NodeID": "head", "Resources": {}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    asked: list[tuple[Any, ...]] = []

    def query(*arguments: Any) -> list[str]:
        asked.append(arguments)
        return ["node 10.0.0.9: other code"]

    monkeypatch.setattr(preflight, "_query_nodes", query)
    recipes, url = [runs.recipe(batch_size=4)], str(tmp_path / "data")
    preflight.check_trainable(packed, url, recipes, execution("metrics", "top_k_error", k=2))
    assert asked == []  # built-in ones are on every node
    with pytest.raises(PreflightError, match=r"^node 10\.0\.0\.9: other code$"):
        preflight.check_trainable(packed, url, recipes, execution("metrics", METRIC))
    ((where, check, code),) = asked
    assert (where, code.keys()) == (nodes[:1], {METRIC})
    check(code)
    with pytest.raises(ConfigError) as raised:
        check({METRIC: "another"})
    assert str(raised.value) == (
        f"{METRIC!r}: {plugin_metrics.__file__} differs from the driver's code; install the same version on every "
        "node, or submit the job with --working-dir set to the folder that holds it"
    )
    with pytest.raises(ConfigError, match=r"no module no_such_module on sys\.path"):
        check({"no_such_module:Metric": "another"})


def test_a_worker_with_other_code_than_the_driver_trains_nothing(packed: Manifest, tmp_path: Path) -> None:
    job = runs.job(tmp_path / "data", tmp_path / "run", runs.recipe(batch_size=4))
    outcome = runs.train(job.model_copy(update={"code": {METRIC: "another"}}))
    assert outcome.status == "refused"
    assert "plugin_metrics.py differs from the driver's code" in outcome.message
    spec = RunSpec(
        recipe=runs.recipe(),
        placement=execution("metrics", METRIC),
        destination=Destination(data="/d", storage="/s", tracking="t"),
        dataset_digest="d",
    )
    assert spec.build_train_job("stop", "successor").code.keys() == {METRIC}


# ------------------------------------------------------------------ a look that writes nothing
def test_a_dry_run_finds_what_a_start_would_find(packed: Manifest, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    tracker = MlflowTracker(f"sqlite:///{database}", "gone")
    tracker.check()
    client = MlflowClient(f"sqlite:///{database}")
    gone = client.get_experiment_by_name("gone")
    assert gone is not None
    client.delete_experiment(gone.experiment_id)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "data" / packed.shards("train")[0].name).unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PreflightError) as raised:
        preflight.check_destination(
            Destination(
                data=str(tmp_path / "data"),
                storage=str(tmp_path / "file" / "runs"),
                tracking=f"sqlite:///{database}",
                experiment="gone",
            )
        )
    storage, data, tracking = raised.value.problems
    assert storage == f"storage: {tmp_path}/file/runs: not writable: {tmp_path}/file: it is not a folder"
    assert "missing, the manifest lists it" in data
    assert "was deleted" in tracking
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_finds_nothing_wrong_with_places_that_are_still_to_be_made(tmp_path: Path) -> None:
    preflight.check_destination(Destination(data="digits", storage=str(tmp_path / "runs")))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ all problems together
def done(value: T | Exception) -> Future[T]:
    future: Future[T] = Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


NO_DATA, NO_TRACKER, READ_ONLY = (PreflightError(text) for text in ("data: none", "tracking: none", "storage: full"))


@pytest.mark.parametrize(
    ("data", "tracker", "storage", "embedded", "message"),
    [
        (NO_DATA, NO_TRACKER, READ_ONLY, False, ("storage: full", "data: none", "tracking: none")),
        (NO_DATA, NO_TRACKER, READ_ONLY, True, ("storage: full", "tracking: none")),
        (NO_DATA, NO_TRACKER, None, True, ("data: none", "tracking: none")),
        (NO_DATA, None, None, False, ("data: none",)),
        (None, NO_TRACKER, None, False, ("tracking: none",)),
        (None, None, READ_ONLY, False, ("storage: full",)),
    ],
)
def test_every_problem_is_reported_and_none_twice(
    data: Exception | None,
    tracker: Exception | None,
    storage: Exception | None,
    embedded: bool,
    message: tuple[str, ...],
) -> None:
    arguments: Any = (done(data), done(tracker), done(storage), embedded)
    with pytest.raises(PreflightError) as raised:
        session._collect_checks(*arguments)
    assert raised.value.problems == message


@pytest.mark.parametrize("check", ["storage", "tracking"])
def test_a_place_that_cannot_be_used_is_named(check: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    places = Destination(storage=str(tmp_path / "file" / "runs"), tracking="http://127.0.0.1:1", experiment="e")
    with pytest.raises(PreflightError, match=rf"^{check}: .*"):
        preflight.check_storage(places) if check == "storage" else session._make_tracker_factory(places)


def test_without_problems_there_is_what_the_checks_found(packed: Manifest, tmp_path: Path) -> None:
    def opens() -> Tracker:
        return MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", "x")

    found: Any = (done(packed), done(opens), done(None), False)
    assert session._collect_checks(*found) == (packed, opens)


def test_bugs_are_raised_as_they_are() -> None:
    arguments: Any = (done(KeyError("slip")), done(None), done(None), False)
    with pytest.raises(KeyError, match="slip"):
        session._collect_checks(*arguments)


# ------------------------------------------------------------------ what a person sees of it
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("epochs: none"), 2, ["job: error: epochs: none"]),
        (PreflightError("one", "two\nlines"), 1, ["job: error: one", "job: error: two lines"]),
        (ClusterError("too small"), 1, ["job: error: too small"]),
        (launch_errors.NotRecordedError("lost"), 1, ["job: error: lost"]),
        (DataError("gone"), 1, ["job: error: gone"]),
        (CommitError("damaged"), 1, ["job: error: damaged"]),
        (file_io.StorageError("full"), 1, ["job: error: full"]),
        (KeyboardInterrupt(), 130, ["job: error: interrupted"]),
    ],
)
def test_errors_are_one_line_each(
    error: BaseException, status: int, message: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    assert run_command("job", main) == status
    assert capsys.readouterr().err.splitlines() == message


def test_a_held_lease_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise LeaseHeldError("/runs/x", LeaseOwner("host", 7, "raysubmit_1", 0.0))

    assert run_command("job", main) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("job", lambda: 1 // 0)
    assert run_command("job", lambda: 0) == 0


# ------------------------------------------------------------------ dry run
def shown(folder: Path) -> str:
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    destination = Destination(
        data=str(folder / "data"), storage=str(folder / "runs"), tracking="http://me:secret@mlflow:5000"
    )
    dry_run.print_run_table([recipe(batch_size=4), recipe("second")], destination, Placement(workers=2), console)
    console.file.close()
    return console.export_text()


def test_a_dry_run_shows_the_plan_and_writes_nothing(packed: Manifest, tmp_path: Path) -> None:
    text = shown(tmp_path)
    first = next(line for line in text.splitlines() if " tiny " in line)
    assert "0.1" in first
    assert "0.4 - 1" in first
    # 13 samples make 3 batches of 4; two epochs. The rate falls with the root of what is left.
    assert first.replace("\u2502", " ").split()[-4:] == ["2", "6", "0.02000", "0.01414"]
    assert "13 train, 5 validation" in text
    assert packed.digest() in text
    assert "2 worker(s) of 1 CPU and 1 GPU if there is any" in text
    assert "mlflow:5000" in text
    assert "secret" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_dry_run_needs_no_embedded_data(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    destination = Destination(data="digits", storage=str(tmp_path / "runs")).resolve()
    dry_run.print_run_table([recipe(batch_size=4)], destination, Placement(), console)
    text = console.export_text()
    assert "packed on first use" in text
    assert "?" in text
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_an_error_of_a_dry_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest there"):
        shown(tmp_path)


@pytest.mark.parametrize(
    ("error", "listed", "message"),
    [
        (None, [NODE], None),
        (RayTaskError("check", "trace", DataError("missing")), [NODE], "missing"),  # type: ignore[no-untyped-call]
        (TaskUnschedulableError("the node is gone"), [NODE], None),
        (NodeDiedError("it died"), [NODE], None),  # type: ignore[no-untyped-call]
        (WorkerCrashedError(), [], None),
        (WorkerCrashedError(), [NODE], "WorkerCrashedError: The worker died unexpectedly"),
        (RuntimeEnvSetupError("x" * 1000 + " no unpacking"), [NODE], "no unpacking (is there room on the disk"),
    ],
    ids=["answers", "finds", "unschedulable", "died", "gone", "crashed", "unpacking"],
)
def test_a_node_that_is_lost_while_it_is_asked_is_no_problem_of_the_job_s(
    error: Exception | None, listed: list[dict[str, Any]], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.nodes", lambda: listed)
    answer = preflight._get_node_problem(None, NODE)
    assert (answer is None) == (message is None)
    assert message is None or (answer is not None and message in answer and len(answer) < 700)
