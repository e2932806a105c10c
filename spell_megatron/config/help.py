"""Every setting with its type, default and meaning, for help texts and suggestions."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic_core import PydanticUndefined

from spell_megatron.config.schema import Config
from spell_megatron.config.section import Section, subsection


@dataclass(frozen=True)
class Setting:
    """One setting of a schema."""

    key: str
    """Dotted, such as `selfplay.questioner.mu`."""
    type: str
    default: str | None
    """As YAML; None: required."""
    help: str


def all_settings(schema: type[Section] = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a schema, in its order. Keys begin with `prefix`."""
    for name, field in schema.model_fields.items():
        if section := subsection(schema, name):
            yield from all_settings(section, f"{prefix}{name}.")
        else:
            default = None if field.default is PydanticUndefined else as_yaml(field.default)
            yield Setting(
                prefix + name, _type_name(field.annotation), default, " ".join((field.description or "").split())
            )


def as_yaml(value: Any) -> str:
    """A default value on one line."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, Path):
        value = str(value)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


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
    names = {int: "integer", float: "number", str: "text", bool: "true|false", Path: "path", date: "date"}
    return names[annotation]
