"""Plug-ins by name: what is found, what each mistake says, and what their code's digest covers."""

import hashlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest

from orchestrator.config import plugins
from orchestrator.config.arg_parser import Preset, parse_args
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import (
    KindDiscriminator,
    Plugin,
    compute_source_digest,
    create_plugin,
    load_plugin,
    register,
)


class ModelPlugin(Plugin):
    what: ClassVar[str] = "model"


class MetricPlugin(Plugin):
    what: ClassVar[str] = "metric"


class BuiltIn(Config):
    kind: Literal["built-in"] = "built-in"
    size: int = 3
    width: float = 1.0


class PluginNet(Plugin):
    what: ClassVar[str] = "model"
    size: int = 4


class Job(Config):
    model: Annotated[BuiltIn | PluginNet, KindDiscriminator()] = BuiltIn()


WriteModule = Callable[[str, str], Path]


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Write a module into a folder of sys.path; what was imported from there is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    compute_source_digest.cache_clear()
    yield write
    compute_source_digest.cache_clear()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_registry", {})


@pytest.mark.usefixtures("_own_registry")
def test_a_registered_name_is_found() -> None:
    @register("metric", "top-1")
    def top_1() -> str:
        return "found"

    assert load_plugin("metric", "top-1") is top_1
    assert create_plugin("metric", "top-1", {}) == "found"
    assert not Plugin.accepts_kind("top-1")


def test_a_reference_is_imported_and_called(write_module: WriteModule) -> None:
    write_module(
        "own_cnn.py", "class Nets:\n    @staticmethod\n    def make(num_classes, width=1): return num_classes, width"
    )
    assert create_plugin("model", "own_cnn:Nets.make", {"width": 2}, num_classes=10) == (10, 2)
    assert Plugin.accepts_kind("own_cnn:Nets.make")


def test_an_entry_point_is_found(write_module: WriteModule, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module("installed_net.py", "def make(): return 7")
    points = metadata.EntryPoints(
        [
            metadata.EntryPoint("short-name", "installed_net:make", "orchestrator.model"),
            metadata.EntryPoint("short-name", "elsewhere:make", "other.group"),
        ]
    )
    monkeypatch.setattr(metadata, "entry_points", lambda group: points.select(group=group))
    plugins._find_entry_points.cache_clear()
    try:
        assert create_plugin("model", "short-name", {}) == 7
        assert ModelPlugin.accepts_kind("short-name")
        assert not MetricPlugin.accepts_kind("short-name")
        assert compute_source_digest("short-name") == compute_source_digest("installed_net:make")
    finally:
        plugins._find_entry_points.cache_clear()


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("sgdd", ["optimizer 'sgdd' is unknown", "did you mean sgd?"]),
        ("no_such_module:Net", ["no module no_such_module on sys.path", "--working-dir"]),
        ("no_such_package.inner:Net", ["no module no_such_package.inner"]),
        ("own:Nett", ["own.py has no attribute 'Nett'", "did you mean Net?"]),
        ("raises:Net", ["raises does not import at ", "raises.py:2: ValueError: no good"]),
        ("unparsable:Net", ["unparsable does not import at ", "unparsable.py:1: SyntaxError"]),
        ("needs:Net", ["needs does not import at ", "needs.py:1: ModuleNotFoundError: No module named 'absent_part'"]),
        ("exits:Net", ["exits does not import", "SystemExit: 3"]),
    ],
)
def test_what_cannot_be_loaded_says_why_in_a_line(kind: str, texts: list[str], write_module: WriteModule) -> None:
    register("optimizer", "sgd")(object)
    write_module("own.py", "class Net: pass")
    write_module("raises.py", "x = 1\nraise ValueError('no\\ngood')")
    write_module("unparsable.py", "def (")
    write_module("needs.py", "import absent_part")
    write_module("exits.py", "raise SystemExit(3)")
    with pytest.raises(ConfigError) as caught:
        load_plugin("optimizer", kind)
    message = str(caught.value)
    assert all(text in message for text in texts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "args", "texts"),
    [
        ("nets:make", {"depth": 3}, ["unexpected keyword argument 'depth'", "it takes: num_classes, width"]),
        ("nets:make", {"num_classes": 3}, ["multiple values for keyword argument 'num_classes'"]),
        ("nets:make", {"width": -1}, ["failed at ", "nets.py:2: ValueError: math domain error"]),
        ("nets:plain", {}, ["does not take these arguments", "it takes: classes", "called with num_classes"]),
        ("nets:NUMBER", {}, ["must be callable, got int"]),
        ("nets:passes_on", {"depth": 3}, ["unexpected keyword argument 'depth'"]),
    ],
)
def test_what_cannot_be_created_says_why_in_a_line(
    kind: str, args: dict[str, int], texts: list[str], write_module: WriteModule
) -> None:
    write_module(
        "nets.py",
        "import math\ndef make(num_classes, width=1): return math.sqrt(width)\ndef plain(classes): pass\nNUMBER = 3\n"
        "def passes_on(**kwargs): return make(**kwargs)",
    )
    with pytest.raises(ConfigError) as caught:
        create_plugin("model", kind, args, num_classes=10)
    message = str(caught.value)
    assert f"model {kind!r}" in message
    assert all(text in message for text in texts), message
    assert "\n" not in message


