"""The `spell` command.

Exit status: 0 success, 2 something the user can mend (one message on stderr), 130 interrupted, 1 a
defect of the program (with a stack trace). Of `spell train` also 75 and 143: stopped with a checkpoint, on SIGUSR1
(start it again: the limit of time is near) and on SIGTERM. Of `spell status` also 3: failed, or no sign of life.
"""

# torch, Megatron, vLLM and transformers are imported inside the commands: `spell --help` answers at once.

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from spell_megatron import __version__
from spell_megatron.config import (
    Config,
    Fault,
    Section,
    launched_processes,
    raise_faults,
    raise_faults_of_files,
    read_config,
    settings,
    to_yaml,
)
from spell_megatron.corpus.options import Options
from spell_megatron.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in (_train, _plan, _submit, _evaluate):
        parser.error(f"unknown argument {rest[0]!r}; see `spell {argv[0]} --help`")
    try:
        return arguments.command(arguments, rest, argv)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            error = UserError(f"{error}. Make room; a run then goes on from its last checkpoint with --resume.")
        rank = f" (process {_rank()})" if (launched_processes() or 1) > 1 else ""
        print(f"spell{rank}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spell: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spell",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="SPELL: a language model improves its long-context reasoning by self-play on documents.\n"
        "Megatron-Core trains it, vLLM generates.",
        epilog=textwrap.dedent(
            """\
            A first run on documents of your own:
              spell prepare my_documents/ --out corpus.parquet
              spell train --config run.yaml --data.documents=corpus.parquet --dry-run
              spell train --config run.yaml --data.documents=corpus.parquet

            `spell COMMAND --help` explains a command."""
        ),
    )
    parser.add_argument("--version", action="version", version=f"spell_megatron {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_launch(commands)
    _add_engines(commands)
    _add_status(commands)
    _add_stop(commands)
    _add_evaluate(commands)
    _add_plan(commands)
    _add_prepare(commands)
    _add_convert(commands)
    _add_report(commands)
    return parser


# ------------------------------------------------------------------------------------------ train


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a policy by self-play",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spell train --config FILE [--config FILE ...] [--SECTION.KEY=VALUE ...] [--dry-run]\n"
        "       spell train --resume RUN_FOLDER [--SECTION.KEY=VALUE ...]",
        description="Train a policy by self-play on document clusters. Everything is checked before a model\n"
        "is loaded. Results are written to the folder run.output_dir/run.name.",
        epilog=_settings_help(),
    )
    _add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check all, print all settings and a plan, and stop")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_FOLDER",
        help="continue a run from its newest checkpoint, with its own settings unless --config is given; "
        "without RUN_FOLDER: the run that --config names",
    )
    _add_rendezvous(parser, required=False)
    parser.set_defaults(command=_train)


def _add_config(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        required=required,
        help="YAML file of the run's settings; of several, later ones override earlier ones",
    )


def _add_rendezvous(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--rendezvous",
        type=Path,
        required=required,
        metavar="FOLDER",
        help="folder of the shared filesystem by which the processes of a cluster's job find each other",
    )
    parser.add_argument(
        "--engine-nodes",
        type=int,
        default=0,
        metavar="N",
        help="number of `spell engines` processes that publish their engines in the rendezvous",
    )


RUN_SETTINGS = "settings, for the YAML file and as --SECTION.KEY=VALUE (values are YAML):"


