"""`spell evaluate`: answer benchmarks, have the answers judged, and write the scores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.evaluation import results
from spell_megatron.evaluation.answers import read_answers
from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.evaluation.generate import fingerprint, generate, missing
from spell_megatron.evaluation.journal import Journal
from spell_megatron.evaluation.judge import PROMPT, Judge, judge_all, load_prompt, verdicts
from spell_megatron.evaluation.load_benchmark import load_benchmark
from spell_megatron.evaluation.markdown import markdown
from spell_megatron.evaluation.openai_server import OpenAIServer
from spell_megatron.evaluation.plot import plot
from spell_megatron.evaluation.policies import Policy, engine_policy, server_policy
from spell_megatron.files import check_writable, write_text
from spell_megatron.hub import name_of
from spell_megatron.monitoring.progress import Progress
from spell_megatron.plural import counted
from spell_megatron.preflight.evaluation import check_evaluation
from spell_megatron.processes.folder_lock import FolderLock
from spell_megatron.rollout.engines import Engines
from spell_megatron.rollout.wire import GenerationError
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.tokenizer import PolicyTokenizer


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible server; `key` is sent to it, if there is one."""

    url: str
    model: str
    key: str | None


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and how.

    Attributes:
        config: model.path, the engines (rollout), sampling with the input and output limits (rollout.sampling), the
            prompt set (selfplay.prompts) and the seed (run.seed).
        benchmarks: name -> file or folder, None: from the hub (see `load_benchmark`).
        folder: where everything is kept. A later call with the same folder continues from there.
        samples: answers per question.
        limit: only the first questions of each benchmark.
        answers: JSONL file of answers from elsewhere to score, instead of generating any (see `answers.read_answers`).
        server: answer with this server instead of engines; model.path is then only the tokenizer's folder.
        chat: use the server's chat route.
        judge: who judges what the rule calls wrong; None: rule alone.
        judge_prompt: file with the judge's prompt.
        judge_tokens: longest judgment.
        judge_everything: have answers judged too that are right by rule.
        aliases: any of a question's reference answers counts, not only the first.
    """

    config: Config
    benchmarks: Mapping[str, Path | None]
    folder: Path
    samples: int = 8
    limit: int | None = None
    answers: Path | None = None
    server: Endpoint | None = None
    chat: bool = False
    judge: Endpoint | None = None
    judge_prompt: Path = PROMPT
    judge_tokens: int = 8192
    judge_everything: bool = False
    aliases: bool = False


OUTPUTS = ("evaluation.json", "samples.jsonl", "judgments.jsonl", "scores.json", "scores.md", "pass_at_k.svg")

Questions = Mapping[str, Sequence[BenchmarkQuestion]]
"""Benchmark -> its questions."""


def evaluate(evaluation: Evaluation, progress: Progress) -> dict[str, Any]:
    """Run an evaluation and write scores.json, scores.md and pass_at_k.svg; returns the numbers.

    Raises:
        UserError: for whatever the user can correct. What was generated and judged before stays.
    """
    check_writable(evaluation.folder, OUTPUTS)
    template = load_prompt(evaluation.judge_prompt)
    if not evaluation.answers and not evaluation.server:
        check_evaluation(evaluation.config)
    questions = _questions(evaluation, progress)
    remedy = "Wait until it has ended, or give this one another --out."
    with FolderLock(evaluation.folder, "`spell evaluate`", remedy):
        return _evaluate(evaluation, template, questions, progress)


def _evaluate(evaluation: Evaluation, template: str, questions: Questions, progress: Progress) -> dict[str, Any]:
    """`evaluate` in a folder that no other process writes to."""
    if evaluation.answers:
        every = [question for members in questions.values() for question in members]
        answered = _score(questions, read_answers(evaluation.answers, every))
        settings: dict[str, Any] = {"model": str(evaluation.answers)}
    else:
        _pin_date(evaluation)
        answered = _score(questions, _answer(evaluation, questions, progress))
        settings = _settings(evaluation) | {"samples": evaluation.samples}
    if evaluation.aliases:
        settings["aliases"] = True
    if evaluation.judge:
        settings |= {"judge": evaluation.judge.model, "judge_prompt": fingerprint(template)}
        _judge(evaluation, evaluation.judge, template, answered, progress)
    numbers = results.summarise(answered, settings)
    write_scores(numbers, evaluation.folder)
    return numbers


def write_scores(numbers: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write scores.json, scores.md and pass_at_k.svg; each appears when it is complete. Returns the files."""
    contents = {
        "scores.json": json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
        "scores.md": markdown(numbers),
        "pass_at_k.svg": plot(numbers),
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]


