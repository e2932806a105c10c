"""`spell plan`: whether a run fits its GPUs, and how long a step takes."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from spell_megatron.cli.arguments import (
    add_command,
    add_config,
    add_number,
    overrides_of,
    quiet_libraries,
    settings_help,
)
from spell_megatron.config.reading import load_config
from spell_megatron.errors import ExitStatus
from spell_megatron.hub import fetch_model
from spell_megatron.planner.gpus import GPUS

if TYPE_CHECKING:
    from spell_megatron.planner.plan import Plan


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        run,
        help="tell whether a run fits its GPUs, and how long a step takes",
        usage="spell plan --config FILE [--config FILE ...] [--gpu NAME] [--gpus-per-node N] [--host-memory GIB] "
        "[--SECTION.KEY=VALUE ...]",
        description="Tell whether the GPUs of trainer and engines and the memory of their nodes are enough for a run, "
        "how long a step takes, which layouts would be the fastest that fit as many GPUs, with trainer and engines on "
        "the same GPUs or on GPUs of their own, and on how few GPUs the model trains. Needs neither GPUs nor weights: "
        "of model.path it reads only config.json. Exit status 2: the run does not fit.",
        epilog=settings_help(),
        takes_settings=True,
    )
    add_config(parser, required=True)
    add = parser.add_argument
    add("--gpu", default="H100-80G", metavar="NAME", help=f"{', '.join(GPUS)} (default H100-80G)")
    add_number(add, "--gpus-per-node", 8, "GPUs of each node")
    add_number(add, "--host-memory", None, "memory of each node in GiB (default: what is usual for the GPU)")
    add("--json", action="store_true", help="print one JSON object: the plan, the proposals, and why it will not start")


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, overrides_of(arguments.rest))
    quiet_libraries()
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.planner.gpus import Assumptions, find_gpu
    from spell_megatron.planner.model_size import ModelSize
    from spell_megatron.planner.numbers import plan_numbers
    from spell_megatron.planner.plan import make_plan
    from spell_megatron.planner.search import fastest, fewest
    from spell_megatron.planner.text import plan_text, proposal_text
    from spell_megatron.preflight.engine_model import check_positions
    from spell_megatron.preflight.findings import Findings
    from spell_megatron.training.policy import PolicyModel

    gpu = find_gpu(arguments.gpu)
    config.model.path = fetch_model(config.model.path, weights=False)
    policy = PolicyModel.load(config.model.path, config.model.dtype)
    model = ModelSize.of(policy)
    host_memory = arguments.host_memory * 2**30 if arguments.host_memory else None
    assume = Assumptions(arguments.gpus_per_node, host_memory)
    plan = make_plan(model, config, config.training.parallel.processes, gpu, assume)
    found = Findings()
    check_positions(found, config.rollout.sampling, policy.hf_config)
    if not arguments.json:
        print("\n".join(plan_text(model, plan)))
        for fault in found.faults:
            print(f"The run will not start: {fault.message}.")
    proposals: dict[str, Plan | None] = {}
    smallest: dict[str, Plan | None] = {}
    ways = {"colocated": True, "separate": False}
    if config.training.staleness:
        del ways["colocated"]  # trainer and engines work at the same time
    with Progress(enabled=not arguments.json).stage("other layouts", 2 * len(ways)) as advance:
        for where, colocated in ways.items():
            proposals[where] = fastest(model, config, plan.gpus, colocated, gpu, assume)
            advance(2 * len(proposals) - 1)
            smallest[where] = fewest(model, config, colocated, gpu, assume)
            advance(2 * len(smallest))
    if arguments.json:
        others = {
            name: {where: other and plan_numbers(other) for where, other in plans.items()}
            for name, plans in (("proposals", proposals), ("fewest", smallest))
        }
        print(json.dumps({"plan": plan_numbers(plan), **others, "faults": list(map(str, found.faults))}, indent=1))
    else:
        print("\n".join(proposal_text(plan, proposals, smallest)))
    return ExitStatus.SUCCESS if plan.fits else ExitStatus.USER_ERROR
