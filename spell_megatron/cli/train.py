"""`spell train`: train a policy by self-play."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from spell_megatron import __version__
from spell_megatron.cli.arguments import (
    Resume,
    add_command,
    add_config,
    add_rendezvous,
    add_resume,
    overrides_of,
    quiet_libraries,
    read_run,
    settings_help,
)
from spell_megatron.config.faults import Fault
from spell_megatron.config.reading import Reading, as_recorded, noted_prompt_date, to_yaml
from spell_megatron.config.schema import Config
from spell_megatron.errors import ExitStatus, UserError
from spell_megatron.hub import fetch_model, name_of
from spell_megatron.monitoring.run_log import Level
from spell_megatron.plural import counted
from spell_megatron.processes.launch import launch_processes
from spell_megatron.processes.signals import expect_requests
from spell_megatron.ranks import ONE_QUEUE, child_of_torchrun, launched_processes, local_processes, rank, slurm_restarts

if TYPE_CHECKING:
    from spell_megatron.preflight.findings import Findings

logger = logging.getLogger(__name__)


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        run,
        help="train a policy by self-play",
        usage="spell train --config FILE [--config FILE ...] [--SECTION.KEY=VALUE ...] [--dry-run]\n"
        "       spell train --resume RUN_FOLDER[@STEP] [--SECTION.KEY=VALUE ...]",
        description="Train a policy by self-play on document clusters. Everything is checked before a model "
        "is loaded. Results are written to the folder run.output_dir/run.name.",
        epilog=settings_help(),
        takes_settings=True,
    )
    add_config(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print all settings and an overview, and stop"
    )
    parser.add_argument(
        "--print-config",
        nargs="?",
        const="changed",
        choices=("changed", "all"),
        help="print the settings as YAML, those that differ from the defaults or all, and stop",
    )
    add_resume(parser)
    parser.add_argument(
        "--log-level",
        choices=get_args(Level),
        help="short for --logging.level: what is written to logs/train.log in the run's folder",
    )
    add_rendezvous(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    expect_requests()
    os.environ.setdefault(ONE_QUEUE, "1")  # before anything starts CUDA
    if child_of_torchrun():
        from spell_megatron.processes.lifetime import end_with_parent

        end_with_parent()
    level = [f"logging.level={arguments.log_level}"] if arguments.log_level else []
    overrides = [*overrides_of(arguments.rest), *level]
    if arguments.print_config:
        settings = read_run("train", arguments, overrides)[0].checked()
        print(to_yaml(settings, changed=arguments.print_config == "changed"), end="")
        return ExitStatus.SUCCESS
    reading, resume = _read(arguments, overrides)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is here now, and nodes may not reach the hub
    found = _preflight(arguments, reading, resume)
    config = reading.checked(found.faults)
    goes_on = resume is not None and resume.step is None
    if goes_on and launched_processes() is None and (nothing_to_do := _finished(config)):
        print(nothing_to_do)
        return ExitStatus.SUCCESS
    if arguments.dry_run:
        print(
            to_yaml(as_recorded(config)) + "\n".join(f"# {line}" for line in _overview(config, resume, found.warnings))
        )
        return ExitStatus.SUCCESS
    if config.training.parallel.processes > 1 and launched_processes() is None:
        return launch_processes(config.training, [*arguments.argv, *_same_model(config)])
    for warning in found.warnings:
        print(f"spell: warning: {warning}", file=sys.stderr)
    return _train(arguments, config, resume, found.warnings)


def _same_model(config: Config) -> list[str]:
    """Words of a command line that takes the same commit of a model of the hub."""
    name = name_of(config.model.path)
    return [] if name == str(config.model.path) else [f"--model.path={name}"]


def _finished(config: Config) -> str:
    from spell_megatron.preflight.resume import finished

    return finished(config)


def _preflight(arguments: argparse.Namespace, reading: Reading[Config], resume: Resume | None) -> Findings:
    """What rank 0 finds wrong with the settings on this machine."""
    from spell_megatron.preflight.findings import Findings
    from spell_megatron.preflight.inspect import inspect

    if rank() > 0:
        return Findings()
    known_faulty = {key for fault in reading.faults for key in fault.keys}
    if resume is None or resume.step is None:
        folder = None if resume is None else resume.folder
        return inspect(reading.settings, folder, known_faulty, _restarted(arguments))
    return inspect(reading.settings, None, known_faulty, _restarted(arguments), (resume.folder, resume.step))


def _restarted(arguments: argparse.Namespace) -> bool:
    """Whether Slurm has queued this job again."""
    return arguments.rendezvous is not None and slurm_restarts() > 0


def _train(arguments: argparse.Namespace, config: Config, resume: Resume | None, warnings: Sequence[str]) -> ExitStatus:
    """Train in this process; the exit status tells why the run stopped."""
    quiet_libraries()
    from spell_megatron.monitoring.run_log import run_log
    from spell_megatron.monitoring.stopping import Reason
    from spell_megatron.train import run as train

    rendezvous = None
    if arguments.rendezvous:
        from spell_megatron.processes.rendezvous import BEGUN, Rendezvous

        rendezvous = Rendezvous(arguments.rendezvous, arguments.engine_nodes)
    goes_on = resume is not None and resume.step is None
    with _run_folder(config, known=goes_on or _restarted(arguments)):
        if resume is not None and resume.step is not None and rank() == 0:
            _fork(resume, config)
        if rendezvous and rank() == 0:
            rendezvous.publish(BEGUN, {})
        with run_log(config.run.output_dir / config.run.name, rank(), config.logging.level):
            logger.info("spell_megatron %s: spell %s", __version__, shlex.join(arguments.argv))
            for warning in warnings:
                logger.warning("%s", warning)
            stopped = train(config, resume=resume is not None, rendezvous=rendezvous)
    if stopped is Reason.REQUEUE and rendezvous:
        rendezvous.publish("requeue", {})  # the job's script looks for it
    # An orderly end is told by rank 0 alone: launchers end the others when one process has another status than 0.
    return stopped.exit_status if stopped and rank() == 0 else ExitStatus.SUCCESS


def _fork(resume: Resume, config: Config) -> None:
    """Make the new run's folder, with the step of the old run that it begins with."""
    from spell_megatron.checkpoint.fork import fork, kept_step

    folder = config.run.output_dir / config.run.name
    if not (folder / "checkpoints" / "latest").exists():  # a job that is started again goes on from its own
        fork(kept_step(resume.folder, resume.step or 0), folder)


