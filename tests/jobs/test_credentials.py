"""A password in every place that takes a URL, of every job, is in nothing that the job prints or leaves behind."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest

from orchestrator.cli import main
from orchestrator.config import flags
from orchestrator.config.arg_parser import Preset
from orchestrator.config.base import Config
from orchestrator.config.introspection import KIND, get_model_variants, get_union_members, map_kinds
from orchestrator.config.overrides import build_draft
from orchestrator.tracking import tracking_uri
from orchestrator.tracking.tracker import TrackingError
from tests.support import mlflow_server
from tests.support.launched import ROOT, job

PLANTED = "pl4nted"
# Passwords with letters that have a meaning in a URL.
PASSWORDS = (PLANTED, f"{PLANTED}/x", f"a@{PLANTED}", f"x#{PLANTED}", f"?{PLANTED}:", f"[{PLANTED}", f"/{PLANTED} x")
URLS = ("s3://KEY:{}@bucket/a.json", "https://user:{}@host.invalid/a.json", "https://[user:{}@host.invalid/a.tar")
WORDS: Mapping[str, Sequence[Sequence[str]]] = {"shards.py": (("pack",), ("index",), ("verify",))}
SCRIPTS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))
COMMANDS = [(script, *word) for script in SCRIPTS for word in WORDS.get(script, ((),))]


class Presets(Exception):
    """The presets that a job passes to the command line's parser."""

    def __init__(self, presets: Mapping[str, Preset[Any]], default: str) -> None:
        super().__init__()
        self.presets, self.default = presets, default


def run(*command: str) -> None:
    """Run a job in this process; its arguments are rejected before it imports anything heavy."""
    with patch.object(sys, "argv", list(command)), patch.dict(os.environ):
        runpy.run_path(str(ROOT / "jobs" / command[0]), run_name="__main__")


def start_of(command: Sequence[str]) -> Config:
    """Return the configuration that a job's flags change."""

    def parse(prog: str, description: str, presets: Any, default: str, *rest: Any, **more: Any) -> NoReturn:
        raise Presets(presets, default)

    with patch.object(main, "parse_args", parse), pytest.raises(Presets) as caught:
        run(*command)
    config: Config = caught.value.presets[caught.value.default].value
    return config


