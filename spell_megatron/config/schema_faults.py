"""What pydantic finds wrong with settings, said so that a user can correct it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from spell_megatron.config.faults import Fault, involves
from spell_megatron.config.help import settings
from spell_megatron.config.schema import Schema, Section


def kind_of(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def validate(schema: type[Schema], raw: dict[str, Any]) -> tuple[Schema, list[Fault]]:
    """Validate; take faulty values out and validate again until nothing is wrong."""
    raw = copy.deepcopy(raw)
    _fill_empty_sections(raw, schema)
    faults: list[Fault] = []
    while True:
        try:
            return schema.model_validate(raw), faults
        except ValidationError as error:
            for details in error.errors(include_url=False):
                faults += _schema_fault(schema, details, faults)
                _remove(schema, raw, details)


def _fill_empty_sections(raw: dict[str, Any], section: type[Section]) -> None:
    """`selfplay:` with every line under it commented out reads as null; it means the defaults."""
    for name, field in section.model_fields.items():
        if name in raw and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if raw[name] is None:
                raw[name] = {}
            if isinstance(raw[name], dict):
                _fill_empty_sections(raw[name], field.annotation)


def _schema_fault(schema: type[Section], details: Mapping[str, Any], earlier: Sequence[Fault]) -> list[Fault]:
    location = tuple(str(part) for part in details["loc"] if part != "[key]")
    key, kind, value = ".".join(location), details["type"], details["input"]
    if kind == "missing" and isinstance(details["loc"][-1], str):
        if len(location) == 1:  # a whole required section: name what must stand in it
            required = [s for s in settings(schema) if f"{s.key}.".startswith(key + ".") and s.default is None]
        else:
            required = [s for s in settings(schema) if s.key == key]
        return [
            Fault((s.key,), f"is missing: {_sentence(s.help)} Set it, or pass --{s.key}=…")
            for s in required
            if not any(involves(fault, [s.key]) for fault in earlier)
        ]
    if kind == "extra_forbidden":
        return [Fault((key,), f"unknown key. {_suggestion(schema, location)}")]
    about = next((s for s in settings(schema) if s.key == key or key.startswith(s.key + ".")), None)
    if about is None:
        return [
            Fault(
                (key,),
                f"must be a section with keys of its own, not a {kind_of(value)}. "
                f"Indent its settings under `{location[-1]}:`",
            )
        ]
    if kind == "literal_error":
        allowed = [part.strip(" '") for part in details["ctx"]["expected"].replace(" or ", ", ").split(",")]
        close = difflib.get_close_matches(str(value), allowed, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return [Fault((key,), f"{value!r} is not one of {', '.join(allowed)}.{hint}")]
    reason = details["msg"].removeprefix("Input ").rstrip(".")
    reason = reason[0].lower() + reason[1:]
    return [Fault((key,), f"{reason}, got {value!r}. Expected {about.type}: {_sentence(about.help)}")]


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _suggestion(schema: type[Section], location: Sequence[str]) -> str:
    keys = [setting.key for setting in settings(schema)]
    *parents, leaf = location
    prefix = "".join(part + "." for part in parents)
    siblings = {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)}
    if close := difflib.get_close_matches(leaf, siblings, 1):
        return f"Did you mean {prefix}{close[0]}?"
    leaves = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = difflib.get_close_matches(leaf, leaves, 1, cutoff=0.75) or difflib.get_close_matches(
        ".".join(location), keys, 1
    )
    if close:
        return f"Did you mean {leaves.get(close[0], close[0])}?"
    if siblings:
        return f"Known here: {', '.join(sorted(siblings))}."
    return "`spell train --help` lists all keys."


def _remove(schema: type[Section], raw: dict[str, Any], details: Mapping[str, Any]) -> None:
    """Take the value that an error is about out of the raw mapping (or fill in what is missing)."""
    location = [part for part in details["loc"] if part != "[key]"]
    if details["type"] == "missing" and isinstance(location[-1], str):
        parent = _descend(raw, location[:-1])
        annotation = schema.model_fields[location[-1]].annotation if location[-1] in schema.model_fields else None
        parent[location[-1]] = {} if isinstance(annotation, type) and issubclass(annotation, Section) else ""
        return
    # a fault inside a list removes the list: another length would be another fault
    while len(location) > 1 and not isinstance(_descend(raw, location[:-1]), dict):
        location.pop()
    parent = _descend(raw, location[:-1])
    if isinstance(parent, dict):
        parent.pop(location[-1], None)


def _descend(raw: Any, location: Sequence[str | int]) -> Any:
    for part in location:
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw
