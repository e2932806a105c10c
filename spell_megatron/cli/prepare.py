"""`spell prepare`: turn files of text into document clusters."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command
from spell_megatron.corpus.options import Options
from spell_megatron.errors import UserError
from spell_megatron.hub import SCHEME, fetch_documents, fetch_model


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "prepare",
        run,
        help="turn files of text into document clusters",
        description="Turn files and folders of text (.txt, .md, .jsonl, .parquet) into clusters of related documents, "
        "the input of `spell train`. Files that share a folder make a cluster; other documents are grouped by "
        "similarity. The same inputs and options give the same file. A run that was stopped continues when it is "
        "started again.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder or, at the hub, hf://datasets/ORG/NAME[@REVISION][/PATH]",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="parquet (or .jsonl) file to write")
    groups: dict[str, Any] = {}
    for option in fields(Options):
        name = option.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        _add_option(groups[name].add_argument, option)


def _add_option(add: Any, option: Field) -> None:
    """The argument of one field of `Options`."""
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


def run(arguments: argparse.Namespace) -> int:
    given = {option.name: getattr(arguments, option.name) for option in fields(Options)}
    given |= {name: tuple(given[name]) for name in ("decontaminate", "tasks")}
    options = Options(**given)
    if arguments.out.is_file():
        raise UserError(f"{arguments.out} exists already. Choose another place with --out, or move it away.")
    if options.tokenizer:
        options = replace(options, tokenizer=fetch_model(options.tokenizer, weights=False))
    from spell_megatron.corpus.prepare import prepare

    inputs: list[Path] = []
    descriptions: list[Path] = []
    for text in arguments.inputs:
        if text.startswith(SCHEME):
            documents, description = fetch_documents(text)
            inputs.append(documents)
            descriptions.append(description)
        else:
            inputs.append(Path(text))
    print(prepare(inputs, arguments.out, options, descriptions))
    return 0
