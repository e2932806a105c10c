"""`spell report`: make a page about runs and evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_number


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        run,
        help="make a page of plots and transcripts of runs, and of scores",
        description="Make one HTML page about one or several runs: rewards, accuracy, what becomes of questions, "
        "curriculum, verifier, training, speed, and transcripts to browse. It also shows what `spell evaluate` found: "
        "the paper's table, pass@k, each benchmark. It needs no network, and runs may still be going.",
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="folder of a run, such as runs/quickstart, or of an evaluation (--out of spell evaluate)",
    )
    add("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="instead of a page, write what trainer and engines of the runs did, and when, as a trace for "
        "https://ui.perfetto.dev or chrome://tracing",
    )
    add_number(add, "--transcripts", 200, "most questions per run shown with answers and judgments; 0 for none", 0)
    add_number(
        add,
        "--text-chars",
        2000,
        "longest text in them; a longer one loses its middle. A judgment: a quarter",
        100,
    )


def run(arguments: argparse.Namespace) -> int:
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.report.report import write_report
    from spell_megatron.report.trace import write_trace

    if arguments.trace:
        print(write_trace(arguments.folders, arguments.trace))
        return 0
    with Progress().stage("reading transcripts") as advance:
        summary = write_report(arguments.folders, arguments.out, arguments.transcripts, arguments.text_chars, advance)
    print(summary)
    return 0