def shapes(config: Config, above: str = "") -> Iterator[dict[str, str]]:
    """Yield no overrides, then those of each choice of a kind."""
    yield {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            yield from ({f"{above}{name}.{KIND}": kind} for kind in map_kinds(get_model_variants(field.annotation)))
            yield from (each for each in shapes(value, f"{above}{name}.") if each)


def text_flags(config: Config) -> dict[str, tuple[str, ...]]:
    """Return every flag that takes a text, with the flags that must precede it."""
    flags_before: dict[str, tuple[str, ...]] = {}
    for shape in shapes(config):
        shaped = build_draft(config, shape)
        paths = flags.map_flags_to_paths(shaped)
        for flag, path in paths.items():
            owner: Any = shaped
            *branch, last = path.split(".")
            for name in branch:
                owner = getattr(owner, name)
            if takes_text(type(owner).model_fields[last].annotation):
                before = [f"--{name}={kind}" for name, kind in ((flag_of(paths, k), v) for k, v in shape.items())]
                flags_before.setdefault("--" + flag.replace("_", "-"), tuple(before))
    return flags_before


def flag_of(paths: Mapping[str, str], path: str) -> str:
    return next(flag for flag, leaf in paths.items() if leaf == path).replace("_", "-")


def takes_text(annotation: Any) -> bool:
    return any(branch is str or str in getattr(branch, "__args__", ()) for branch in get_union_members(annotation))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_flag_and_no_argument_of_any_job_takes_a_password(
    command: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    config = start_of(command)
    taking = text_flags(config)
    positions: list[tuple[str, ...]] = [(), *((*before, flag) for flag, before in taking.items())]
    if any(name in type(config).model_fields for name in ("storage", "destination", "url")):
        assert {"--storage", "--url"} & taking.keys(), "no flag that takes a place was found: the walk is broken"
    for position in positions:
        if position and position[-1] == "--tracking":
            continue
        for url in (url.format(password) for url in URLS for password in PASSWORDS):
            for words in ([*position, url], [*position[:-1], f"{position[-1]}={url}"] if position else [url]):
                with pytest.raises(SystemExit) as ended:
                    run(*command, *words)
                printed = capfd.readouterr()
                assert ended.value.code == 2
                assert "must be a URL without user name and password" in printed.err, words
                assert printed.err.count("\n") == 1
                assert PLANTED not in printed.out + printed.err


@pytest.mark.parametrize("script", ["train.py", "tune.py", "train_ensemble.py"])
def test_an_error_of_the_command_line_shows_no_password(script: str, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["--epochs", "x"], ["--nonsense"], ["--nonsense", f"postgresql://u:{PLANTED}@h/d"]):
        with pytest.raises(SystemExit):
            run(script, "--tracking", f"https://user:{PLANTED}@host.invalid", *words)
        printed = capfd.readouterr()
        assert PLANTED not in printed.out + printed.err


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["http", "https", "postgresql", "ftp", "file", "nonsense+x"])
def test_no_form_of_a_tracking_uri_is_shown_with_its_password(scheme: str, password: str) -> None:
    uri = f"{scheme}://user:{password}@host.invalid:5000/x?password={PLANTED}"
    try:
        parsed = tracking_uri.parse_tracking_uri(uri)
    except TrackingError as error:
        assert PLANTED not in str(error)
    else:
        assert PLANTED not in parsed.redacted + parsed.base_url + parsed.redact(f"cannot open {uri}")


# ------------------------------------------------------------------ real runs
def left_behind(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


ELSEWHERE: Mapping[str, Callable[[Path], list[str]]] = {
    "status.py": lambda tmp: ["--storage", "s3://bucket/runs"],
    "audit.py": lambda tmp: ["a-run", "--storage", "s3://bucket/runs"],
    "simulate.py": lambda tmp: ["googlenet-tiny", "--data", "s3://bucket/data", "--out", str(tmp / "out")],
    "train.py": lambda tmp: ["googlenet-tiny", "--data", "s3://bucket/data", "--dry-run"],
    "predict.py": lambda tmp: ["s3://bucket/image.jpg"],
    "shards.py": lambda tmp: ["verify", "--url", "s3://bucket/data"],
}


@pytest.mark.process
@pytest.mark.parametrize("script", ELSEWHERE)
def test_no_password_of_the_environment_is_shown(script: str, tmp_path: Path) -> None:
    done = job(
        script, *ELSEWHERE[script](tmp_path), runs=tmp_path / "runs",
        AWS_ENDPOINT_URL=f"http://user:{PLANTED}@127.0.0.1:9", AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY=PLANTED,
        HTTP_PROXY=f"http://user:{PLANTED}@127.0.0.1:9",
        MLFLOW_TRACKING_PASSWORD=PLANTED, MLFLOW_TRACKING_USERNAME="me",
    )  # fmt: skip
    assert done.status in (1, 2), done.err
    assert "Traceback" not in done.err
    assert PLANTED not in done.out + done.err
    assert not [path for path, data in left_behind(tmp_path).items() if PLANTED.encode() in data]


@pytest.mark.process
def test_no_password_of_a_runs_variable_is_shown(tmp_path: Path) -> None:
    done = job("status.py", runs=Path("/nowhere"), ORCHESTRATOR_RUNS=f"s3://KEY:{PLANTED}/x@bucket/runs")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("status.py: error: ORCHESTRATOR_RUNS: must be a URL without user name and password")
    assert PLANTED not in done.err


RECORD = """\
import sys
from orchestrator.ray_backend.run_spec import Destination
from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.tracker import MetricPoint, TrackedRun

destination = Destination(data="digits", tracking=sys.argv[1]).resolve()
tracker = MlflowTracker(destination.tracking, destination.experiment)
tracker.check()
run = tracker.open_run(TrackedRun("key", "name", None, {"schedule.kind": "cosine"}, {"orchestrator.job": "test"}))
tracker.log_metrics(run, [MetricPoint("train/rate", 0.1, 64, 0.0)])
tracker.log_table(run, "schedule.json", {"step": [1]})
tracker.log_file(run, sys.argv[2])
tracker.close_run(run, "FINISHED")
print(tracker.get_run_url(run))
"""


@pytest.mark.process
def test_a_tracking_server_s_password_is_in_nothing_that_is_recorded(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "file.txt").write_text("a picture")
    with mlflow_server.served(tmp_path / "server", f"sqlite:///{store}/mlflow.db", str(store / "artifacts")) as server:
        named = server.uri.replace("http://", f"http://user:{PLANTED}@")
        words = [sys.executable, "-c", RECORD, named, str(tmp_path / "file.txt")]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert PLANTED not in done.stdout + done.stderr
    kept = left_behind(store)
    assert len(kept) > 1
    assert not [path for path, data in kept.items() if PLANTED.encode() in data]
