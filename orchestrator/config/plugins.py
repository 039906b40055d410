"""Plug-ins: models, optimizers, metrics and the like, built in, installed or the user's own.

A plug-in is named by its `kind`: the name of a built-in, `package.module:attribute`, or the name of an entry point of
the group `orchestrator.<what>`, `what` being model, optimizer, lr_schedule, transform, source, metric, callback or
tracker. Its `args` are passed to it by keyword.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

from pydantic import Field, GetCoreSchemaHandler, JsonValue
from pydantic_core import CoreSchema, core_schema

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError, format_suggestion
from orchestrator.config.introspection import KIND, get_kind, get_model_variants, get_variant, map_kinds

T = TypeVar("T")
WHATS = ("model", "optimizer", "lr_schedule", "transform", "source", "metric", "callback", "tracker")
GROUP_PREFIX = "orchestrator."
# Their versions belong to the environment of every run, as torch's own optimizers and layers do.
_ENVIRONMENT_PACKAGES = ("orchestrator", "torch")
_PACKAGE_DIR = str(Path(__file__).resolve().parent.parent)
_registry: dict[str, dict[str, Any]] = {}


class Plugin(Config):
    """A plug-in by name, with its arguments. A subclass may stand in a union with configs of built-in kinds."""

    what: ClassVar[str] = ""  # of a subclass that is a variant of a union

    kind: str = Field(min_length=1, description="a built-in name, package.module:attribute or an entry point's name")
    args: dict[str, JsonValue] = Field({}, description="its keyword arguments, as JSON")

    def __hash__(self) -> int:
        """Hash the JSON text, because args may hold lists and mappings."""
        return hash(self.to_json())

    @classmethod
    def accepts_kind(cls, kind: str) -> bool:
        """Return whether a kind can only be a plug-in from outside: a reference, or the name of an entry point."""
        return ":" in kind or kind in _find_entry_points(cls.what)


class KindDiscriminator:
    """Annotation of a union of configs that differ by `kind`, one a Plugin; default_kind: of data without a kind."""

    def __init__(self, default_kind: str | None = None) -> None:
        self._default_kind = default_kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a tagged union; called by pydantic."""
        variants = get_model_variants(source)

        def choose(value: Any) -> str | None:
            kind = value.get(KIND) if isinstance(value, dict) else getattr(value, KIND, None)
            kind = self._default_kind if kind is None else kind
            variant = get_variant(variants, kind)
            return get_kind(variant) if variant is not None else kind

        choices = {kind: handler.generate_schema(variant) for kind, variant in map_kinds(variants).items()}
        return core_schema.tagged_union_schema(choices, discriminator=choose)


def register(what: str, name: str) -> Callable[[T], T]:
    """Return a decorator that makes its function or class a built-in plug-in of this name."""

    def add(plugin: T) -> T:
        _registry.setdefault(what, {})[name] = plugin
        return plugin

    return add


def load_plugin(what: str, kind: str) -> Any:
    """Return the object that a kind names. Raises ConfigError, one line, when it cannot be found or imported."""
    builtins, label = _registry.get(what, {}), f"{what} {kind!r}"
    if kind in builtins:
        return builtins[kind]
    if (reference := _resolve_reference(kind, what)) is None:
        raise ConfigError(
            f"{label} is unknown: must be a built-in name, package.module:attribute or an entry point of the group "
            f"{GROUP_PREFIX}{what}{format_suggestion(kind, [*builtins, *_find_entry_points(what)], 'names')}"
        )
    name, _, attribute = reference.partition(":")
    module = _import_module(name, label)
    try:
        return attrgetter(attribute)(module)
    except AttributeError:
        names = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(
            f"{label}: {getattr(module, '__file__', None) or name} has no attribute {attribute!r}"
            f"{format_suggestion(attribute, names, 'names')}"
        ) from None


def create_plugin(what: str, kind: str, args: Mapping[str, Any], **given: Any) -> Any:
    """Return what the plug-in returns for `args` and for the arguments that the project supplies.

    Raises ConfigError, one line, when it cannot be loaded, does not take these arguments, or raises.
    """
    plugin, label = load_plugin(what, kind), f"{what} {kind!r}"
    if not callable(plugin):
        raise ConfigError(f"{label} must be callable, got {type(plugin).__name__}; name a function or a class")
    try:
        inspect.signature(plugin).bind(**args, **given)
    except TypeError as error:
        taken = ", ".join(inspect.signature(plugin).parameters)
        given_text = f" It is called with {', '.join(given)} and its args." if given else ""
        raise ConfigError(f"{label} does not take these arguments: {error}; it takes: {taken}.{given_text}") from None
    except ValueError:  # a built-in of C has no signature; the call below reports what it does not take
        pass
    try:
        return plugin(**args, **given)
    except ConfigError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{label} failed{format_failure(error)}") from error


@cache
def compute_source_digest(kind: str) -> str | None:
    """Return what identifies the code of a plug-in: "DIST==VERSION" of an installed one, else a sha256 of its text.

    The text of a module, or of all modules of a package when the reference names a package. None for built-ins and
    for what torch brings. Raises ConfigError when the module cannot be found.
    """
    reference = None if any(kind in names for names in _registry.values()) else _resolve_reference(kind)
    module = "" if reference is None else reference.partition(":")[0]
    if module.partition(".")[0] in ("", *_ENVIRONMENT_PACKAGES):
        return None
    _add_working_directory()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise _make_missing_module_error(module, repr(kind))
    path = Path(spec.origin)
    for name in metadata.packages_distributions().get(module.partition(".")[0], ()):
        distribution = metadata.distribution(name)
        # Code elsewhere, such as an editable install, is identified by its text.
        if path.resolve().is_relative_to(Path(str(distribution.locate_file(""))).resolve()):
            # Without "+cu128": the same release is the same code on any hardware.
            return f"{distribution.name}=={distribution.version.partition('+')[0]}"
    digest = hashlib.sha256(path.read_bytes())
    if spec.submodule_search_locations:
        for file in sorted(path.parent.rglob("*.py")):
            digest.update(f"\0{file.relative_to(path.parent).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def check_source_digests(digests: Mapping[str, str]) -> None:
    """Import the plug-ins of these kinds and compare their code with these digests of it, made in another process.

    Raises ConfigError, one line, for a module that is missing, does not import or differs.
    """
    for kind, digest in digests.items():
        module = _import_module((_resolve_reference(kind) or kind).partition(":")[0], repr(kind))
        if compute_source_digest(kind) != digest:
            raise ConfigError(
                f"{kind!r}: {module.__file__} differs from the driver's code; install the same version on every node, "
                "or submit the job with --working-dir set to the folder that holds it"
            )


def _resolve_reference(kind: str, what: str | None = None) -> str | None:
    """Return the `module:attribute` that a kind stands for, by way of an entry point if it is one; None if neither."""
    return kind if ":" in kind.strip(":") else _find_entry_points(what).get(kind)


@cache
def _find_entry_points(what: str | None) -> dict[str, str]:
    """Return name to `module:attribute` of the entry points of a group, or of all of them for None."""
    points = [p for w in WHATS if what in (None, w) for p in metadata.entry_points(group=f"{GROUP_PREFIX}{w}")]
    return {point.name: point.value.partition("[")[0].strip() for point in points}


def _import_module(name: str, label: str) -> ModuleType:
    _add_working_directory()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise _make_missing_module_error(name, label) from None
        raise ConfigError(f"{label}: {name} does not import{format_failure(error)}") from error


def _add_working_directory() -> None:
    """Let modules in the working directory be found, as `python -m` does; last, so that they hide no others."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()


def _make_missing_module_error(name: str, label: str) -> ConfigError:
    return ConfigError(
        f"{label}: no module {name} on sys.path or in {os.getcwd()} that is a file; install it, put its folder on "
        "PYTHONPATH, or submit the job with --working-dir set to the folder that holds it"
    )


def format_failure(error: BaseException) -> str:
    """Return ` at FILE:LINE: Error: text`, on one line, for the innermost frame outside of this package and torch."""
    if isinstance(error, SyntaxError):
        place = f" at {error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        ours = (_PACKAGE_DIR, "/site-packages/torch/")
        theirs = [frame for frame in frames if not any(part in frame.filename for part in ours)]
        place = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return f"{place}: {' '.join(f'{type(error).__name__}: {error}'.split())}"
