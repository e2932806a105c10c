"""`spell engines`: engines here for a run that names them in rollout.urls, or one node's engines of a job."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from spell_megatron.cli.arguments import add_command, add_config, add_rendezvous, overrides_of
from spell_megatron.config.reading import load_config
from spell_megatron.errors import UserError
from spell_megatron.hub import fetch_model
from spell_megatron.processes.rendezvous import ENDED
from spell_megatron.ranks import leave_step, rank, slurm_job


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "engines",
        run,
        help="start engines for a run that names them in rollout.urls",
        usage="spell engines --config FILE [--SECTION.KEY=VALUE ...]",
        description="Start the rollout.replicas engines of a run on this machine, print their addresses for "
        "rollout.urls, and serve until this process is ended. Their logs are in a folder beside the run's, with "
        "-engines behind its name. The environment variable SPELL_API_KEY (setting "
        "rollout.api_key_env) holds their key. With --rendezvous it is one node's share of the engines of a Slurm job: "
        "`spell launch` writes that command.",
        takes_settings=True,
    )
    add_config(parser, required=True)
    add_rendezvous(parser, required=False)
    parser.add_argument("--colocated", action="store_true", help="the engines share their GPUs with the trainer")


def run(arguments: argparse.Namespace) -> int:
    return _serve_node(arguments) if arguments.rendezvous else _serve_here(arguments)


def _serve_here(arguments: argparse.Namespace) -> int:
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.rollout.engines import Engines

    config = load_config(arguments.config, overrides_of(arguments.rest))
    key = config.rollout.api_key_env
    if not os.environ.get(key):
        raise UserError(
            f"The environment variable {key} is not set. Set it to a key of your choice, here and for the run."
        )
    config.rollout.urls = []
    config.model.path = fetch_model(config.model.path)
    _on_signals(lambda number: sys.exit(128 + number))
    progress = Progress()
    with progress.stage("starting engines"):
        engines = Engines.open(
            config.model,
            config.rollout,
            config.run.output_dir / f"{config.run.name}-engines",  # a run of this name makes its own folder
            device=config.run.device,
            seed=config.run.seed,
            routing=config.training.routing_replay,
            trainers=0,
        )
    with engines:
        progress.line(f"ready: --rollout.urls=[{','.join(engines.urls)}]")
        while True:
            time.sleep(1)
            engines.check()


def _serve_node(arguments: argparse.Namespace) -> int:
    from spell_megatron.planner.engine_share import engine_settings
    from spell_megatron.processes.rendezvous import BEGUN, Rendezvous, await_settings
    from spell_megatron.rollout.engine_nodes import serve

    _await_signals(arguments.rendezvous)
    node = rank()
    leave_step()  # its processes are no trainers
    await_settings(arguments.config)
    config = load_config(arguments.config, overrides_of(arguments.rest))
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

    def end(number: int) -> None:
        while slurm_job() and not (rendezvous / ENDED).exists():
            with suppress(OSError):
                os.listdir(rendezvous)  # a networked filesystem may remember that a file is not there
            time.sleep(0.2)
        sys.exit(128 + number)

    _on_signals(end)


def _on_signals(end: Callable[[int], None]) -> None:
    """Have the first SIGTERM or SIGINT call `end`."""
    import signal

    def once(number: int, _: object) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)
        end(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, once)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the trainer, which saves a checkpoint
