"""`spell status`: how a run is doing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "status",
        help="tell how a run is doing",
        description="Tell how a run is doing: steps, speed, what it is at, engines, its job's state, where its logs\n"
        "are. Works wherever the run's folder is seen. Exit status 3: it failed, or gives no sign of life.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="run.output_dir/run.name")
    parser.set_defaults(command=run, takes_settings=False)


def run(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.monitoring import status

    return _tell(arguments.run, status.read(arguments.run))


def _tell(run: Path, now: dict[str, Any]) -> int:
    """Print how a run is doing; the exit status."""
    from spell_megatron.monitoring import status
    from spell_megatron.monitoring.describe import describe

    print("\n".join(describe(run, now)))
    return 3 if now["state"] == "failed" or status.silent(now) else 0