def _questions(evaluation: Evaluation, progress: Progress) -> dict[str, list[BenchmarkQuestion]]:
    questions = {}
    for name, path in evaluation.benchmarks.items():
        with progress.stage(f"reading {name}"):
            questions[name] = load_benchmark(name, path, evaluation.limit)
            if not evaluation.aliases:
                questions[name] = [replace(question, aliases=()) for question in questions[name]]
        progress.line(f"{name}: {counted(len(questions[name]), 'question')}")
    return questions


def _answer(evaluation: Evaluation, questions: Questions, progress: Progress) -> Iterator[dict[str, Any]]:
    """The samples of all questions, from the journal; those that it does not have are generated first."""
    prompts = PromptSet.load(evaluation.config.selfplay.prompts)
    tokenizer = PolicyTokenizer(evaluation.config.model.path, evaluation.config.model.prompt_date)
    every = [question for members in questions.values() for question in members]
    with Journal(evaluation.folder / "samples.jsonl") as journal:
        _check_settings(evaluation.folder / "evaluation.json", _settings(evaluation), journal.empty)
        wanted = missing(prompts, every, evaluation.samples, journal)
        if wanted:
            total = len(every) * evaluation.samples
            with progress.stage("generating", total) as advance:
                _generate(evaluation, prompts, tokenizer, wanted, journal, lambda n: advance(total - len(wanted) + n))
    return (row for row in journal.rows() if row["sample"] < evaluation.samples)  # one at a time: they are long


def _pin_date(evaluation: Evaluation) -> None:
    """The day for chat templates is that of the evaluation's beginning, unless the settings name another one."""
    model = evaluation.config.model
    if model.prompt_date is None:
        noted = _noted_settings(evaluation.folder / "evaluation.json").get("prompt_date")
        model.prompt_date = date.today()
        with suppress(ValueError):  # none is noted, or no day, which is then told as a change
            model.prompt_date = date.fromisoformat(str(noted))


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    """What samples depend on, beside the prompts (which are compared one by one)."""
    config, server = evaluation.config, evaluation.server
    sampling = config.rollout.sampling
    return {
        "model": server.model if server else name_of(config.model.path),
        "by": "engines" if not server else "chat" if evaluation.chat else "completions",
        "max_input": sampling.max_prompt_tokens,
        "max_output": sampling.max_response_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": config.run.seed,
        "prompt_date": str(config.model.prompt_date),
    }


def _check_settings(path: Path, settings: Mapping[str, Any], unused: bool) -> None:
    """Compare with the settings that a folder's samples were made with; a folder without any (`unused`) gets these.

    Raises:
        UserError: they differ.
    """
    earlier = {} if unused else _noted_settings(path)
    if not earlier:
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    earlier.setdefault("prompt_date", settings["prompt_date"])  # earlier versions did not note it
    changed = [f"{k} was {earlier.get(k)!r} and is {v!r}" for k, v in settings.items() if earlier.get(k) != v]
    if changed:
        raise UserError(
            f"{path.parent} holds samples of another evaluation: {'; '.join(changed)}. Give this one another --out, "
            "or the same settings as before."
        )


def _noted_settings(path: Path) -> dict[str, Any]:
    """The settings that a folder's samples were made with; {} if there are none yet."""
    if not path.exists():
        return {}
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(noted, dict):
            raise ValueError("it is not a JSON object")
        return noted
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}). Remove it if the settings are as before: the samples stay. Or give this "
            "evaluation another --out."
        ) from error


