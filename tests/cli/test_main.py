"""The command `orchestrator`: its sub-commands, its help, and the examples that the help prints."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli import main
from orchestrator.cli.main import COMMANDS, SHARD_COMMANDS, Command
from orchestrator.config.errors import format_command
from tests.support.installed import make_environment, run_in
from tests.support.launched import ROOT

HEAVY = {"torch", "ray", "mlflow", "numpy", "cv2", "webdataset"}
PARSED = {name: each for name, each in {**COMMANDS, **SHARD_COMMANDS}.items() if isinstance(each, Command)}


def list_examples() -> Iterator[tuple[str, list[str]]]:
    """Yield the command and the arguments of every example in a help."""
    for command in PARSED.values():
        for line in command.example.strip().splitlines():
            if not line.startswith(" "):
                words = shlex.split(line)
                name, *arguments = words[words.index("orchestrator") + 1 :]
                yield (arguments[0], arguments[1:]) if name == "shards" else (name, arguments)


@pytest.mark.parametrize(("name", "arguments"), list_examples(), ids=str)
def test_every_example_of_a_help_is_a_valid_command_line(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []

    def run(config: Any, console: Console) -> int:
        configs.append(config)
        return 7

    command = PARSED[name]
    known, default, _ = command.build_presets()
    monkeypatch.setattr(main, "_import_command", lambda _: run)
    monkeypatch.setattr(main, "_prepare_process", lambda program, config: None)
    monkeypatch.setattr(Command, "build_presets", lambda _: (known, default, lambda url: known[default]))
    assert main._run_listed("orchestrator", "", {name: command}, [name, *arguments]) == 7
    assert len(configs) == 1


@pytest.mark.parametrize("name", PARSED)
def test_common_flags_exist_and_come_first(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = PARSED[name]
    presets, default, _ = command.build_presets()
    arguments = [default, "--help"] if len(presets) > 1 else ["--help"]
    with pytest.raises(SystemExit) as ended:
        main._run_command(f"orchestrator {name}", name, command, arguments)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    positions = [text.find(f"  --{flag.replace('_', '-')}") for flag in command.common]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert "examples:" in text


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: orchestrator COMMAND ...\n")
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_shards_has_commands_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["shards", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: orchestrator shards COMMAND ...\n")
    assert all(f"\n  {name} " in text for name in SHARD_COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "orchestrator: error: trian: unknown command; did you mean train?\n"),
        (["shards", "pakc"], "orchestrator shards: error: pakc: unknown command; did you mean pack?\n"),
        (["train", "--epoch", "3"], "orchestrator train: error: --epoch: unknown flag; did you mean --epochs?\n"),
        (["stop"], "orchestrator stop: error: runs: give the name of at least one run or ensemble, or the URL of its "),
    ],
)
def test_a_usage_error_is_one_line_and_exit_status_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main.main(arguments)
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1


def test_every_script_in_jobs_is_a_command() -> None:
    names = {path.stem.replace("_", "-") for path in (ROOT / "jobs").glob("*.py")}
    assert names == COMMANDS.keys() - {"cost"}


@pytest.mark.parametrize(
    ("program", "command", "line"),
    [
        ("/venv/bin/orchestrator", "train-ensemble", "orchestrator train-ensemble 'a b'"),
        ("jobs/tune.py", "train-ensemble", "python jobs/train_ensemble.py 'a b'"),
        ("jobs/shards.py", "shards verify", "python jobs/shards.py verify 'a b'"),
        ("/my code/jobs/train.py", "stop", "python '/my code/jobs/stop.py' 'a b'"),
        ("/usr/lib/ray/default_worker.py", "stop", "orchestrator stop 'a b'"),
    ],
)
def test_a_printed_command_is_spelled_as_the_process_was_started(
    program: str, command: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    assert format_command(command, ["a b"]) == line


def test_a_script_started_in_its_own_folder_prints_commands_for_that_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "jobs")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert format_command("stop", ["x"]) == "python stop.py x"


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["shards", "pack", "--help"], ["train", "--x"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import json, sys\nfrom orchestrator.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    words = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    modules = set(json.loads(done.stderr.splitlines()[-1]))
    assert "pydantic" in modules
    assert HEAVY & modules == set()


@pytest.mark.process
def test_the_installed_command_runs_anywhere(tmp_path: Path) -> None:
    programs = make_environment(tmp_path / "venv")
    done = run_in(programs, ["orchestrator", "status"], tmp_path, 60, {"ORCHESTRATOR_RUNS": str(tmp_path / "runs")})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"no runs in {tmp_path / 'runs'}\n", "")
    done = run_in(programs, ["orchestrator", "status", "x", "--storage", "relative"], tmp_path, 60)
    assert done.returncode == 2
    assert done.stderr.startswith("orchestrator status: error: ")


@pytest.mark.process
@pytest.mark.parametrize("program", ["orchestrator", "jobs"])
def test_an_example_of_a_help_runs_as_printed(program: str, tmp_path: Path) -> None:
    programs = make_environment(tmp_path / "venv")
    start = ["orchestrator", "train"] if program == "orchestrator" else ["python", "jobs/train.py"]
    folder = tmp_path if program == "orchestrator" else ROOT
    variables = {"ORCHESTRATOR_RUNS": str(tmp_path / "runs"), "HOME": str(tmp_path)}
    shown = run_in(programs, [*start, "--help"], folder, 60, variables).stdout
    (line,) = [line.strip() for line in shown.splitlines() if "googlenet-digits --schedule.kind cosine" in line]
    done = run_in(programs, ["sh", "-c", f"{line} --dry-run"], folder, 120, variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "googlenet-digits" in done.stdout
