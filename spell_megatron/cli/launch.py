"""`spell launch`: submit a run to a Slurm cluster."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_config, add_resume, overrides_of, read_run, settings_help
from spell_megatron.errors import ExitStatus, UserError


def add_parser(commands: Any) -> None:
    from spell_megatron.jobs.site import Site

    parser = add_command(
        commands,
        "launch",
        run,
        help="submit a run to a Slurm cluster",
        usage="spell launch --config FILE [--config FILE ...] --cluster FILE [--dry-run]\n"
        "                    [--SECTION.KEY=VALUE ...] [cluster.KEY=VALUE ...] [run.executor.FIELD=VALUE ...]\n"
        "       spell launch --resume RUN_FOLDER --cluster FILE [...]\n"
        "       spell launch --executor local --config FILE cluster.venv=FOLDER [...]",
        description="Submit a run to a Slurm cluster by NeMo-Run, from a login node or by SSH. It needs nemo-run in "
        "an environment of its own (`make environment-slurm`); the nodes need spell_megatron only. See "
        "docs/cluster.md.",
        epilog=settings_help(Site, "settings of the cluster's file, which cluster.KEY=VALUE overrides:"),
        takes_settings=True,
    )
    add = parser.add_argument
    add_config(parser)
    add("--cluster", type=Path, metavar="FILE", help="YAML file that describes the cluster (see below)")
    add("--executor", choices=("slurm", "local"), default="slurm", help="local: run here, without Slurm")
    add_resume(parser)
    add("--dry-run", action="store_true", help="print batch script, settings and memory plan, and submit nothing")


def run(arguments: argparse.Namespace) -> int:
    from spell_megatron.jobs.submit import launch
    from spell_megatron.preflight.resume import finished

    rest = arguments.rest
    if "=" in (arguments.resume or ""):  # an override that follows a bare --resume
        rest, arguments.resume = [arguments.resume, *rest], ""
    # NeMo-Run's overrides have no dashes
    words = [f"--{word}" if word.startswith(("cluster.", "run.executor.")) else word for word in rest]
    of_executor, of_site, of_run = _separate(overrides_of(words), "run.executor.", "cluster.")
    reading, resumed = read_run("launch", arguments, of_run)
    config = reading.checked()
    if resumed:
        if resumed.step is not None:
            raise UserError(
                "A job goes on from the newest checkpoint of a run. `spell train --resume RUN_FOLDER@STEP` begins a "
                "new run on the machine where it is called; a job can go on with that one."
            )
        if nothing_to_do := finished(config):
            print(nothing_to_do)
            return ExitStatus.SUCCESS
    return launch(
        config,
        arguments.cluster,
        of_site,
        of_executor,
        sources=" and ".join(map(str, reading.files)),
        on_slurm=arguments.executor == "slurm",
        resume=resumed is not None,
        dry_run=arguments.dry_run,
    )


def _separate(words: Sequence[str], *prefixes: str) -> list[list[str]]:
    """The words with each prefix, without it, and last the words with none of them."""
    kinds: dict[str, list[str]] = {prefix: [] for prefix in (*prefixes, "")}
    for word in words:
        prefix = next(prefix for prefix in kinds if word.startswith(prefix))
        kinds[prefix].append(word.removeprefix(prefix))
    return list(kinds.values())
