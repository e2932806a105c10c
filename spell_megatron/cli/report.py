"""`spell report`: make a page about runs and evaluations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spell_megatron.errors import UserError


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="make a page of plots and transcripts of runs, and of scores",
        allow_abbrev=False,
        description="Make one HTML page about one or several runs: rewards, accuracy, what becomes of questions, "
        "curriculum, verifier, training, speed, and transcripts to browse; and about what `spell evaluate` found: the "
        "paper's table, pass@k, each benchmark. It needs no network; runs may still be going.",
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="of a run, such as runs/quickstart, or of an evaluation (the --out of spell evaluate)",
    )
    add("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html")
    for flag, default, meaning in (
        ("--transcripts", 200, "most questions per run to show with answers and judgments; 0 for none"),
        ("--text-chars", 2000, "longer texts in them lose their middle; judgments are cut to a quarter of it"),
    ):
        add(flag, type=int, default=default, metavar="N", help=f"{meaning} (default {default})")
    parser.set_defaults(command=run, takes_settings=False)


def run(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.report.report import write_report

    if arguments.transcripts < 0:
        raise UserError(f"--transcripts is {arguments.transcripts}; it must be 0 or more.")
    if arguments.text_chars < 100:
        raise UserError(f"--text-chars is {arguments.text_chars}; it must be 100 or more.")
    with Progress().stage("reading transcripts") as advance:
        summary = write_report(arguments.folders, arguments.out, arguments.transcripts, arguments.text_chars, advance)
    print(summary)
    return 0
