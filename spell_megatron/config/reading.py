"""From YAML files and overrides on the command line to a checked configuration.

`load_config` reports all faults at once. What depends on the machine (files, ports, GPUs) is checked by
`spell_megatron.preflight`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from spell_megatron.config.faults import Fault, involves, raise_faults
from spell_megatron.config.relations import relation_faults
from spell_megatron.config.schema import Config, Schema, Section
from spell_megatron.config.schema_faults import kind_of, validate
from spell_megatron.errors import UserError

Files = str | Path | Sequence[str | Path]
"""One YAML file, or several: the settings of later ones replace those of earlier ones."""


def load_config(files: Files, overrides: Sequence[str] = ()) -> Config:
    """Read YAML files, apply dotted overrides and validate the result.

    `overrides` are strings such as `selfplay.groups=16` (leading dashes allowed) whose values are
    parsed as YAML. A relative input path is taken from the current directory if it exists there,
    else from the folder of the YAML file that holds it; input paths come out absolute.

    Raises UserError that lists every fault, one a line.
    """
    config, faults = read_config(files, overrides)
    raise_faults_of_files(faults, files, overrides)
    return config


def read_config(files: Files, overrides: Sequence[str] = ()) -> tuple[Config, list[Fault]]:
    """Like `load_config`, but returns the faults beside a configuration without them.

    In the configuration returned, faulty settings have their defaults (a required one is empty),
    so that the caller can go on looking for faults elsewhere. Raises UserError only if a YAML
    file cannot be read at all.
    """
    raws = {path: _read_yaml(path) for path in _paths(files)}
    raw: dict[str, Any] = {}
    for other in raws.values():
        _merge(raw, other, Config)
    config, faults = _read(Config, raw, overrides)
    faulty = {key for fault in faults for key in fault.keys}
    faults += [fault for fault in relation_faults(config) if not involves(fault, faulty)]
    _resolve_paths(config, lambda key: (_holder(raws, key) or next(iter(raws), Path())).parent)
    return config, faults


def read_section(schema: type[Schema], path: Path | None, overrides: Sequence[str] = ()) -> tuple[Schema, list[Fault]]:
    """A YAML file (or none) of any schema, with overrides, and its faults by field; otherwise like `read_config`."""
    return _read(schema, _read_yaml(path) if path else {}, overrides)


def _read(schema: type[Schema], raw: dict[str, Any], overrides: Sequence[str]) -> tuple[Schema, list[Fault]]:
    faults: list[Fault] = []
    for override in overrides:
        fault = _apply_override(raw, override)
        if fault:
            faults.append(fault)
    section, schema_faults = validate(schema, raw)
    return section, faults + schema_faults


def raise_faults_of_files(faults: Sequence[Fault], files: Files, overrides: Sequence[str] = ()) -> None:
    """`raise_faults` for what `read_config` was given: of several files, a line names the one that sets its key."""
    paths = _paths(files)
    if faults and len(paths) > 1:
        raws = {path: _read_yaml(path) for path in paths}
        given = [_split_override(override)[0] for override in overrides]

        def place(fault: Fault) -> str:
            if any(involves(fault, [key]) for key in given):
                return "command line"
            return next((str(holder) for key in fault.keys if (holder := _holder(raws, key))), "")

        faults = [replace(fault, place=place(fault)) for fault in faults]
    raise_faults(faults, " and ".join(map(str, paths)))


def _paths(files: Files) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]


def _merge(raw: dict[str, Any], other: dict[str, Any], section: type[Section]) -> None:
    """Put the settings of `other` into `raw`; one that is a mapping (`selfplay.tasks`) replaces the earlier one."""
    for name, value in other.items():
        field = section.model_fields.get(name)
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if isinstance(value, dict) and isinstance(raw.get(name), dict):
                _merge(raw[name], value, field.annotation)
                continue
            if value is None:  # `selfplay:` with nothing under it
                raw.setdefault(name, None)
                continue
        raw[name] = copy.deepcopy(value)


def _holder(raws: Mapping[Path, dict[str, Any]], key: str) -> Path | None:
    """The last of the files that sets a dotted key."""

    def sets(raw: Any, sections: Sequence[str]) -> bool:
        if not isinstance(raw, dict):  # the value of a section, or the list that the key is in
            return raw is not None
        return not sections or (sections[0] in raw and sets(raw[sections[0]], sections[1:]))

    return next((path for path in reversed(raws) if sets(raws[path], key.split("."))), None)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here they are an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} occurs twice", key_node.start_mark
                )
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}. Check the path given to --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {path} cannot be read: {error}. Use UTF-8 YAML.") from None
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}. Mend that line.") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`, not a {kind_of(raw)}.")
    return raw


def _split_override(override: str) -> tuple[str, str, str]:
    """(key, "=" or nothing, value) of `--key=value`."""
    return override.lstrip("-").partition("=")


def _apply_override(raw: dict[str, Any], override: str) -> Fault | None:
    key, equals, text = _split_override(override)
    if not equals or not key:
        return Fault((key or override,), "an override needs a value. Write --section.key=value")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        return Fault((key,), f"{text!r} is not valid YAML: {_one_line(error)}. Quote the value")
    *sections, leaf = key.split(".")
    mapping = raw
    for depth, section in enumerate(sections):
        inner = mapping.setdefault(section, {})
        if inner is None:  # `section:` with nothing under it
            inner = mapping[section] = {}
        if not isinstance(inner, dict):
            parent = ".".join(sections[: depth + 1])
            return Fault((key,), f"{parent} is a single value, so nothing can be set under it. Check the key")
        mapping = inner
    mapping[leaf] = value
    return None


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


def _resolve_paths(config: Config, folder: Callable[[str], Path]) -> None:
    """Make input paths absolute; `folder` gives that of the YAML file with a key."""
    config.model.path = _resolve(config.model.path, folder("model.path"))
    config.data.documents = _resolve(config.data.documents, folder("data.documents"))
    if config.validation.questions is not None:
        config.validation.questions = _resolve(config.validation.questions, folder("validation.questions"))
    # the name of a prompt set of the package stays a name
    if "/" in config.selfplay.prompts or config.selfplay.prompts.startswith("~"):
        config.selfplay.prompts = str(_resolve(Path(config.selfplay.prompts), folder("selfplay.prompts")))
    config.run.output_dir = config.run.output_dir.expanduser()


def _resolve(path: Path, yaml_folder: Path) -> Path:
    path = path.expanduser()
    beside_yaml = yaml_folder / path
    return (beside_yaml if beside_yaml.exists() and not path.exists() else path).absolute()
