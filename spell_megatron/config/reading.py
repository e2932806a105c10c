"""From YAML files and overrides on the command line to checked settings.

All faults are reported at once. `spell_megatron.preflight` checks what depends on the machine (files, ports, GPUs).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Generic

import yaml

from spell_megatron.config.faults import Fault, involves, raise_faults
from spell_megatron.config.relations import relation_faults
from spell_megatron.config.schema import Config
from spell_megatron.config.schema_faults import kind_of, validate
from spell_megatron.config.section import Schema, Section, subsection
from spell_megatron.errors import UserError
from spell_megatron.hub import model_name, name_of

Files = str | Path | Sequence[str | Path] | None
"""One YAML file, or several, or none. The settings of later files replace the settings of earlier ones."""


@dataclass
class Reading(Generic[Schema]):
    """Settings that were read, and what is wrong with them."""

    settings: Schema
    """Settings without faults: a faulty one has its default, and a required one is empty."""
    faults: list[Fault]
    files: dict[Path, dict[str, Any]]
    """The content of each file."""
    overridden: list[str]
    """Dotted keys given on the command line."""

    def checked(self, found: Iterable[Fault] = ()) -> Schema:
        """The settings, if they have no fault and none was `found` elsewhere.

        Raises UserError that lists every fault, one a line. If there are several files, a line names the one that
        sets its key.
        """
        faults = [*self.faults, *found]
        if len(self.files) > 1:
            faults = [replace(fault, place=self._place(fault)) for fault in faults]
        raise_faults(faults, " and ".join(map(str, self.files)) or "the command line")
        return self.settings

    def need(self, *sections: str) -> None:
        """Forget faults of other sections, whose settings are not used here.

        Settings of them that were given on the command line keep theirs, and so does what is no section at all.
        """
        self.faults = [fault for fault in self.faults if self._counts(fault.keys[0], sections)]

    def _counts(self, key: str, sections: Sequence[str]) -> bool:
        section = key.partition(".")[0]
        return section in sections or key in self.overridden or section not in type(self.settings).model_fields

    def holder(self, key: str) -> Path | None:
        """The last of the files that sets a dotted key."""
        return next((file for file in reversed(self.files) if _sets(self.files[file], key.split("."))), None)

    def _place(self, fault: Fault) -> str:
        if any(involves(fault, [key]) for key in self.overridden):
            return "command line"
        return next((str(file) for key in fault.keys if (file := self.holder(key))), "")


def load_config(files: Files, overrides: Sequence[str] = ()) -> Config:
    """The settings of a run; raises UserError that lists every fault, one a line. Arguments: see `read_config`."""
    return read_config(files, overrides).checked()


def read_config(files: Files, overrides: Sequence[str] = ()) -> Reading[Config]:
    """Read the settings of a run from YAML files, apply dotted overrides and look for faults.

    `overrides` are strings such as `selfplay.groups=16` (leading dashes allowed) whose values are parsed as YAML. A
    relative input path is taken from the current directory if it exists there, else from the folder of the YAML file
    that holds it; input paths come out absolute. A model that is in neither place, but may be at the hub, stays a name.

    Raises UserError only if a YAML file cannot be read at all.
    """
    reading = read_section(Config, files, overrides)
    faulty = {key for fault in reading.faults for key in fault.keys}
    reading.faults += [fault for fault in relation_faults(reading.settings) if not involves(fault, faulty)]
    first = next(iter(reading.files), Path())
    _resolve_paths(reading.settings, lambda key: (reading.holder(key) or first).parent)
    return reading


def read_section(schema: type[Schema], files: Files, overrides: Sequence[str] = ()) -> Reading[Schema]:
    """Read settings of any schema from YAML files, apply dotted overrides and look for faults in each setting.

    Raises UserError only if a YAML file cannot be read at all.
    """
    paths = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files or ()]
    contents = {path: _read_yaml(path) for path in paths}
    raw: dict[str, Any] = {}
    for content in contents.values():
        _merge(raw, content, schema)
    override_faults = [fault for override in overrides if (fault := _apply_override(raw, override))]
    settings, faults = validate(schema, raw)
    overridden = [_split_override(override)[0] for override in overrides]
    return Reading(settings, override_faults + faults, contents, overridden)


def noted_prompt_date(settings: Path) -> date | None:
    """`model.prompt_date` in a file of a run's settings; None if there is no such file, or it does not say.

    Raises UserError if the file cannot be read, or names no day.
    """
    model = _read_yaml(settings).get("model") if settings.is_file() else None
    noted = model.get("prompt_date") if isinstance(model, dict) else None
    try:
        return date.fromisoformat(str(noted)) if noted else None
    except ValueError:
        raise UserError(f"{settings} has model.prompt_date {noted!r}. Write a day there, such as 2026-11-29.") from None


def to_yaml(config: Config, changed: bool = False) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one.

    changed: only what differs from the defaults.
    """
    content = config.model_dump(mode="json", exclude_defaults=changed)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def as_recorded(config: Config) -> Config:
    """The settings as a run's files keep them: a model of the hub by name and commit, not by its place in a cache."""
    model = config.model.model_copy(update={"path": Path(name_of(config.model.path))})
    return config.model_copy(update={"model": model})


def _merge(raw: dict[str, Any], other: dict[str, Any], schema: type[Section]) -> None:
    """Put the settings of `other` into `raw`. A mapping that is one setting (`selfplay.tasks`) is replaced whole."""
    for name, value in other.items():
        section = subsection(schema, name)
        if section and isinstance(value, dict) and isinstance(raw.get(name), dict):
            _merge(raw[name], value, section)
        elif section and value is None:  # `selfplay:` with nothing under it
            raw.setdefault(name, None)
        else:
            raw[name] = copy.deepcopy(value)


def _sets(content: Any, parts: Sequence[str]) -> bool:
    """Whether the content of a file sets a key, given in its parts."""
    if not isinstance(content, dict):  # the value of a section, or the list that the key is in
        return content is not None
    return not parts or (parts[0] in content and _sets(content[parts[0]], parts[1:]))


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses equal keys in a mapping, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {path} cannot be read: {error}. Use UTF-8 YAML.") from None
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}. Correct that line.") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`, not a {kind_of(raw)}.")
    return raw


def _split_override(override: str) -> tuple[str, str, str]:
    """`--key=value` as (key, "=", value); without a value as (key, "", "")."""
    return override.lstrip("-").partition("=")


def _apply_override(raw: dict[str, Any], override: str) -> Fault | None:
    """Set one key in `raw`; returns what is wrong with the override, if anything."""
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
    """Make input paths absolute; `folder(key)` is the folder of the YAML file that sets a key."""
    model = _resolve(config.model.path, folder("model.path"))
    if model.exists() or not model_name(config.model.path):
        config.model.path = model
    config.data.documents = _resolve(config.data.documents, folder("data.documents"))
    if config.validation.questions is not None:
        config.validation.questions = _resolve(config.validation.questions, folder("validation.questions"))
    # the name of a prompt set of the package stays a name
    if "/" in config.selfplay.prompts or config.selfplay.prompts.startswith("~"):
        config.selfplay.prompts = str(_resolve(Path(config.selfplay.prompts), folder("selfplay.prompts")))
    if config.selfplay.code is not None:
        config.selfplay.code = _resolve(config.selfplay.code, folder("selfplay.code"))
    config.run.output_dir = config.run.output_dir.expanduser()


def _resolve(path: Path, yaml_folder: Path) -> Path:
    path = path.expanduser()
    beside_yaml = yaml_folder / path
    return (beside_yaml if beside_yaml.exists() and not path.exists() else path).absolute()
