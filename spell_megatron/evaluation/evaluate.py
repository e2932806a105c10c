"""`spell evaluate`: answer benchmarks, have the answers judged, and write the scores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.config.schema import Config
from spell_megatron.errors import UserError
from spell_megatron.evaluation import results
from spell_megatron.evaluation.benchmarks import BenchmarkQuestion, load_benchmark
from spell_megatron.evaluation.generate import EnginePolicy, ServerPolicy, fingerprint, generate, missing
from spell_megatron.evaluation.journal import Journal
from spell_megatron.evaluation.judge import PROMPT, Judge, judge_all, load_prompt, verdicts
from spell_megatron.evaluation.openai_server import OpenAIServer
from spell_megatron.files import read_json_objects, write_text
from spell_megatron.monitoring.progress import Progress
from spell_megatron.rollout.client import Client, GenerationError
from spell_megatron.rollout.engines import Engines
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
        benchmarks: name -> file or folder, None: from the hub (see `benchmarks.load_benchmark`).
        folder: where everything is kept. Called again with the same folder, it goes on where it was.
        samples: answers per question.
        limit: only the first questions of each benchmark.
        answers: JSONL file of answers from elsewhere to score, instead of generating any (see `_read_answers`).
        server: answer with this server instead of engines; model.path is then only the tokenizer's folder.
        chat: use the server's chat route.
        judge: who judges what the rule calls wrong; None: rule alone.
        judge_prompt: file with the judge's prompt.
        judge_tokens: longest judgment.
        judge_everything: have answers judged too that are right by rule.
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


def evaluate(evaluation: Evaluation, progress: Progress) -> dict[str, Any]:
    """Run an evaluation and write scores.json, scores.md and pass_at_k.svg; returns the numbers.

    Raises:
        UserError: for whatever the user can mend. What was generated and judged before stays.
    """
    template = load_prompt(evaluation.judge_prompt)
    questions: dict[str, list[BenchmarkQuestion]] = {}
    for name, path in evaluation.benchmarks.items():
        with progress.stage(f"reading {name}"):
            questions[name] = load_benchmark(name, path, evaluation.limit)
        progress.line(f"{name}: {len(questions[name]):,} questions")
    folder = evaluation.folder
    folder.mkdir(parents=True, exist_ok=True)
    if evaluation.answers:
        answered = _score(questions, _read_answers(evaluation.answers, questions))
        settings = {"model": str(evaluation.answers)}
    else:
        answered = _score(questions, _answer(evaluation, questions, progress))
        settings = _settings(evaluation) | {"samples": evaluation.samples}
    if evaluation.judge:
        settings |= {"judge": evaluation.judge.model, "judge_prompt": fingerprint(template)}
        with Journal(folder / "judgments.jsonl") as judgments:
            _judge(evaluation, Judge(evaluation.judge.model, template), answered, judgments, progress)
    numbers = results.summarise(answered, settings)
    results.write(numbers, folder)
    return numbers


Questions = Mapping[str, Sequence[BenchmarkQuestion]]


def _answer(evaluation: Evaluation, questions: Questions, progress: Progress) -> Iterator[dict[str, Any]]:
    """The samples of all questions, from the journal; those that it does not have are generated first."""
    prompts = PromptSet.load(evaluation.config.selfplay.prompts)
    tokenizer = PolicyTokenizer(evaluation.config.model.path)
    every = [question for members in questions.values() for question in members]
    with Journal(evaluation.folder / "samples.jsonl") as journal:
        _check_settings(evaluation.folder / "evaluation.json", _settings(evaluation))
        wanted = missing(prompts, every, evaluation.samples, journal)
        if wanted:
            total = len(every) * evaluation.samples
            with progress.stage("generating", total) as advance:
                _generate(evaluation, prompts, tokenizer, wanted, journal, lambda n: advance(total - len(wanted) + n))
    return (row for row in journal.rows() if row["sample"] < evaluation.samples)  # one at a time: they are long


def _read_answers(path: Path, questions: Questions) -> list[dict[str, Any]]:
    """Answers from elsewhere: lines with `id`, `text` and, if there are several benchmarks, `benchmark`.

    `cut`: true says that an answer ended at its limit. Several lines of a question are its samples.

    Raises:
        UserError: lines that are not of this form, of no question, or not equally many of each question.
    """
    wanted = {(q.benchmark, q.id): 0 for members in questions.values() for q in members}
    only = next(iter(questions)) if len(questions) == 1 else None
    rows, faults = [], []
    for number, row in read_json_objects(path, "file of answers"):
        try:
            key, text, cut = (row.get("benchmark", only), str(row["id"])), row["text"], row.get("cut", False)
            if key not in wanted:
                raise ValueError(f"there is no question {key[1]!r} of {key[0]!r}")
            if not isinstance(text, str) or not isinstance(cut, bool):
                raise ValueError("text must be a string, and cut true or false")
        except KeyError as error:
            faults.append(f"line {number} has no {error}")
        except (ValueError, TypeError) as error:
            faults.append(f"line {number}: {error}")
        else:
            rows.append({"benchmark": key[0], "id": key[1], "text": text, "cut": cut})
            wanted[key] += 1
    counts = {count for (name, _), count in wanted.items()}
    if not faults and (len(counts) > 1 or 0 in counts):
        fewest = min(wanted, key=wanted.get)
        faults.append(
            f"it has {wanted[fewest]} answers to question {fewest[1]!r} of {fewest[0]!r}, and {max(counts)} to others"
        )
    if faults:
        raise UserError(
            f"The answers in {path} cannot be used: {'; '.join(faults[:10])}. Each line must be a JSON object with id, "
            "text and, if there are several benchmarks, benchmark; every question must have equally many."
        )
    return rows


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    """What samples depend on, beside the prompts (which are compared one by one)."""
    config, server = evaluation.config, evaluation.server
    sampling = config.rollout.sampling
    return {
        "model": server.model if server else str(config.model.path),
        "by": "engines" if not server else "chat" if evaluation.chat else "completions",
        "max_input": sampling.max_prompt_tokens,
        "max_output": sampling.max_response_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": config.run.seed,
    }


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Compare with the settings that a folder's samples were made with; a new folder gets these.

    Raises:
        UserError: they differ.
    """
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Give this evaluation another --out.") from error
    changed = [f"{k} was {earlier.get(k)!r} and is {v!r}" for k, v in settings.items() if earlier.get(k) != v]
    if changed:
        raise UserError(
            f"{path.parent} holds samples of another evaluation: {'; '.join(changed)}. Give this one another --out, "
            "or the same settings as before."
        )


