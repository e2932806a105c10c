"""Every setting with its type, default and meaning, for help texts and suggestions."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic_core import PydanticUndefined

from spell_megatron.config.schema import Config, Section


@dataclass(frozen=True)
class Setting:
    """One leaf of the schema, for help texts and suggestions."""

    key: str
    type: str
    default: str | None
    """As YAML; None: required."""
    help: str


def settings(section: type[Section] | None = None, prefix: str = "") -> Iterator[Setting]:
    """Every setting a configuration may hold, in the order of the schema."""
    for name, field in (section or Config).model_fields.items():
        key = prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings(field.annotation, key + ".")
            continue
        default = None
        if field.default is not PydanticUndefined:
            value = list(field.default) if isinstance(field.default, tuple) else field.default
            value = str(value) if isinstance(value, Path) else value
            default = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
            default = default.removesuffix("\n").removesuffix("\n...")
        yield Setting(key, _type_name(field.annotation), default, " ".join((field.description or "").split()))


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is types.UnionType:
        return " or ".join("null" if part is type(None) else _type_name(part) for part in arguments)
    if origin is dict:
        return f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true|false", Path: "path"}
    return names[annotation]
