"""`spell evaluate`: answer benchmarks and score the answers."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spell_megatron.cli.arguments import add_command, add_config, add_number, overrides_of, quiet_libraries
from spell_megatron.cli.policy_folder import policy_folder
from spell_megatron.config.reading import noted_prompt_date, read_config
from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError

if TYPE_CHECKING:
    from spell_megatron.evaluation.evaluate import Endpoint


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        run,
        help="answer benchmarks with a policy and score the answers",
        usage="spell evaluate --model FOLDER --benchmark NAME[=PATH] [--benchmark ...] --out FOLDER\n"
        "                      [--samples N] [--max-input N] [--max-output N] [--limit N]\n"
        "                      [--judge URL --judge-model NAME] [--server URL --server-model NAME [--chat]]\n"
        "                      [--config FILE ...] [--SECTION.KEY=VALUE ...]\n"
        "       spell evaluate --answers FILE --benchmark NAME[=PATH] [--benchmark ...] --out FOLDER\n"
        "                      [--judge URL --judge-model NAME]",
        description="Answer benchmarks, or questions of your own, several times each. Score the answers by rule and, "
        "with --judge, by another model. Write scores.json, scores.md and pass_at_k.svg. The same command with the "
        "same --out continues where it stopped: nothing is generated or judged twice. See docs/evaluation.md.",
        epilog="These settings of a run count, in the YAML files of --config and as --SECTION.KEY=VALUE: rollout,\n"
        "model.dtype, selfplay.prompts, run.seed and run.device. `spell train --help` explains them.",
        takes_settings=True,
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="Hugging Face checkpoint, a model of the hub (ORG/NAME, ORG/NAME@REVISION), or a step of a run "
        "(RUN/checkpoints/step_000012); with --server only its tokenizer is used",
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
    add_number(add, "--samples", 8, "answers per question")
    add_number(add, "--max-input", 16384, "longest prompt in tokens; a longer one loses its middle")
    add_number(add, "--max-output", 4096, "longest answer in tokens")
    add_number(add, "--limit", None, "use only the first N questions of each benchmark")
    add_number(add, "--judge-tokens", 8192, "longest judgment in tokens")
    for name, role in (("judge", "judges answers that are wrong by rule"), ("server", "answers, instead of engines")):
        add(f"--{name}", metavar="URL", help=f"OpenAI-compatible server that {role} (http://HOST:8000/v1)")
        add(f"--{name}-model", metavar="NAME", help="name of that server's model")
        add(
            f"--{name}-key-env",
            default="OPENAI_API_KEY",
            metavar="VARIABLE",
            help="environment variable that holds that server's key (default OPENAI_API_KEY)",
        )
    add("--judge-prompt", type=Path, metavar="FILE", help="prompt with {{question}}, {{prediction}} and {{reference}}")
    add("--judge-all", action="store_true", help="also judge answers that are right by rule")
    add("--aliases", action="store_true", help="any reference answer of a question counts, not only the first")
    add("--chat", action="store_true", help="--server: send text to /chat/completions, not token ids to /completions")
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    config = _evaluation_config(arguments, overrides_of(arguments.rest))
    if arguments.chat and not arguments.server:
        raise UserError("--chat is an option of --server, which is not given. Leave it out, or name a server.")
    quiet_libraries()
    from spell_megatron.evaluation import evaluate
    from spell_megatron.evaluation.judge import PROMPT
    from spell_megatron.evaluation.markdown import markdown
    from spell_megatron.monitoring.progress import Progress

    progress = Progress()
    numbers = evaluate.evaluate(
        evaluate.Evaluation(
            config=config,
            benchmarks=_benchmarks(arguments.benchmark),
            folder=arguments.out,
            samples=arguments.samples,
            limit=arguments.limit,
            answers=arguments.answers,
            server=_endpoint(arguments, "server"),
            chat=arguments.chat,
            judge=_endpoint(arguments, "judge"),
            judge_prompt=arguments.judge_prompt or PROMPT,
            judge_tokens=arguments.judge_tokens,
            judge_everything=arguments.judge_all,
            aliases=arguments.aliases,
        ),
        progress,
    )
    progress.line(markdown(numbers))
    progress.line(f"written: {arguments.out}/scores.json, scores.md, pass_at_k.svg")
    return 0


def _endpoint(arguments: argparse.Namespace, name: str) -> Endpoint | None:
    """The server that --judge or --server names."""
    from spell_megatron.evaluation.evaluate import Endpoint

    url, model = getattr(arguments, name), getattr(arguments, f"{name}_model")
    if (url is None) != (model is None):
        raise UserError(f"--{name} and --{name}-model belong together: give both, or neither.")
    key = os.environ.get(getattr(arguments, f"{name}_key_env"))
    return Endpoint(url, model, key) if url else None


def _benchmarks(words: Sequence[str]) -> dict[str, Path | None]:
    """Benchmarks with their files, from NAME, NAME=PATH or `paper`."""
    from spell_megatron.evaluation.results import COLUMNS

    benchmarks: dict[str, Path | None] = {}
    for word in words:
        name, equals, path = word.partition("=")
        paper = itertools.chain.from_iterable(COLUMNS.values())
        for each in paper if word == "paper" else (name,):
            if each in benchmarks or each in ("", "paper") or (equals and not path):
                raise UserError(
                    f"--benchmark {word} cannot be used: {each!r} is given twice, or a name or file is missing. Write "
                    "each name once, as NAME or NAME=PATH; `paper` takes no path."
                )
            benchmarks[each] = Path(path).expanduser() if equals else None
    return benchmarks


def _evaluation_config(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """Settings of engines, sampling and prompts. --model and the limits override the settings of a file."""
    if (arguments.model is None) == (arguments.answers is None):
        raise UserError("Give a model to evaluate with --model FOLDER, or answers to score with --answers FILE.")
    weights = arguments.server is None and arguments.answers is None
    model, of_run = policy_folder(arguments.model or Path("none"), weights)
    overrides = [
        *overrides,
        f"model.path={json.dumps(str(model))}",
        f"rollout.sampling.max_prompt_tokens={arguments.max_input}",
        f"rollout.sampling.max_response_tokens={arguments.max_output}",
        "rollout.sampling.max_verdict_tokens=null",
        "rollout.sampling.max_no_context_tokens=null",
    ]
    reading = read_config(arguments.config, overrides)
    reading.need("model", "rollout", "run", "selfplay")  # what only training needs may be missing
    config = reading.checked()
    if config.model.prompt_date is None and of_run:
        config.model.prompt_date = noted_prompt_date(of_run)
    return config