def _generate(
    evaluation: Evaluation,
    prompts: PromptSet,
    tokenizer: PolicyTokenizer,
    wanted: Sequence[tuple[BenchmarkQuestion, int]],
    journal: Journal,
    on_progress: Callable[[int], None],
) -> None:
    """Make the missing samples with engines, which are started for it and stopped after it, or with the server."""
    config, server = evaluation.config, evaluation.server
    rollout = config.rollout

    async def with_server(endpoint: Endpoint) -> None:
        async with OpenAIServer(
            endpoint.url, endpoint.model, endpoint.key, rollout.request_timeout, "server (--server)"
        ) as server:
            policy = ServerPolicy(server, tokenizer, rollout.sampling, evaluation.chat)
            await generate(policy, prompts, wanted, config.run.seed, journal, rollout.concurrency, on_progress)

    async def with_engines(engines: Engines) -> None:
        def revive() -> list[str]:
            engines.restart(engines.failed())
            return engines.urls

        async with Client(
            engines.urls,
            engines.api_key,
            rollout.sampling,
            stop_token_ids=sorted(tokenizer.eos_ids),
            request_timeout=rollout.request_timeout,
            hang_timeout=rollout.hang_timeout,
            concurrency=rollout.concurrency,
            revive=revive,
        ) as client:
            policy, at_once = EnginePolicy(client, tokenizer, rollout.sampling), rollout.concurrency * len(engines.urls)
            await generate(policy, prompts, wanted, config.run.seed, journal, at_once, on_progress)

    if server:
        asyncio.run(with_server(server))
        return
    with Engines.open(config, evaluation.folder / "logs", trainers=0) as engines:
        try:
            asyncio.run(with_engines(engines))
        except GenerationError as error:
            raise UserError(
                f"An engine cannot serve this evaluation: {error}. Look into its log (of those started here in "
                f"{evaluation.folder / 'logs'}), and run the same command again: what is done stays done."
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
    judge: Judge,
    answered: Mapping[str, Sequence[results.Answered]],
    journal: Journal,
    progress: Progress,
) -> None:
    """Give the samples their verdicts; those that the journal does not have are asked for."""
    endpoint, rollout = evaluation.judge, evaluation.config.rollout
    keys: list[tuple[results.Sample, str]] = []
    wanted: dict[str, str] = {}
    for one in (one for members in answered.values() for one in members):
        for sample in one.samples:
            if results.needs_judgment(one.question, sample, evaluation.judge_everything):
                prompt = judge.prompt(one.question.question, sample.prediction, one.question.answer)
                keys.append((sample, judge.key(prompt)))
                wanted[judge.key(prompt)] = prompt
    total = len(wanted)
    have = verdicts(journal)
    wanted = {key: prompt for key, prompt in wanted.items() if key not in have}

    async def ask(advance: Callable[[int], None]) -> None:
        async with OpenAIServer(
            endpoint.url, endpoint.model, endpoint.key, rollout.request_timeout, "judge (--judge)"
        ) as server:
            await judge_all(judge, server, wanted, evaluation.judge_tokens, journal, rollout.concurrency, advance)

    if wanted:
        with progress.stage("judging", total) as advance:
            asyncio.run(ask(lambda count: advance(total - len(wanted) + count)))
    verdict_of = verdicts(journal)
    for sample, key in keys:
        sample.verdict = verdict_of[key]