def _settings_help(schema: type[Section] = Config, title: str = RUN_SETTINGS) -> str:
    lines = [title]
    for setting in settings(schema):
        default = "required" if setting.default is None else f"default {setting.default}"
        lines += ["", f"  {setting.key}  ({setting.type}; {default})"]
        lines += textwrap.wrap(setting.help, 98, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _train(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.reporting.status import block_sigusr1

    block_sigusr1()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by a launcher, as `_launch` is one
        from spell_megatron.training.lifetime import end_with_parent

        end_with_parent()
    overrides = _overrides(rest)
    config, faults, resume = _read(arguments, overrides)
    warnings: list[str] = []
    if _rank() == 0:
        from spell_megatron.preflight import find_faults

        known = {key for fault in faults for key in fault.keys}
        restarted = arguments.rendezvous is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        found, warnings = find_faults(config, resume, known, restarted)
        faults = [*faults, *found]
    raise_faults_of_files(faults, arguments.config or Path(arguments.resume) / "config.yaml", overrides)
    if arguments.dry_run:
        print(to_yaml(config) + "\n".join(f"# {line}" for line in _outlook(config, resume, warnings)))
        return 0
    if config.training.parallel.processes > 1 and launched_processes() is None:
        return _launch(config, argv)
    for warning in warnings:
        print(f"spell: warning: {warning}", file=sys.stderr)

    _quiet_libraries()
    from spell_megatron.train import run

    rendezvous = None
    if arguments.rendezvous:
        from spell_megatron.cluster.rendezvous import Rendezvous

        rendezvous = Rendezvous(arguments.rendezvous, arguments.engine_nodes)
    stopped = run(config, resume=resume is not None, rendezvous=rendezvous)
    if stopped == "requeue" and rendezvous:
        rendezvous.publish("requeue", {})  # the job's script looks for it
    return {None: 0, "stop": 0, "requeue": 75, "terminate": 143}[stopped]


def _quiet_libraries() -> None:
    """Leave out the warnings of libraries about themselves, which hide what a run has to say."""
    from warnings import filterwarnings

    for module in ("megatron", "torch", "transformers"):
        filterwarnings("ignore", module=rf"{module}\.")


def _read(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[Config, list[Fault], Path | None]:
    """Settings, their faults, and the folder of the run to be continued, if any."""
    if arguments.resume:
        folder = Path(arguments.resume)
        own = folder / "config.yaml"
        if not own.is_file() and not arguments.config:
            raise UserError(
                f"There is no run to resume in {folder}: it has no config.yaml. Give the folder of a run, or "
                "the YAML file with --config."
            )
        location = folder.absolute()
        config, faults = read_config(arguments.config or own, overrides)
        config.run.output_dir, config.run.name = location.parent, location.name
        return config, faults, folder
    if arguments.config is None:
        raise UserError(
            "A run needs settings. Give a YAML file with --config, or a run to continue with --resume "
            "RUN_FOLDER. `spell train --help` lists all settings."
        )
    config, faults = read_config(arguments.config, overrides)
    return config, faults, None if arguments.resume is None else config.run.output_dir / config.run.name


def _overrides(rest: Sequence[str]) -> list[str]:
    """`--a.b=c` and `--a.b c` as `a.b=c`; a switch without a value stays as it is, to be reported."""
    overrides: list[str] = []
    for word in rest:
        if word.startswith("--"):
            overrides.append(word.removeprefix("--"))
        elif overrides and "=" not in overrides[-1]:
            overrides[-1] += f"={word}"
        else:
            raise UserError(f"Unexpected argument {word!r}. Settings are written --SECTION.KEY=VALUE.")
    return overrides


def _rank() -> int:
    if launched_processes() is None:
        return 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _launch(config: Config, argv: Sequence[str]) -> int:
    """Run this command line in several processes on this machine; the exit status of the first to fail."""
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes say what went wrong. The launcher would add its own reports and stack traces.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.training.threads))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.training.parallel.processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=f"spell-{os.getpid()}",
        max_restarts=0,
        local_addr="127.0.0.1",
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "spell_megatron", *argv)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # negative: a signal's number
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _outlook(config: Config, resume: Path | None, warnings: Sequence[str]) -> list[str]:
    """What a run would do, in a few lines."""
    import torch

    from spell_megatron.preflight import checkpoint_bytes
    from spell_megatron.rollout.engines import server_command
    from spell_megatron.selfplay.documents import load_clusters
    from spell_megatron.training.architecture import architecture, load_hf_config

    play, rollout, parallel = config.selfplay, config.rollout, config.training.parallel
    cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    hf_config = load_hf_config(config.model.path)
    arch = architecture(hf_config)
    clusters = load_clusters(config.data.documents)
    processes = launched_processes() or parallel.processes
    replicas = processes // (parallel.tensor * parallel.pipeline * parallel.context)
    experts = f", {arch.experts} experts" if arch.experts else ""
    lines = [
        "Plan",
        f"run folder   {config.run.output_dir / config.run.name} ({'continued' if resume else 'new'})",
        f"policy       {hf_config.model_type}, {arch.layers} layers, hidden {arch.hidden}{experts}, "
        f"vocabulary {arch.vocabulary}, {config.model.dtype}",
        f"documents    {sum(len(c.documents) for c in clusters)} in {len(clusters)} clusters",
        f"trainer      {'CPU' if cpu else 'CUDA'}, {processes} process(es), {replicas} data-parallel",
        f"updates      {config.run.steps}, each of {play.groups} groups x {play.group_size} answers = "
        f"{play.groups * play.group_size} responder rows, plus questions and judgments",
        f"checkpoints  every {config.checkpoint.every} updates, "
        f"{checkpoint_bytes(config.model.path) / 1e9:.2f} GB each, the last {config.checkpoint.keep} kept",
    ]
    if rollout.urls:
        lines.append(f"engines      running at {', '.join(rollout.urls)}")
    else:
        command = server_command(config, rollout.base_port or 0, "gloo" if cpu else "nccl")
        port = "" if rollout.base_port else " (port 0: a free one)"
        lines += [f"engines      {rollout.replicas} started here{port}, each by", "  " + shlex.join(command)]
    return lines + [f"warning: {warning}" for warning in warnings]