@contextmanager
def _run_folder(config: Config, known: bool) -> Iterator[None]:
    """Keep other processes out of the run's folder; rank 0 does it for all. `known`: the folder may hold a run."""
    if rank() > 0:
        yield
        return
    from spell_megatron.monitoring.run_lock import run_lock
    from spell_megatron.preflight.machine import holds_run

    folder = config.run.output_dir / config.run.name
    with run_lock(folder):
        if not known and holds_run(folder):  # preflight looked before the folder was ours
            raise UserError(
                f"Another process has meanwhile made a run in {folder}. Choose another name with --run.name=…, or "
                "continue that run with --resume."
            )
        yield


def _read(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[Reading[Config], Resume | None]:
    """The settings, and the run to be continued, if any."""
    if arguments.rendezvous:
        from spell_megatron.processes.rendezvous import await_settings

        await_settings(arguments.config or ())
    reading, resumed = read_run("train", arguments, overrides)
    try:
        reading.settings.model.path = fetch_model(reading.settings.model.path)
    except UserError as error:
        reading.faults.append(Fault.of("model.path", str(error).rstrip(".")))
    _pin_date(reading.settings, resumed.folder if resumed else None)
    return reading, resumed


def _pin_date(config: Config, resumed: Path | None) -> None:
    """The day for chat templates is that of the run's beginning, unless the settings name another one."""
    if config.model.prompt_date is None and rank() == 0:  # other ranks make no prompts
        began = noted_prompt_date(resumed / "config.yaml") if resumed else None
        config.model.prompt_date = began or date.today()


def _beginning(resume: Resume | None) -> str:
    if resume is None:
        return "new"
    return "continued" if resume.step is None else f"new, from step {resume.step} of {resume.folder}"


def _overview(config: Config, resume: Resume | None, warnings: Sequence[str]) -> list[str]:
    """What a run would do, in a few lines."""
    from spell_megatron.planner.engine_share import engine_settings
    from spell_megatron.preflight.engines import states
    from spell_megatron.rollout.placement import transport_here
    from spell_megatron.rollout.server import ServerSettings, kernel_variables, server_command
    from spell_megatron.selfplay.documents import load_clusters
    from spell_megatron.training.policy import PolicyModel
    from spell_megatron.weights.sizes import checkpoint_bytes
    from spell_megatron.weights.untrained import Untrained

    play, rollout, parallel = config.selfplay, config.rollout, config.training.parallel
    key = os.environ.get(rollout.api_key_env)
    gpus, trainers = rollout.replicas * rollout.tensor_parallel, local_processes() or parallel.processes
    transport = transport_here(gpus, config.run.device, trainers, rollout.colocated)
    policy = PolicyModel.load(config.model.path, config.model.dtype)
    arch = policy.arch
    clusters = load_clusters(config.data.documents, play.known_tasks)
    processes = launched_processes() or parallel.processes
    replicas = processes // parallel.dense_ranks
    experts = f", {arch.experts} experts" if arch.experts else ""
    with Untrained(config.model.path, policy) as untrained:
        kept = [f"not trained  {untrained}, copied into every checkpoint as they are"] if untrained.names else []
        each = checkpoint_bytes(policy) + untrained.nbytes
    lines = [
        "Overview",
        f"run folder   {config.run.output_dir / config.run.name} ({_beginning(resume)})",
        f"policy       {policy.hf_config.model_type}, {arch.layers} layers, hidden {arch.hidden}{experts}, "
        f"vocabulary {arch.vocabulary}, {config.model.dtype}",
        *kept,
        f"documents    {sum(len(c.documents) for c in clusters):,} in {counted(len(clusters), 'cluster')}",
        f"trainer      {'CPU' if transport.on_cpus else 'CUDA'}, {processes} process(es), {replicas} data-parallel",
        f"updates      {config.run.steps}, each of {play.groups} groups x {play.group_size} answers = "
        f"{play.groups * play.group_size} responder rows, plus questions and judgments",
        f"checkpoints  every {counted(config.checkpoint.every, 'update')}, "
        f"{each / 1e9:.2f} GB each, the last {config.checkpoint.keep} kept",
    ]
    if rollout.urls:
        lines.append("engines      running ones, asked just now:")
        lines += [f"  {url} {wrong or 'answers'}" for url, wrong in states(rollout.urls, key)]
        if not key:
            lines.append(f"warning: {rollout.api_key_env} is not set; the engines' key is taken from it")
    else:
        settings = ServerSettings(
            config.model, engine_settings(config, trainers), config.run.seed, config.training.routing_replay
        )
        command = server_command(settings, transport, rollout.base_port or 0)
        port = "" if rollout.base_port else " (port 0: a free one)"
        words = [*(f"{name}={value}" for name, value in kernel_variables(rollout).items()), shlex.join(command)]
        lines += [f"engines      {rollout.replicas} started here{port}, each by", "  " + " ".join(words)]
    return lines + [f"warning: {warning}" for warning in warnings]