def test_a_modules_digest_is_that_of_its_text(write_module: WriteModule) -> None:
    path = write_module("own_digest.py", "class Net: pass")
    assert compute_source_digest("own_digest:Net") == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_packages_digest_covers_all_of_its_modules(write_module: WriteModule) -> None:
    write_module("own_package/__init__.py", "from own_package.layers import Net")
    layers = write_module("own_package/layers.py", "class Net: pass")
    before = compute_source_digest("own_package:Net")
    layers.write_text("class Net: width = 2")
    compute_source_digest.cache_clear()
    assert compute_source_digest("own_package:Net") != before


def test_an_installed_packages_digest_is_its_version() -> None:
    assert compute_source_digest("numpy:zeros") == f"numpy=={metadata.version('numpy')}"


@pytest.mark.usefixtures("_own_registry")
def test_code_of_the_environment_has_no_digest() -> None:
    register("optimizer", "sgd")(object)
    assert compute_source_digest("sgd") is None
    assert compute_source_digest("torch.optim:AdamW") is None


def test_a_digest_of_a_missing_module_says_so() -> None:
    with pytest.raises(ConfigError, match="no module no_such_module"):
        compute_source_digest("no_such_module:Net")


def test_a_plugin_survives_json_and_can_be_a_key() -> None:
    plugin = Plugin(kind="own:Net", args={"widths": [1, 2], "deep": {"a": None}})
    assert Plugin.from_dict(plugin.to_dict()) == plugin
    assert {plugin: 1}[Plugin(kind="own:Net", args={"deep": {"a": None}, "widths": [1, 2]})] == 1
    with pytest.raises(ConfigError, match="kind"):
        Plugin.from_dict({"kind": ""})


def test_the_working_directory_is_searched_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_me.py").write_text("def make(): return 5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert create_plugin("metric", "beside_me:make", {}) == 5
    assert sys.path[-1] == str(tmp_path)
    del sys.modules["beside_me"]


# ------------------------------------------------------------------ in a union with built-in kinds
def parse(*arguments: str) -> Job:
    return parse_args("job", "", {"job": Preset(Job())}, "job", arguments)


def test_a_reference_picks_the_plugins_variant_everywhere() -> None:
    plugin = PluginNet(kind="own:Net", args={"width": 2}, size=3)
    assert Job.from_dict({"model": {"kind": "own:Net", "args": {"width": 2}, "size": 3}}).model == plugin
    assert Job(model=plugin).model == plugin
    assert Job.from_dict(Job(model=plugin).to_dict()).model == plugin
    # The size, a field of both kinds, stays.
    assert parse("--model.kind", "own:Net", "--model.args", '{"width": 2}').model == plugin
    assert parse("--model.kind=own:Net", "--model.size", "5").model == PluginNet(kind="own:Net", size=5)
    assert parse("--model.width", "2").model == BuiltIn(width=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.kind", "buildin"],
            "must be one of built-in, package.module:attribute, got 'buildin'; did you mean built-in?",
        ),
        (["--model.args", "{}"], "--model.args: belongs to --model.kind package.module:attribute; set that too"),
        (["--model.kind", "own:Net", "--model.args", "[1]"], "model.args: must be a mapping, got '[1]'"),
        (["--model.kind", "own:Net", "--model.width", "2"], "--model.width: belongs to --model.kind built-in"),
    ],
)
def test_mistakes_about_kinds_are_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_kind_in_a_file_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"model.kind: must be one of built-in, package"):
        Job.from_dict({"model": {"kind": "other"}})
    with pytest.raises(ConfigError, match=r"model.kind: must be given"):
        Job.from_dict({"model": {}})


def test_the_help_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "{built-in,package.module:attribute}" in capsys.readouterr().out.replace("\n", "")