# ----------------------------------------------------------------------------------------- launch


def _add_launch(commands) -> None:
    from spell_megatron.cluster.settings import Cluster

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
        epilog=_settings_help(Cluster, "settings of the cluster's file, which cluster.KEY=VALUE overrides:"),
    )
    add = parser.add_argument
    _add_config(parser, required=True)
    add("--cluster", type=Path, metavar="FILE", help="YAML file that describes the cluster (see below)")
    add("--executor", choices=("slurm", "local"), default="slurm", help="local: run here, without Slurm")
    add("--resume", action="store_true", help="continue the run from its newest checkpoint")
    add("--dry-run", action="store_true", help="print batch script, settings and memory plan, and submit nothing")
    parser.set_defaults(command=_submit)


def _submit(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.cluster.launch import launch

    # NeMo-Run's overrides have no dashes
    words = [f"--{word}" if word.startswith(("cluster.", "run.executor.")) else word for word in rest]
    return launch(
        arguments.config,
        arguments.cluster,
        _overrides(words),
        on_slurm=arguments.executor == "slurm",
        resume=arguments.resume,
        dry_run=arguments.dry_run,
    )


# ---------------------------------------------------------------------------------------- engines


def _add_engines(commands) -> None:
    parser = commands.add_parser(
        "engines",
        help="start engines on a node of a cluster's job (`spell launch` writes this command)",
        allow_abbrev=False,
        description="Start this node's share of the rollout.replicas engines of a run, tell its trainer by the "
        "rendezvous, and serve until this process is ended. srun starts one such process on each engine node.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="YAML file of the run's settings")
    _add_rendezvous(parser, required=True)
    parser.add_argument("--colocated", action="store_true", help="they share their GPUs with the trainer")
    parser.set_defaults(command=_engines)


def _engines(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    import signal

    from spell_megatron.cluster.rendezvous import Rendezvous
    from spell_megatron.rollout.engines import Engines

    # The default action would end this process without the engines' having been stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the trainer, which saves a checkpoint
    node = _rank()
    os.environ.pop("SLURM_STEP_ID", None)  # the processes of this step are no trainers
    config, faults = read_config(arguments.config)
    raise_faults(faults, str(arguments.config))
    rendezvous = Rendezvous(arguments.rendezvous, max(1, arguments.engine_nodes))
    logs = config.run.output_dir / config.run.name / "logs"
    Engines.serve(config, logs, rendezvous, node, arguments.colocated)
    return 0


# --------------------------------------------------------------------------------- status and stop


def _add_status(commands) -> None:
    parser = commands.add_parser(
        "status",
        help="tell how a run is doing",
        description="Tell how a run is doing: steps, speed, what it is at, engines, its job's state, where its logs\n"
        "are. Works wherever the run's folder is seen. Exit status 3: it failed, or gives no sign of life.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="run.output_dir/run.name")
    parser.set_defaults(command=_status)


def _status(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.reporting import status

    return _tell(arguments.run, status.read(arguments.run))


def _tell(run: Path, now: dict[str, Any]) -> int:
    """Print how a run is doing; the exit status."""
    from spell_megatron.reporting import status

    print("\n".join(status.describe(run, now)))
    return 3 if now["state"] == "failed" or status.silent(now) else 0


def _add_stop(commands) -> None:
    parser = commands.add_parser(
        "stop",
        help="have a run save a checkpoint and stop",
        description="Ask a run to stop, wherever it runs, and wait until it has. It gives up a rollout that is under\n"
        "way or ends its update, saves a checkpoint, and ends; go on with `spell train --resume RUN_FOLDER`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="run.output_dir/run.name")
    parser.set_defaults(command=_stop)


def _stop(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.reporting import status

    return _tell(arguments.run, status.stop(arguments.run))


# --------------------------------------------------------------------------------------- evaluate


def _add_evaluate(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="answer benchmarks with a policy and score the answers",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spell evaluate --model FOLDER --benchmark NAME[=PATH] [--benchmark ...] --out FOLDER\n"
        "                      [--samples N] [--max-input N] [--max-output N] [--limit N]\n"
        "                      [--judge URL --judge-model NAME] [--server URL --server-model NAME [--chat]]\n"
        "                      [--config FILE ...] [--SECTION.KEY=VALUE ...]\n"
        "       spell evaluate --answers FILE --benchmark NAME[=PATH] [--benchmark ...] --out FOLDER\n"
        "                      [--judge URL --judge-model NAME]",
        description="Answer benchmarks, or questions of your own, several times each; score the answers by rule and,\n"
        "with --judge, by another model; write scores.json, scores.md and pass_at_k.svg. Run again with the same\n"
        "--out it goes on where it was: nothing is generated or judged twice. See docs/evaluation.md.",
        epilog="Of the settings of a run (`spell train --help` explains them) those of rollout, model.dtype,\n"
        "selfplay.prompts, run.seed and run.device count, in the YAML files of --config and as --SECTION.KEY=VALUE.",
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="Hugging Face checkpoint, or a step of a run (RUN/checkpoints/step_000012); with --server only its "
        "tokenizer is used",
    )
    add(
        "--benchmark",
        action="append",
        required=True,
        metavar="NAME[=PATH]",
        help="docmath, frames, 2wikimqa, hotpotqa, musique, longbench-v2, from the Hugging Face hub or from PATH, a "
        "file or folder as the hub has it; `paper`: all six; any other NAME: a JSONL file of your own questions",
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="where answers, judgments and scores are kept")
    add("--answers", type=Path, metavar="FILE", help="score these answers (JSONL: benchmark, id, text)")
    for flag, default, meaning in (
        ("--samples", 8, "answers per question"),
        ("--max-input", 16384, "tokens of a prompt; a longer one loses its middle"),
        ("--max-output", 4096, "tokens of an answer"),
        ("--limit", None, "use only the first questions of each benchmark"),
        ("--judge-tokens", 8192, "tokens of a judgment"),
    ):
        shown = "" if default is None else f" (default {default})"
        add(flag, type=_positive, default=default, metavar="N", help=meaning + shown)
    for name, role in (("judge", "judges what the rule calls wrong"), ("server", "answers, instead of engines")):
        add(f"--{name}", metavar="URL", help=f"OpenAI-compatible server that {role} (http://HOST:8000/v1)")
        add(f"--{name}-model", metavar="NAME", help="name of its model")
        add(
            f"--{name}-key-env",
            default="OPENAI_API_KEY",
            metavar="VARIABLE",
            help="environment variable with its key, if it wants one (default OPENAI_API_KEY)",
        )
    add("--judge-prompt", type=Path, metavar="FILE", help="with {{question}}, {{prediction}} and {{reference}}")
    add("--judge-all", action="store_true", help="judge also what is right by rule")
    add("--chat", action="store_true", help="--server: send text to /chat/completions, not token ids to /completions")
    _add_config(parser)
    parser.set_defaults(command=_evaluate)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _evaluate(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    config = _evaluation_config(arguments, _overrides(rest))
    _quiet_libraries()
    from spell_megatron import evaluate
    from spell_megatron.evaluation.benchmarks import BENCHMARKS
    from spell_megatron.evaluation.judge import PROMPT
    from spell_megatron.evaluation.results import markdown
    from spell_megatron.reporting.progress import Progress

    def endpoint(name: str) -> evaluate.Endpoint | None:
        url, model = getattr(arguments, name), getattr(arguments, f"{name}_model")
        if (url is None) != (model is None):
            raise UserError(f"--{name} and --{name}-model belong together: give both, or neither.")
        key = os.environ.get(getattr(arguments, f"{name}_key_env"))
        return evaluate.Endpoint(url, model, key) if url else None

    benchmarks: dict[str, Path | None] = {}
    for word in arguments.benchmark:
        name, equals, path = word.partition("=")
        for each in BENCHMARKS if word == "paper" else (name,):
            if each in benchmarks or each in ("", "paper") or (equals and not path):
                raise UserError(
                    f"--benchmark {word} cannot be used: {each!r} is given twice, or a name or file is missing. Write "
                    "each name once, as NAME or NAME=PATH; `paper` takes no path."
                )
            benchmarks[each] = Path(path).expanduser() if equals else None
    if arguments.chat and not arguments.server:
        raise UserError("--chat is about --server, which is not given. Leave it out, or name a server.")
    progress = Progress()
    numbers = evaluate.evaluate(
        evaluate.Evaluation(
            config=config,
            benchmarks=benchmarks,
            folder=arguments.out,
            samples=arguments.samples,
            limit=arguments.limit,
            answers=arguments.answers,
            server=endpoint("server"),
            chat=arguments.chat,
            judge=endpoint("judge"),
            judge_prompt=arguments.judge_prompt or PROMPT,
            judge_tokens=arguments.judge_tokens,
            judge_everything=arguments.judge_all,
        ),
        progress,
    )
    progress.line(markdown(numbers))
    progress.line(f"written: {arguments.out}/scores.json, scores.md, pass_at_k.svg")
    return 0


def _evaluation_config(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """Settings of engines, sampling and prompts; --model and the limits stand above those of a file."""
    if (arguments.model is None) == (arguments.answers is None):
        raise UserError("Give a model to evaluate with --model FOLDER, or answers to score with --answers FILE.")
    model = arguments.model or Path("none")
    if (model / "hf" / "config.json").is_file():  # a step of a run
        model = model / "hf"
    if not (model / "config.json").is_file() and not arguments.server and not arguments.answers:
        raise UserError(f"There is no model in {model}: it has no config.json. Give --model a Hugging Face checkpoint.")
    overrides = [
        *overrides,
        f"model.path={json.dumps(str(model))}",
        f"rollout.sampling.max_prompt_tokens={arguments.max_input}",
        f"rollout.sampling.max_response_tokens={arguments.max_output}",
        "rollout.sampling.max_verdict_tokens=null",
        "rollout.sampling.max_no_context_tokens=null",
    ]
    config, faults = read_config(arguments.config or [], overrides)
    # what only training needs may be missing
    faults = [fault for fault in faults if fault.keys[0].partition(".")[0] in ("model", "rollout", "run", "selfplay")]
    raise_faults(faults, " and ".join(map(str, arguments.config or ["the command line"])))
    return config


# ------------------------------------------------------------------------------------------- plan


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="tell whether a run fits its GPUs, and how long a step takes",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spell plan --config FILE [--config FILE ...] [--gpu NAME] [--gpus-per-node N] [--SECTION.KEY=VALUE ...]",
        description="Tell whether training.parallel.processes trainer GPUs and the engines' GPUs are enough for a\n"
        "run, how long a step takes, and which layout would be the fastest that fits. Needs neither GPUs nor\n"
        "weights: of model.path only config.json is read. Exit status 2: it does not fit.",
        epilog=_settings_help(),
    )
    _add_config(parser, required=True)
    add = parser.add_argument
    add("--gpu", default="H100-80G", metavar="NAME", help="A100-80G, H100-80G (default), H200-141G or B200")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    overrides = _overrides(rest)
    config, faults = read_config(arguments.config, overrides)
    raise_faults_of_files(faults, arguments.config, overrides)
    _quiet_libraries()
    from spell_megatron import planner
    from spell_megatron.reporting.progress import Progress
    from spell_megatron.training.architecture import load_hf_config

    if arguments.gpu not in planner.GPUS:
        raise UserError(f"--gpu {arguments.gpu} is not known. Known are {', '.join(planner.GPUS)}.")
    if arguments.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node is {arguments.gpus_per_node}; it must be 1 or more.")
    model = planner.Model.of(load_hf_config(config.model.path))
    processes = config.training.parallel.processes
    task = model, config, processes, planner.GPUS[arguments.gpu], planner.Assumptions(arguments.gpus_per_node)
    plan = planner.plan(*task)
    print("\n".join(planner.report(model, config, plan, arguments.gpu, task[-1])))
    best = None
    with Progress().stage("other layouts") as advance:
        for number, tried in enumerate(planner.cheapest(*task)):
            advance(number + 1, planner.TRIES)
            best = tried if tried.fits else None
    if best is None:
        print(f"proposal  no layout on {processes} GPUs fits: use more of them, or shorter rows")
    elif best.times.update < plan.times.update or not plan.fits:
        print(
            f"proposal  {planner.describe(best)}: {best.memory.total / 2**30:.2f} GiB, updates "
            f"{plan.times.update / best.times.update:.2f} times as fast"
        )
    else:
        print("proposal  none: no other layout is faster and fits")
    return 0 if plan.fits else 2


# ---------------------------------------------------------------------------------------- prepare


def _add_prepare(commands) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn files of text into document clusters",
        allow_abbrev=False,
        description="Turn files and folders of text (.txt, .md, .jsonl, .parquet) into clusters of related "
        "documents, the input of `spell train`. Files that share a folder make a cluster; other documents "
        "are grouped by similarity. The same inputs and options give the same file; a run that was stopped goes "
        "on where it was when it is started again.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="parquet (or .jsonl) file to write")
    groups: dict[str, Any] = {}
    for option in fields(Options):
        group = option.metadata["group"]
        add = groups.setdefault(group, parser.add_argument_group(group)).add_argument
        flag, meaning = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        if option.type == "bool":
            add(flag, action="store_true", help=meaning)
        elif option.name == "decontaminate":
            add(flag, action="append", type=Path, default=[], metavar="FILE", help=meaning)
        elif option.name == "tasks":
            add(flag, type=lambda given: given.split(","), default=[], metavar="TASK[,TASK]", help=meaning)
        else:
            kind = {"int": int, "float": float, "str": str, "Path": Path}[option.type.removesuffix(" | None")]
            if option.default not in ("", None):
                meaning += f" (default {option.default})"
            add(flag, type=kind, default=option.default, metavar=option.metadata["metavar"], help=meaning)
    parser.set_defaults(command=_prepare)


def _prepare(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    given = {option.name: getattr(arguments, option.name) for option in fields(Options)}
    given |= {name: tuple(given[name]) for name in ("decontaminate", "tasks")}
    options = Options(**given)
    from spell_megatron.corpus.prepare import prepare

    summary = prepare(arguments.inputs, arguments.out, options)
    print(summary)
    return 0


# ---------------------------------------------------------------------------------------- convert


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn a Hugging Face checkpoint into a Megatron one, and back",
        allow_abbrev=False,
        description="Turn a Hugging Face checkpoint into a Megatron distributed checkpoint, and back, tensor by "
        "tensor: memory stays small whatever the model's size. The result appears when it is complete.",
    )
    ways = parser.add_subparsers(metavar="WAY", required=True)
    forth = ways.add_parser("hf-to-megatron", help="safetensors to a distributed checkpoint", allow_abbrev=False)
    back = ways.add_parser(
        "megatron-to-hf",
        help="a distributed checkpoint, or a step of a run, to safetensors",
        allow_abbrev=False,
    )
    for way, source, target in ((forth, "hf", "megatron"), (back, "megatron", "hf")):
        way.add_argument(f"--{source}", required=True, type=Path, metavar="IN", help="folder to read")
        way.add_argument(f"--{target}", required=True, type=Path, metavar="OUT", help="folder to make")
        way.add_argument("--verify", action="store_true", help="afterwards compare every tensor of both, bit by bit")
        way.set_defaults(command=_convert, way=f"{source}-to-{target}")
    for flag, meaning in (
        ("tp", "tensor"),
        ("pp", "pipeline"),
        ("ep", "expert"),
        ("etp", "expert-tensor"),
    ):
        forth.add_argument(
            f"--{flag}",
            type=int,
            default=1,
            metavar="N",
            help=f"{meaning}-parallel size that the pieces are cut for (any other one loads them too; default 1)",
        )


def _convert(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    _quiet_libraries()
    from spell_megatron.config import ParallelConfig
    from spell_megatron.reporting.progress import Progress
    from spell_megatron.weights import convert

    sizes = {flag: getattr(arguments, flag, 1) for flag in ("tp", "pp", "ep", "etp")}
    for flag, size in sizes.items():
        if size < 1:
            raise UserError(f"--{flag} is {size}; it must be 1 or more.")
    progress = Progress()
    with progress.stage("converting") as advance:
        if arguments.way == "hf-to-megatron":
            layout = ParallelConfig(
                tensor=sizes["tp"], pipeline=sizes["pp"], expert=sizes["ep"], expert_tensor=sizes["etp"]
            )
            convert.hf_to_megatron(arguments.hf, arguments.megatron, layout, advance)
            out = arguments.megatron
        else:
            convert.megatron_to_hf(arguments.megatron, arguments.hf, advance)
            out = arguments.hf
    if arguments.verify:
        with progress.stage("comparing") as advance:
            count = convert.compare(arguments.megatron, arguments.hf, advance)
        print(f"{out}: done; all {count} tensors are the same in both")
    else:
        print(f"{out}: done")
    return 0


# ----------------------------------------------------------------------------------------- report


def _add_report(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="make a page of plots and transcripts of runs, and of scores",
        allow_abbrev=False,
        description="Make one HTML page about one or several runs: rewards, accuracy, what becomes of questions, "
        "curriculum, verifier, training, speed, and transcripts to browse; and about what `spell evaluate` found: the "
        "paper's table, pass@k, each benchmark. It needs no network; runs may still be going.",
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="of a run, such as runs/quickstart, or of an evaluation (the --out of spell evaluate)",
    )
    add("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html")
    for flag, default, meaning in (
        ("--transcripts", 200, "most questions per run to show with answers and judgments; 0 for none"),
        ("--text-chars", 2000, "longer texts in them lose their middle; judgments are cut to a quarter of it"),
    ):
        add(flag, type=int, default=default, metavar="N", help=f"{meaning} (default {default})")
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace, rest: Sequence[str], argv: Sequence[str]) -> int:
    from spell_megatron.reporting.progress import Progress
    from spell_megatron.reporting.report import write_report

    if arguments.transcripts < 0:
        raise UserError(f"--transcripts is {arguments.transcripts}; it must be 0 or more.")
    if arguments.text_chars < 100:
        raise UserError(f"--text-chars is {arguments.text_chars}; it must be 100 or more.")
    with Progress().stage("reading transcripts") as advance:
        summary = write_report(arguments.folders, arguments.out, arguments.transcripts, arguments.text_chars, advance)
    print(summary)
    return 0
