"""`spell status`: how a run is doing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_run_folder
from spell_megatron.errors import ExitStatus


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "status",
        run,
        help="tell how a run is doing",
        description="Tell how a run is doing: its steps, speed, current stage, engines, the state of its job, and "
        "where its logs are. It works wherever the run's folder is visible. Exit status 3: the run failed, or gives "
        "no sign of life, and its job does not wait to start it again.",
    )
    add_run_folder(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: what the run says, its job, its last step's metrics"
    )


def run(arguments: argparse.Namespace) -> int:
    from spell_megatron.monitoring.status import read

    return tell(arguments.run, read(arguments.run), arguments.json)


def tell(run_folder: Path, said: dict[str, Any], as_json: bool = False) -> ExitStatus:
    """Print what a run `said` of itself; returns the exit status of that."""
    from spell_megatron.monitoring.describe import describe, numbers
    from spell_megatron.monitoring.queue import job_of
    from spell_megatron.monitoring.status import silent

    job = job_of(run_folder, said)
    if as_json:
        print(json.dumps(numbers(run_folder, said, job), indent=1))
    else:
        print("\n".join(describe(run_folder, said, job)))
    failed = said["state"] == "failed" or silent(said)
    return ExitStatus.RUN_FAILED if failed and not (job and job.waits) else ExitStatus.SUCCESS