def _generate(
    evaluation: Evaluation,
    prompts: PromptSet,
    tokenizer: PolicyTokenizer,
    wanted: Sequence[tuple[BenchmarkQuestion, int]],
    journal: Journal,
    on_progress: Callable[[int], None],
) -> None:
    """Make the missing samples with engines, which are started for it and stopped after it, or with the server."""
    rollout, seed, server = evaluation.config.rollout, evaluation.config.run.seed, evaluation.server

    async def make(opened: AbstractAsyncContextManager[Policy], at_once: int) -> None:
        async with opened as policy:
            await generate(policy, prompts, wanted, seed, journal, at_once, on_progress)

    if server:
        api = OpenAIServer(server.url, server.model, server.key, rollout.request_timeout, "server (--server)")
        asyncio.run(make(server_policy(api, tokenizer, rollout.sampling, evaluation.chat), rollout.concurrency))
        return
    logs = evaluation.folder / "logs"
    config = evaluation.config
    with Engines.open(
        config.model,
        rollout,
        logs,
        device=config.run.device,
        seed=seed,
        routing=config.training.routing_replay,
        trainers=0,
    ) as engines:
        try:
            asyncio.run(make(engine_policy(engines, tokenizer, rollout), rollout.concurrency * len(engines.urls)))
        except GenerationError as error:
            raise UserError(
                f"An engine cannot serve this evaluation: {error}. Look into its log ({logs} has the logs of engines "
                "started here), and run the same command again: what is done stays done."
            ) from error


def _score(questions: Questions, rows: Iterable[Mapping[str, Any]]) -> dict[str, list[results.Answered]]:
    """The questions with their answers, scored by rule."""
    answered = {(q.benchmark, q.id): results.Answered(q) for members in questions.values() for q in members}
    for row in rows:
        one = answered.get((row["benchmark"], row["id"]))
        if one:  # and not beyond --limit, or of a benchmark that is not asked for now
            one.samples.append(results.Sample.of(one.question, row))
    return {name: [answered[name, q.id] for q in members] for name, members in questions.items()}


def _judge(
    evaluation: Evaluation,
    endpoint: Endpoint,
    template: str,
    answered: Mapping[str, Sequence[results.Answered]],
    progress: Progress,
) -> None:
    """Give the samples their verdicts; those that judgments.jsonl does not have are asked for."""
    rollout, judge = evaluation.config.rollout, Judge(endpoint.model, template)
    keys: list[tuple[results.Sample, str]] = []
    prompts: dict[str, str] = {}
    for one in (one for members in answered.values() for one in members):
        for sample in one.samples:
            if sample.prediction is not None and results.needs_judgment(
                one.question, sample, evaluation.judge_everything
            ):
                prompt = judge.prompt(one.question.question, sample.prediction, _reference(one.question))
                keys.append((sample, judge.key(prompt)))
                prompts[judge.key(prompt)] = prompt
    with Journal(evaluation.folder / "judgments.jsonl") as journal:
        have = verdicts(journal)
        wanted = {key: prompt for key, prompt in prompts.items() if key not in have}

        async def ask(advance: Callable[[int], None]) -> None:
            timeout, at_once = rollout.request_timeout, rollout.concurrency
            async with OpenAIServer(endpoint.url, endpoint.model, endpoint.key, timeout, "judge (--judge)") as server:
                await judge_all(judge, server, wanted, evaluation.judge_tokens, journal, at_once, advance)

        if wanted:
            with progress.stage("judging", len(prompts)) as advance:
                asyncio.run(ask(lambda count: advance(len(prompts) - len(wanted) + count)))
        verdict_of = verdicts(journal)
    for sample, key in keys:
        sample.verdict = verdict_of[key]


def _reference(question: BenchmarkQuestion) -> str:
    """The reference answer as a judge is shown it, with its aliases."""
    return f"{question.answer} (or: {'; '.join(question.aliases)})" if question.aliases else question.answer
