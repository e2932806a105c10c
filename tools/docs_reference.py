"""The pages of `make docs` that are made from the code: settings, cluster's file, metrics, commands."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator

from spell_megatron.cli import command_parser
from spell_megatron.config.help import Setting, all_settings
from spell_megatron.config.schema import Config
from spell_megatron.config.section import Section, subsection
from spell_megatron.jobs.site import Site
from spell_megatron.monitoring.glossary import MEANINGS

FOLDER = "docs/reference"
KEYS = {setting.key for setting in all_settings()} | {
    setting.key.rpartition(".")[0] for setting in all_settings() if "." in setting.key
}
"""Settings and their sections, which texts link to."""

ONLY_SECTIONS_BESIDE_THE_PAGE = ("---", "tocdepth: 2", "---", "")


def reference_pages() -> dict[str, str]:
    """Path below the pages' folder -> Markdown."""
    os.environ["COLUMNS"] = "100"  # argparse breaks usages at the width of the terminal
    return {
        f"{FOLDER}/settings.md": settings_page(),
        f"{FOLDER}/cluster_file.md": cluster_file_page(),
        f"{FOLDER}/metrics.md": metrics_page(),
        f"{FOLDER}/commands.md": commands_page(),
    }


def settings_page() -> str:
    return "\n".join(
        [
            *ONLY_SECTIONS_BESIDE_THE_PAGE,
            "# Settings",
            "",
            "All settings of a run. They stand in its YAML file, or on the command line as `--SECTION.KEY=VALUE`. "
            "`spell train --help SECTION` prints the same.",
            *_sections(Config, ""),
        ]
    )


def cluster_file_page() -> str:
    return "\n".join(
        [
            "# The cluster's file",
            "",
            "All keys of the file that [`spell launch --cluster`](../cluster.md) reads. `cluster.KEY=VALUE` on the "
            "command line overrides one.",
            *(line for setting in all_settings(Site) for line in _setting(setting, 2)),
        ]
    )


def _sections(schema: type[Section], key: str) -> Iterator[str]:
    """A section's settings, then the sections within it."""
    inner = {name: section for name in schema.model_fields if (section := subsection(schema, name))}
    own = [setting for setting in all_settings(schema) if setting.key.partition(".")[0] not in inner]
    if key:
        yield from ("", f"## `{key}`", "", _text(schema.__doc__ or ""))
    for setting in own:
        yield from _setting(Setting(f"{key}.{setting.key}", setting.type, setting.default, setting.help), 3)
    for name, section in inner.items():
        yield from _sections(section, f"{key}.{name}" if key else name)


def _setting(setting: Setting, level: int) -> Iterator[str]:
    default = "required" if setting.default is None else f"default {_code(setting.default)}"
    yield from ("", f"{'#' * level} `{setting.key}`", "")
    yield from (f"{_code(setting.type)}, {default}", "", _text(setting.help))


def metrics_page() -> str:
    groups: dict[str, list[str]] = {}
    for name, meaning in MEANINGS.items():
        if not name.startswith("selfplay/<task>/"):
            groups.setdefault(name.partition("/")[0], []).append(f"| `{name}` | {_text(meaning, cell=True)} |")
    lines = [
        "# Metrics",
        "",
        "The numbers of `metrics.jsonl`, TensorBoard and the report. `spell metrics NAME` prints the same. `<role>` is "
        "questioner, responder or verifier. Most numbers behind `selfplay/` exist for each task too: "
        "`selfplay/<task>/rate/mixed`.",
    ]
    for group, rows in groups.items():
        lines += ["", f"## `{group}/`", "", "| metric | meaning |", "|---|---|", *rows]
    return "\n".join(lines)


def commands_page() -> str:
    lines = [
        "# Commands",
        "",
        "`spell COMMAND --help` prints the same. Commands that take settings take any of the "
        "[settings](settings.md) as `--SECTION.KEY=VALUE`.",
    ]
    for name, parser in commands().items():
        lines += ["", f"## `spell {name}`", "", _text(" ".join((parser.description or "").split())), ""]
        lines += [f"    {line}" for line in parser.format_usage().removeprefix("usage: ").rstrip().splitlines()]
        for group in parser._action_groups:
            rows = [_argument(action) for action in group._group_actions if action.dest != "help"]
            if rows:
                lines += ["", f"| {group.title or 'arguments'} | |", "|---|---|", *rows]
    return "\n".join(lines)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    actions = command_parser()._actions
    return next(dict(action.choices) for action in actions if isinstance(action, argparse._SubParsersAction))


def _argument(action: argparse.Action) -> str:
    """A row of a command's table."""
    values = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else None)
    words = " ".join(values) if isinstance(values, tuple) else values or action.dest.upper()
    if not action.option_strings:
        names = words
    else:
        takes = "" if action.nargs == 0 else f" [{words}]" if action.nargs == "?" else f" {words}"
        names = ", ".join(f"{option}{takes}" for option in action.option_strings)
    meaning = (action.help or "") % {"default": action.default, "prog": "spell"}
    return f"| {_code(names, cell=True)} | {_text(meaning, cell=True)} |"


def _code(text: str, cell: bool = False) -> str:
    return f"`{text.replace('|', chr(92) + '|') if cell else text}`"


def _text(text: str, cell: bool = False) -> str:
    """Plain text as Markdown: settings that it names are links, options are code, and no sign has another meaning."""
    parts = []
    for number, part in enumerate(" ".join(text.split()).split("`")):
        if number % 2:
            parts.append(_name(part, cell) or _code(part, cell))
            continue
        end = 0
        for match in re.finditer(r"(?<![\w.-])(?:--[a-z][\w-]*(?:\.\w+)*|[a-z]\w*(?:\.\w+)+)", part):
            name = _name(match[0], cell) or (_code(match[0], cell) if match[0][0] == "-" else _plain(match[0]))
            parts += [_plain(part[end : match.start()]), name]
            end = match.end()
        parts.append(_plain(part[end:]))
    return "".join(parts)


def _name(word: str, cell: bool) -> str | None:
    """A link to a setting or a section, with or without dashes; None: the word is neither."""
    key = word.removeprefix("--")
    return f"[{_code(word, cell)}](settings.md#{key.replace('.', '')})" if key in KEYS else None


def _plain(text: str) -> str:
    return re.sub(r"([\\*_\[\]|])", r"\\\1", text).replace("<", "&lt;")
