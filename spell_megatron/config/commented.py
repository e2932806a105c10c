"""Settings as a YAML file with comments, for people to go on from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from spell_megatron.config.help import all_settings, as_yaml


def commented_yaml(settings: Mapping[str, Any], head: Sequence[str]) -> str:
    """YAML of dotted keys with their values, in the schema's order. Above each stands the first sentence of its help.

    head: lines of a comment at the start of the file.
    """
    lines = [f"# {line}".rstrip() for line in head]
    sections: list[str] = []
    for setting in all_settings():
        if setting.key not in settings:
            continue
        *path, leaf = setting.key.split(".")
        common = next((i for i, (a, b) in enumerate(zip(path, sections, strict=False)) if a != b), None)
        depth = min(len(path), len(sections)) if common is None else common
        for i, section in enumerate(path[depth:], start=depth):
            lines += [*([""] if i == 0 else []), f"{'  ' * i}{section}:"]
        sections, indent = path, "  " * len(path)
        first = re.split(r"(?<=\.)\s", setting.help, maxsplit=1)[0].rstrip(":")
        lines += textwrap.wrap(first, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        lines.append(f"{indent}{leaf}: {as_yaml(settings[setting.key])}")
    return "\n".join(lines) + "\n"
