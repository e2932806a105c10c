"""`spell plan`: whether a run fits its GPUs, and how long a step takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spell_megatron.cli.arguments import add_config, overrides_of, quiet_libraries, settings_help
from spell_megatron.config.reading import load_config
from spell_megatron.errors import UserError


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="tell whether a run fits its GPUs, and how long a step takes",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spell plan --config FILE [--config FILE ...] [--gpu NAME] [--gpus-per-node N] [--SECTION.KEY=VALUE ...]",
        description="Tell whether training.parallel.processes trainer GPUs and the engines' GPUs are enough for a\n"
        "run, how long a step takes, and which layout would be the fastest that fits. Needs neither GPUs nor\n"
        "weights: of model.path only config.json is read. Exit status 2: it does not fit.",
        epilog=settings_help(),
    )
    add_config(parser, required=True)
    add = parser.add_argument
    add("--gpu", default="H100-80G", metavar="NAME", help="A100-80G, H100-80G (default), H200-141G or B200")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.set_defaults(command=run, takes_settings=True)


def run(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    config = load_config(arguments.config, overrides_of(rest))
    quiet_libraries()
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.planner.gpus import GPUS, Assumptions
    from spell_megatron.planner.memory import Model
    from spell_megatron.planner.search import TRIES, cheapest, plan_layout
    from spell_megatron.planner.text import describe, plan_text
    from spell_megatron.training.policy import PolicyModel

    if arguments.gpu not in GPUS:
        raise UserError(f"--gpu {arguments.gpu} is not known. Known are {', '.join(GPUS)}.")
    if arguments.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node is {arguments.gpus_per_node}; it must be 1 or more.")
    model = Model.of(PolicyModel.load(config.model.path, config.model.dtype))
    processes = config.training.parallel.processes
    task = model, config, processes, GPUS[arguments.gpu], Assumptions(arguments.gpus_per_node)
    plan = plan_layout(*task)
    print("\n".join(plan_text(model, config, plan, arguments.gpu, task[-1])))
    best = None
    with Progress().stage("other layouts") as advance:
        for number, tried in enumerate(cheapest(*task)):
            advance(number + 1, TRIES)
            best = tried if tried.fits else None
    if best is None:
        print(f"proposal  no layout on {processes} GPUs fits: use more of them, or shorter rows")
    elif best.times.update < plan.times.update or not plan.fits:
        print(
            f"proposal  {describe(best)}: {best.memory.total / 2**30:.2f} GiB, updates "
            f"{plan.times.update / best.times.update:.2f} times as fast"
        )
    else:
        print("proposal  none: no other layout is faster and fits")
    return 0 if plan.fits else 2
