"""`spell engines`: one node's engines of a Slurm job; the job's script calls it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_rendezvous
from spell_megatron.config.reading import load_config
from spell_megatron.errors import ExitStatus
from spell_megatron.ranks import leave_step, rank


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "engines",
        run,
        help="start engines on a node of a Slurm job (`spell launch` writes this command)",
        description="Start this node's share of the rollout.replicas engines of a run, publish them in the rendezvous "
        "for the trainer, and serve until this process is ended. srun starts one such process on each engine node.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="YAML file of the run's settings")
    add_rendezvous(parser, required=True)
    parser.add_argument("--colocated", action="store_true", help="the engines share their GPUs with the trainer")


def run(arguments: argparse.Namespace) -> int:
    import signal

    from spell_megatron.processes.rendezvous import BEGUN, Rendezvous, await_settings
    from spell_megatron.rollout.engine_nodes import serve

    # The default action would end this process before it has stopped the engines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitStatus.TERMINATED))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the trainer, which saves a checkpoint
    node = rank()
    leave_step()  # its processes are no trainers
    await_settings([arguments.config])
    config = load_config(arguments.config)
    rendezvous = Rendezvous(arguments.rendezvous, max(1, arguments.engine_nodes))
    rendezvous.wait(BEGUN)  # the folder of the logs may belong to another job
    logs = config.run.output_dir / config.run.name / "logs"
    serve(
        config.model,
        config.rollout,
        logs,
        rendezvous,
        node,
        device=config.run.device,
        seed=config.run.seed,
        routing=config.training.routing_replay,
        trainers=config.training.parallel.processes // rendezvous.engine_nodes if arguments.colocated else 0,
    )
    return 0
