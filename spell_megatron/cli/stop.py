"""`spell stop`: make a run save a checkpoint and end."""

from __future__ import annotations

import argparse
from typing import Any

from spell_megatron.cli.arguments import add_command, add_run_folder
from spell_megatron.cli.status import tell


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "stop",
        run,
        help="make a run save a checkpoint and stop",
        description="Ask a run to stop, wherever it runs, and wait until it has ended. The run gives up a rollout that "
        "is under way or ends its update, saves a checkpoint, and ends. A job that waits in the "
        "queue to start the run, also again, is cancelled. Continue it with `spell train --resume "
        "RUN_FOLDER`.",
    )
    add_run_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    from spell_megatron.monitoring.stop_run import stop

    return tell(arguments.run, stop(arguments.run))
