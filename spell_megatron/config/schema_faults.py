"""What pydantic finds wrong with settings, in words that tell a user how to correct it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from spell_megatron.config.faults import Fault, involves
from spell_megatron.config.help import Setting, all_settings
from spell_megatron.config.other_names import OTHER_NAMES
from spell_megatron.config.section import Schema, Section, subsection

# What pydantic's ErrorDetails hold: "type", "loc" (a path of keys and list indices), "msg", "input", "ctx".
Details = Mapping[str, Any]


def validate(schema: type[Schema], raw: dict[str, Any]) -> tuple[Schema, list[Fault]]:
    """Validate the content of a file against a schema.

    Returns settings without faults (a faulty one has its default, and a required one is empty) and all faults.
    """
    raw = copy.deepcopy(raw)
    _fill_empty_sections(raw, schema)
    faults: list[Fault] = []
    while True:  # pydantic checks some things only after others hold
        try:
            return schema.model_validate(raw), faults
        except ValidationError as error:
            for details in error.errors(include_url=False):
                faults += _faults(schema, details, faults)
                _remove(schema, raw, details)


def kind_of(value: Any) -> str:
    """The kind of a YAML value, for messages."""
    names = {dict: "mapping", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _fill_empty_sections(raw: dict[str, Any], schema: type[Section]) -> None:
    """Replace sections that are null by empty ones: `selfplay:` may have all its lines commented out."""
    for name in raw:
        if section := subsection(schema, name):
            if raw[name] is None:
                raw[name] = {}
            if isinstance(raw[name], dict):
                _fill_empty_sections(raw[name], section)


def _faults(schema: type[Section], details: Details, earlier: Sequence[Fault]) -> list[Fault]:
    """The faults that one error of pydantic's means. What `earlier` faults say already is left out."""
    location = [str(part) for part in details["loc"] if part != "[key]"]
    key, kind, value = ".".join(location), details["type"], details["input"]
    if kind == "missing" and isinstance(details["loc"][-1], str):
        return [
            Fault((setting.key,), f"is missing: {_sentence(setting.help)} Set it, or pass --{setting.key}=…")
            for setting in _required(schema, key)
            if not any(involves(fault, [setting.key]) for fault in earlier)
        ]
    if kind == "extra_forbidden":
        message = f"unknown key. {_suggestion(schema, location)}"
    elif (setting := _setting(schema, key)) is None:
        message = (
            f"must be a section with keys of its own, not a {kind_of(value)}. Indent its settings under "
            f"`{location[-1]}:`"
        )
    elif kind == "literal_error":
        allowed = [part.strip(" '") for part in details["ctx"]["expected"].replace(" or ", ", ").split(",")]
        close = difflib.get_close_matches(str(value), allowed, 1)
        message = f"{value!r} is not one of {', '.join(allowed)}." + (f" Did you mean {close[0]}?" if close else "")
    else:
        reason = details["msg"].removeprefix("Input ").rstrip(".")
        reason = reason[0].lower() + reason[1:]
        message = f"{reason}, got {value!r}. Expected {setting.type}: {_sentence(setting.help)}"
    return [Fault((key,), message)]


def _required(schema: type[Section], key: str) -> list[Setting]:
    """The setting of a key; if the key is a whole section, the settings that must stand in it."""
    return [s for s in all_settings(schema) if s.default is None and (s.key == key or s.key.startswith(key + "."))]


def _setting(schema: type[Section], key: str) -> Setting | None:
    """The setting that a key is, or is a part of; None if it is a section."""
    return next((s for s in all_settings(schema) if s.key == key or key.startswith(s.key + ".")), None)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _suggestion(schema: type[Section], location: Sequence[str]) -> str:
    """What an unknown key may have been meant to be."""
    keys = [setting.key for setting in all_settings(schema)]
    *parents, leaf = location
    prefix = "".join(part + "." for part in parents)
    siblings = {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)}
    leaves: dict[str, list[str]] = {}
    for key in keys:
        leaves.setdefault(key.rsplit(".", 1)[-1], []).append(key)
    name = leaf.lower().replace("-", "_")
    if elsewhere := leaves.get(name):
        return f"Did you mean {' or '.join(elsewhere)}?"
    if (other := OTHER_NAMES.get(name)) and any(key == other or key.startswith(f"{other}.") for key in keys):
        return f"Did you mean {other}?"
    if close := difflib.get_close_matches(leaf, siblings, 1):
        return f"Did you mean {prefix}{close[0]}?"
    if close := difflib.get_close_matches(leaf, leaves, 1, cutoff=0.75):
        return f"Did you mean {' or '.join(leaves[close[0]])}?"
    if close := difflib.get_close_matches(".".join(location), keys, 1):
        return f"Did you mean {close[0]}?"
    if siblings:
        return f"Known here: {', '.join(sorted(siblings))}."
    return "`spell train --help` lists all keys."


def _remove(schema: type[Section], raw: dict[str, Any], details: Details) -> None:
    """Remove the value that an error is about from the raw mapping, or fill in what is missing."""
    location = [part for part in details["loc"] if part != "[key]"]
    if details["type"] == "missing" and isinstance(location[-1], str):
        _descend(raw, location[:-1])[location[-1]] = {} if subsection(schema, location[-1]) else ""
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
