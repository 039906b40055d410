"""Introspection of configuration classes: the models that a field may hold, and the kind of each."""

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

KIND = "kind"  # the field that distinguishes the variants of a union, in the whole project
# Stands for every kind that a union's own variants do not have, where the union also takes plug-ins.
PLUGIN_KIND = "package.module:attribute"

ModelTypes = tuple[type[BaseModel], ...]


def get_union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, without Annotated wrappers; a plain type is its own one branch."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return get_union_members(get_args(annotation)[0])
    if origin is Union or origin is UnionType:
        return tuple(branch for part in get_args(annotation) for branch in get_union_members(part))
    return (annotation,)


def get_model_variants(annotation: Any) -> ModelTypes:
    """Return the model classes that a value of this annotation may be an instance of, in declared order."""
    return tuple(b for b in get_union_members(annotation) if isinstance(b, type) and issubclass(b, BaseModel))


def find_models(annotation: Any) -> ModelTypes:
    """Return the models of an annotation, those inside containers too: tuple[Member, ...] gives (Member,)."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return (annotation,) if issubclass(annotation, BaseModel) else ()
    return tuple(dict.fromkeys(model for part in get_args(annotation) for model in find_models(part)))


def get_kind(model: type[BaseModel]) -> str | None:
    """Return the literal of the model's `kind` field, PLUGIN_KIND if it is any text, None for no variant of a union."""
    field = model.model_fields.get(KIND)
    if field is None or get_origin(field.annotation) is not Literal:
        return PLUGIN_KIND if hasattr(model, "accepts_kind") else None
    return str(get_args(field.annotation)[0])


def map_kinds(models: ModelTypes) -> dict[str, type[BaseModel]]:
    """Return kind to model class, for the variants of one union."""
    return {kind: model for model in models if (kind := get_kind(model)) is not None}


def get_variant(models: ModelTypes, kind: object) -> type[BaseModel] | None:
    """Return the variant of a union that has this kind: one of its own, else the plug-in's if it accepts the kind."""
    kinds = map_kinds(models)
    plugin = kinds.pop(PLUGIN_KIND, None)
    if plugin is not None and str(kind) not in kinds and plugin.accepts_kind(str(kind)):  # type: ignore[attr-defined]
        return plugin
    return kinds.get(str(kind))
