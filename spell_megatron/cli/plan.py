"""`spell plan`: whether a run fits its GPUs, and how long a step takes."""

from __future__ import annotations

import argparse
from typing import Any

from spell_megatron.cli.arguments import (
    add_command,
    add_config,
    add_number,
    overrides_of,
    quiet_libraries,
    settings_help,
)
from spell_megatron.config.reading import load_config
from spell_megatron.errors import ExitStatus, UserError


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        run,
        help="tell whether a run fits its GPUs, and how long a step takes",
        usage="spell plan --config FILE [--config FILE ...] [--gpu NAME] [--gpus-per-node N] [--SECTION.KEY=VALUE ...]",
        description="Tell whether training.parallel.processes trainer GPUs and the engines' GPUs are enough for a "
        "run, how long a step takes, and which layout would be the fastest that fits. Needs neither GPUs nor "
        "weights: of model.path it reads only config.json. Exit status 2: the run does not fit.",
        epilog=settings_help(),
        takes_settings=True,
    )
    add_config(parser, required=True)
    add = parser.add_argument
    add("--gpu", default="H100-80G", metavar="NAME", help="A100-80G, H100-80G (default), H200-141G or B200")
    add_number(add, "--gpus-per-node", 8, "GPUs of each node")


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, overrides_of(arguments.rest))
    quiet_libraries()
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.planner.gpus import GPUS, Assumptions
    from spell_megatron.planner.model_size import ModelSize
    from spell_megatron.planner.search import TRIES, fastest, plan_layout
    from spell_megatron.planner.text import plan_text, proposal_text
    from spell_megatron.preflight.engine_model import check_positions
    from spell_megatron.preflight.findings import Findings
    from spell_megatron.training.policy import PolicyModel

    if arguments.gpu not in GPUS:
        raise UserError(f"--gpu {arguments.gpu} is not known. Known are {', '.join(GPUS)}.")
    policy = PolicyModel.load(config.model.path, config.model.dtype)
    model = ModelSize.of(policy)
    processes, gpu = config.training.parallel.processes, GPUS[arguments.gpu]
    assume = Assumptions(arguments.gpus_per_node)
    plan = plan_layout(model, config, processes, gpu, assume)
    print("\n".join(plan_text(model, config, plan, arguments.gpu, assume)))
    found = Findings()
    check_positions(found, config.rollout.sampling, policy.hf_config)
    for fault in found.faults:
        print(f"The run will not start: {fault.message}.")
    best = None
    with Progress().stage("other layouts") as advance:
        for number, tried in enumerate(fastest(model, config, processes, gpu, assume)):
            advance(number + 1, TRIES)
            best = tried if tried.fits else None
    print(proposal_text(plan, best))
    return ExitStatus.SUCCESS if plan.fits else ExitStatus.USER_ERROR
