"""`spell engines`: one node's engines of a Slurm job; the job's script calls it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_rendezvous
from spell_megatron.config.reading import load_config
from spell_megatron.processes.rendezvous import ENDED
from spell_megatron.ranks import leave_step, rank, slurm_job


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
    from spell_megatron.planner.engine_share import engine_settings
    from spell_megatron.processes.rendezvous import BEGUN, Rendezvous, await_settings
    from spell_megatron.rollout.engine_nodes import serve

    _await_signals(arguments.rendezvous)
    node = rank()
    leave_step()  # its processes are no trainers
    await_settings([arguments.config])
    config = load_config(arguments.config)
    rendezvous = Rendezvous(arguments.rendezvous, max(1, arguments.engine_nodes))
    rendezvous.wait(BEGUN)  # the folder of the logs may belong to another job
    logs = config.run.output_dir / config.run.name / "logs"
    nodes = rendezvous.engine_nodes
    trainers = config.training.parallel.processes // nodes if arguments.colocated else 0
    serve(
        config.model,
        engine_settings(config, trainers, nodes),
        logs,
        rendezvous,
        node,
        device=config.run.device,
        seed=config.run.seed,
        routing=config.training.routing_replay,
        trainers=trainers,
    )
    return 0


def _await_signals(rendezvous: Path) -> None:
    """Have SIGTERM and SIGINT end this process after the engines, but in a job not before the trainer has saved.

    Slurm signals all steps of a job that is preempted or cancelled, and ends the job when the first of them ends.
    """
    import signal

    def end(number: int, _: object) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)
        while slurm_job() and not (rendezvous / ENDED).exists():
            with suppress(OSError):
                os.listdir(rendezvous)  # a networked filesystem may remember that a file is not there
            time.sleep(0.2)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the trainer, which saves a checkpoint
