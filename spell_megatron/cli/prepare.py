"""`spell prepare`: turn files of text into document clusters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from spell_megatron.corpus.options import Options


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn files of text into document clusters",
        allow_abbrev=False,
        description="Turn files and folders of text (.txt, .md, .jsonl, .parquet) into clusters of related "
        "documents, the input of `spell train`. Files that share a folder make a cluster; other documents "
        "are grouped by similarity. The same inputs and options give the same file; a run that was stopped goes "
        "on where it was when it is started again.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="parquet (or .jsonl) file to write")
    groups: dict[str, Any] = {}
    for option in fields(Options):
        group = option.metadata["group"]
        add = groups.setdefault(group, parser.add_argument_group(group)).add_argument
        flag, meaning = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        if option.type == "bool":
            add(flag, action="store_true", help=meaning)
        elif option.name == "decontaminate":
            add(flag, action="append", type=Path, default=[], metavar="FILE", help=meaning)
        elif option.name == "tasks":
            add(flag, type=lambda given: given.split(","), default=[], metavar="TASK[,TASK]", help=meaning)
        else:
            kind = {"int": int, "float": float, "str": str, "Path": Path}[option.type.removesuffix(" | None")]
            if option.default not in ("", None):
                meaning += f" (default {option.default})"
            add(flag, type=kind, default=option.default, metavar=option.metadata["metavar"], help=meaning)
    parser.set_defaults(command=run, takes_settings=False)


def run(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    given = {option.name: getattr(arguments, option.name) for option in fields(Options)}
    given |= {name: tuple(given[name]) for name in ("decontaminate", "tasks")}
    options = Options(**given)
    from spell_megatron.corpus.prepare import prepare

    summary = prepare(arguments.inputs, arguments.out, options)
    print(summary)
    return 0
