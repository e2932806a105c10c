"""`spell ask`: put questions about documents to a policy."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from spell_megatron.cli.arguments import add_command, add_config, add_number, loose_words, overrides_of, quiet_libraries
from spell_megatron.cli.policy_folder import policy_folder
from spell_megatron.config.reading import noted_prompt_date, read_config
from spell_megatron.config.schema import Config
from spell_megatron.config.selfplay_sections import Task
from spell_megatron.errors import UserError

if TYPE_CHECKING:
    from spell_megatron.evaluation.policies import Policy
    from spell_megatron.selfplay.prompts import PromptSet

_LONGEST_PROMPT, _LONGEST_ANSWER = 16384, 4096
"""Limits of a model that is no step of a run, if it has the positions."""


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "ask",
        run,
        help="put questions about documents to a policy",
        usage='spell ask MODEL --documents PATH ["QUESTION" ...] [--samples N] [--SECTION.KEY=VALUE ...]',
        description="Put questions about documents to a policy, with the responder's prompt of training, and print its "
        "answers. Without a question they are read from the standard input, one a line. A step of a run brings its "
        "run's prompts, limits and sampling.",
        takes_settings=True,
    )
    add = parser.add_argument
    add(
        "model",
        type=Path,
        metavar="MODEL",
        help="step of a run (RUN/checkpoints/step_000012), checkpoint's folder, or ORG/NAME of the hub",
    )
    add(
        "questions",
        nargs="*",
        default=[],  # or argparse would name them among the arguments that are missing
        metavar="QUESTION",
        help="a question; several are answered one after the other",
    )
    add(
        "--documents",
        type=Path,
        action="append",
        required=True,
        metavar="PATH",
        help="text file, folder of text files or, with --cluster, documents file; may be given again",
    )
    add("--cluster", metavar="ID", help="take the documents of this cluster of a documents file (.parquet, .jsonl)")
    add(
        "--task",
        choices=get_args(Task),
        default="doc_general_qa",
        help="kind of answer: docmath_qa a number, doc_general_qa a short text (default), doc_mc a letter",
    )
    add_number(add, "--samples", 1, "answers to each question")
    add_number(add, "--max-input", None, "longest prompt in tokens; a longer one loses its middle")
    add_number(add, "--max-output", None, "longest answer in tokens")
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    loose, settings = loose_words(arguments.rest)  # argparse takes no positional word behind an option
    documents = _documents(arguments.documents, arguments.cluster)
    config = _config(arguments, settings)
    quiet_libraries()
    from spell_megatron.evaluation.policies import engine_policy
    from spell_megatron.monitoring.progress import Progress
    from spell_megatron.preflight.evaluation import check_evaluation
    from spell_megatron.rollout.engines import Engines
    from spell_megatron.selfplay.prompts import PromptSet
    from spell_megatron.tokenizer import PolicyTokenizer

    prompts = PromptSet.load(config.selfplay.prompts)
    tokenizer = PolicyTokenizer(config.model.path, config.model.prompt_date)
    check_evaluation(config)
    print(f"documents: {', '.join(name for name, _ in documents)}")
    logs = Path(tempfile.mkdtemp(prefix="spell-ask-"))
    with Progress().stage("starting an engine"):
        engines = Engines.open(
            config.model,
            config.rollout,
            logs,
            device=config.run.device,
            seed=config.run.seed,
            routing=False,
            trainers=0,
        )

    async def answer() -> None:
        async with engine_policy(engines, tokenizer, config.rollout) as policy:
            for question in _questions([*arguments.questions, *loose]):
                await _answer(policy, prompts, question, [text for _, text in documents], arguments, config.run.seed)

    with engines:
        asyncio.run(answer())
    shutil.rmtree(logs)  # after a failure they stay, to be looked into
    return 0


async def _answer(
    policy: Policy,
    prompts: PromptSet,
    question: str,
    documents: Sequence[str],
    arguments: argparse.Namespace,
    seed: int,
) -> None:
    """Print the answers to a question."""
    from spell_megatron.selfplay.parsing import parse_answer
    from spell_megatron.selfplay.seeds import derive_seed

    prompt, tokens, cut = policy.prompt(prompts.responder(arguments.task, question, documents))
    print(f"\n{question}\n(prompt of {tokens:,} tokens{', which has lost its middle' if cut else ''})")
    samples = range(arguments.samples)
    seeds = [derive_seed(seed, "ask", question, str(index)) for index in samples]
    replies = await asyncio.gather(*(policy.sample(prompt, own, affinity=question) for own in seeds))
    for number, reply in enumerate(replies, start=1):
        stated = parse_answer(arguments.task, reply.text, reply.cut)
        end = " (cut off: raise --max-output)" if reply.cut else ""
        print(f"[{number}] {reply.text.strip()}{end}\n    answer: {'none is stated' if stated is None else stated}")
    sys.stdout.flush()


def _questions(given: Sequence[str]) -> Iterator[str]:
    """The questions of the command line, or else of the standard input."""
    lines: Iterable[str] = given or sys.stdin
    yield from (line.strip() for line in lines if line.strip())


def _documents(paths: Sequence[Path], cluster: str | None) -> list[tuple[str, str]]:
    """(name, text) of the documents to read.

    Raises:
        UserError: there are none, one cannot be read, or there is no such cluster.
    """
    if missing := [str(path) for path in paths if not path.exists()]:
        raise UserError(f"There is no file or folder {', '.join(missing)}. Give --documents texts, or folders of them.")
    if cluster is not None:
        return _of_cluster(paths, cluster)
    from spell_megatron.corpus.reading import TABLE_SUFFIXES, Counts, find_files, read_documents

    if tables := [str(path) for path in paths if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES]:
        raise UserError(f"{tables[0]} is a table. Name the cluster in it whose documents are meant, with --cluster ID.")
    counts = Counts()
    files = [file for file in find_files(paths, [], counts) if not file.is_table]
    documents = [
        (d.id, d.text) for file in files for d in read_documents(file, "text", "", 0.0, counts) if d.text.strip()
    ]
    if not documents:
        reasons = "; ".join([*counts.notes, *(f"{n} files {why}" for why, n in counts.skipped_files.items())])
        raise UserError(f"There are no documents in {', '.join(map(str, paths))}{f' ({reasons})' if reasons else ''}.")
    return documents


def _of_cluster(paths: Sequence[Path], cluster: str) -> list[tuple[str, str]]:
    from spell_megatron.selfplay.documents import load_clusters

    known = {one.id: one for path in paths for one in load_clusters(path)}
    if cluster not in known:
        some = ", ".join(list(known)[:5])
        raise UserError(f"There is no cluster {cluster!r} in {', '.join(map(str, paths))}. The first are {some}.")
    return list(zip(known[cluster].document_ids, known[cluster].documents, strict=True))


def _config(arguments: argparse.Namespace, settings: Sequence[str]) -> Config:
    """Settings of the engine, sampling and prompts: the run's if the model is a step of one, then those given."""
    model, of_run = policy_folder(arguments.model)
    files = [*([of_run] if of_run else ()), *(arguments.config or ())]
    limits = _limits(model) if of_run is None else {}
    limits |= {"max_prompt_tokens": arguments.max_input} if arguments.max_input else {}
    limits |= {"max_response_tokens": arguments.max_output} if arguments.max_output else {}
    overrides = [
        f"model.path={json.dumps(str(model))}",
        "rollout.urls=[]",
        "rollout.replicas=1",
        "rollout.base_port=null",
        *(f"rollout.sampling.{name}={value}" for name, value in limits.items()),
        "rollout.sampling.max_verdict_tokens=null",
        "rollout.sampling.max_no_context_tokens=null",
        *overrides_of(settings),
    ]
    reading = read_config(files, overrides)
    reading.need("model", "rollout", "run", "selfplay")  # what only training needs may be missing
    config = reading.checked()
    if config.model.prompt_date is None and of_run:
        config.model.prompt_date = noted_prompt_date(of_run)
    return config


def _limits(model: Path) -> dict[str, int]:
    """Limits that a model has the positions for."""
    from spell_megatron.preflight.evaluation import positions

    room = positions(model) or _LONGEST_PROMPT + _LONGEST_ANSWER
    answer = min(_LONGEST_ANSWER, max(1, room // 4))
    return {"max_prompt_tokens": min(_LONGEST_PROMPT, max(1, room - answer)), "max_response_tokens": answer}
