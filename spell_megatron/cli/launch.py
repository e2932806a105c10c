"""`spell launch`: submit a run to a Slurm cluster."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spell_megatron.cli.arguments import add_config, overrides_of, settings_help


def add_parser(commands) -> None:
    from spell_megatron.jobs.site import Site

    parser = commands.add_parser(
        "launch",
        help="submit a run to a Slurm cluster",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spell launch --config FILE [--config FILE ...] --cluster FILE [--dry-run] [--resume]\n"
        "                    [--SECTION.KEY=VALUE ...] [cluster.KEY=VALUE ...] [run.executor.FIELD=VALUE ...]",
        description="Submit a run to a Slurm cluster by NeMo-Run, from a login node or by SSH. It needs nemo-run in\n"
        "an environment of its own (`make environment-slurm`); the nodes need spell_megatron only. See\n"
        "docs/cluster.md.",
        epilog=settings_help(Site, "settings of the cluster's file, which cluster.KEY=VALUE overrides:"),
    )
    add = parser.add_argument
    add_config(parser, required=True)
    add("--cluster", type=Path, metavar="FILE", help="YAML file that describes the cluster (see below)")
    add("--executor", choices=("slurm", "local"), default="slurm", help="local: run here, without Slurm")
    add("--resume", action="store_true", help="continue the run from its newest checkpoint")
    add("--dry-run", action="store_true", help="print batch script, settings and memory plan, and submit nothing")
    parser.set_defaults(command=run, takes_settings=True)


def run(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.jobs.submit import launch

    # NeMo-Run's overrides have no dashes
    words = [f"--{word}" if word.startswith(("cluster.", "run.executor.")) else word for word in rest]
    return launch(
        arguments.config,
        arguments.cluster,
        overrides_of(words),
        on_slurm=arguments.executor == "slurm",
        resume=arguments.resume,
        dry_run=arguments.dry_run,
    )
