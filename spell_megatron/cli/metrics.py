"""`spell metrics`: what the metrics of a run mean."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from spell_megatron.cli.arguments import add_command
from spell_megatron.errors import UserError


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "metrics",
        run,
        help="explain the metrics of a run",
        description="Explain the numbers of metrics.jsonl, TensorBoard and the report: one of this name, those whose "
        "name or meaning holds the word, or all of them.",
    )
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="such as train/entropy, or verifier")


def run(arguments: argparse.Namespace) -> int:
    from spell_megatron.monitoring.glossary import search

    found = list(search(arguments.name))
    if not found:
        raise UserError(f"No metric is called {arguments.name!r}, or is about it. `spell metrics` lists all.")
    for name, meaning in found:
        print(f"{name}\n{textwrap.fill(meaning, 100, initial_indent='    ', subsequent_indent='    ')}")
    return 0
