"""`spell launch`: submit a run to a Slurm cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_config, overrides_of, settings_help


def add_parser(commands: Any) -> None:
    from spell_megatron.jobs.site import Site

    parser = add_command(
        commands,
        "launch",
        run,
        help="submit a run to a Slurm cluster",
        usage="spell launch --config FILE [--config FILE ...] --cluster FILE [--dry-run] [--resume]\n"
        "                    [--SECTION.KEY=VALUE ...] [cluster.KEY=VALUE ...] [run.executor.FIELD=VALUE ...]",
        description="Submit a run to a Slurm cluster by NeMo-Run, from a login node or by SSH. It needs nemo-run in "
        "an environment of its own (`make environment-slurm`); the nodes need spell_megatron only. See "
        "docs/cluster.md.",
        epilog=settings_help(Site, "settings of the cluster's file, which cluster.KEY=VALUE overrides:"),
        takes_settings=True,
    )
    add = parser.add_argument
    add_config(parser, required=True)
    add("--cluster", type=Path, metavar="FILE", help="YAML file that describes the cluster (see below)")
    add("--executor", choices=("slurm", "local"), default="slurm", help="local: run here, without Slurm")
    add("--resume", action="store_true", help="continue the run from its newest checkpoint")
    add("--dry-run", action="store_true", help="print batch script, settings and memory plan, and submit nothing")


def run(arguments: argparse.Namespace) -> int:
    from spell_megatron.jobs.submit import launch

    # NeMo-Run's overrides have no dashes
    words = [f"--{word}" if word.startswith(("cluster.", "run.executor.")) else word for word in arguments.rest]
    return launch(
        arguments.config,
        arguments.cluster,
        overrides_of(words),
        on_slurm=arguments.executor == "slurm",
        resume=arguments.resume,
        dry_run=arguments.dry_run,
    )
