"""`spell stop`: have a run save a checkpoint and end."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spell_megatron.cli.status import _tell


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "stop",
        help="have a run save a checkpoint and stop",
        description="Ask a run to stop, wherever it runs, and wait until it has. It gives up a rollout that is under\n"
        "way or ends its update, saves a checkpoint, and ends; go on with `spell train --resume RUN_FOLDER`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="run.output_dir/run.name")
    parser.set_defaults(command=run, takes_settings=False)


def run(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.monitoring.stopping import stop

    return _tell(arguments.run, stop(arguments.run))
