"""Samples of a policy for evaluation questions: prompts, seeds, and a journal of what was generated."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.errors import UserError
from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.evaluation.journal import Journal, run_all
from spell_megatron.evaluation.openai_server import OpenAIServer, Reply
from spell_megatron.evaluation.scores import middle_truncate
from spell_megatron.rollout.client import Client
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.tokenizer import PolicyTokenizer


class Policy(Protocol):
    """What answers: engines, or a server with OpenAI's API."""

    def prompt(self, text: str) -> tuple[Any, int, bool]:
        """(what `sample` takes, its tokens, whether its middle was taken out to fit)."""

    async def sample(self, prompt: Any, seed: int, affinity: str) -> Reply:
        """One answer to a prompt."""


class EnginePolicy:
    """The engines of a run. Prompts are token ids from end to end: their cut is exact, and never tokenised again."""

    def __init__(self, client: Client, tokenizer: PolicyTokenizer, sampling: SamplingConfig) -> None:
        self._client, self._tokenizer, self._sampling = client, tokenizer, sampling

    def prompt(self, text: str) -> tuple[list[int], int, bool]:
        return _cut_ids(self._tokenizer, text, self._sampling.max_prompt_tokens)

    async def sample(self, prompt: list[int], seed: int, affinity: str) -> Reply:
        completion = (
            await self._client.generate(
                prompt,
                n=1,
                seed=seed,
                max_tokens=self._sampling.max_response_tokens,
                affinity=affinity,
                prompt_routing=False,
            )
        )[0]
        text = self._tokenizer.decode(completion.token_ids)
        return Reply(text, completion.finish_reason == "length", len(completion.token_ids))


class ServerPolicy:
    """A model behind OpenAI's API.

    Args:
        chat: send text to /chat/completions, where the server applies its template; the limit then holds for the text
            of the prompt, counted by this tokenizer. Otherwise token ids go to /completions, exactly as to engines.
    """

    def __init__(self, server: OpenAIServer, tokenizer: PolicyTokenizer, sampling: SamplingConfig, chat: bool) -> None:
        self._server, self._tokenizer, self._sampling, self._chat = server, tokenizer, sampling, chat

    def prompt(self, text: str) -> tuple[list[int] | str, int, bool]:
        limit = self._sampling.max_prompt_tokens
        return cut_text(self._tokenizer, text, limit) if self._chat else _cut_ids(self._tokenizer, text, limit)

    async def sample(self, prompt: list[int] | str, seed: int, affinity: str) -> Reply:
        sampling = {
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "max_tokens": self._sampling.max_response_tokens,
            "seed": seed,
        }
        return await (self._server.chat if self._chat else self._server.complete)(prompt, **sampling)


def _cut_ids(tokenizer: PolicyTokenizer, text: str, limit: int) -> tuple[list[int], int, bool]:
    ids = tokenizer.prompt_ids(text)
    cut = middle_truncate(ids, limit)
    return cut, len(cut), len(cut) < len(ids)


def cut_text(tokenizer: PolicyTokenizer, text: str, limit: int) -> tuple[str, int, bool]:
    """(text of at most `limit` tokens, its tokens, whether its middle was taken out).

    Where the two ends meet, the text may take more tokens than were kept; then some more are left out.
    """
    ids = tokenizer.encode(text)
    if len(ids) <= limit:
        return text, len(ids), False
    kept = limit
    while True:
        head = kept // 2
        short = tokenizer.decode(ids[:head]) + tokenizer.decode(ids[len(ids) - (kept - head) :])
        count = tokenizer.count(short)
        if count <= limit:
            return short, count, True
        kept -= max(1, (count - limit) // 2)  # fewer than too many: the join may come out shorter next time


def sample_seed(seed: int, question: BenchmarkQuestion, index: int) -> int:
    """A seed of 53 bits (JSON's integers) for one sample of one question; no two samples of a run share one."""
    text = "\x1f".join(map(str, (seed, question.benchmark, question.id, index)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 11


def fingerprint(text: str) -> str:
    """Short name of a text: tells whether a sample was made for the prompt that it would be made for now."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


def prompt_of(prompts: PromptSet, question: BenchmarkQuestion) -> str:
    return prompts.responder(question.task, question.question, question.documents)


def missing(
    prompts: PromptSet, questions: Sequence[BenchmarkQuestion], samples: int, journal: Journal
) -> list[tuple[BenchmarkQuestion, int]]:
    """(question, index) of those of the first `samples` samples of each question that the journal does not have.

    Raises:
        UserError: a sample of one of these questions was made for another prompt.
    """
    names = {(q.benchmark, q.id): fingerprint(prompt_of(prompts, q)) for q in questions}
    have = set()
    for row in journal.rows():
        question = row["benchmark"], row["id"]
        if names.get(question, row["prompt"]) != row["prompt"]:
            raise UserError(
                f"{journal.path} has answers to question {row['id']} of {row['benchmark']} in another wording: its "
                "file or the prompt set changed since. Give this evaluation another --out."
            )
        have.add((*question, row["sample"]))
    return [(q, index) for q in questions for index in range(samples) if (q.benchmark, q.id, index) not in have]


async def generate(
    policy: Policy,
    prompts: PromptSet,
    wanted: Sequence[tuple[BenchmarkQuestion, int]],
    seed: int,
    journal: Journal,
    at_once: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Answer questions and append the samples to the journal.

    Every sample is a request with a seed of its own, so that only those under way are lost when the process is
    killed. The engines' prefix cache makes the samples of a question share its prompt.

    Args:
        wanted: (question, index of the sample), the samples of a question together.

    Raises:
        UserError, GenerationError: engines or server fail; what was done stays in the journal.
    """
    count = 0

    async def one(question: BenchmarkQuestion, index: int, name: str, prompt: tuple[Any, int, bool]) -> None:
        nonlocal count
        content, tokens, cut = prompt
        own_seed = sample_seed(seed, question, index)
        reply = await policy.sample(content, own_seed, affinity=name)
        journal.append(
            {
                "benchmark": question.benchmark,
                "id": question.id,
                "sample": index,
                "seed": own_seed,
                "prompt": name,
                "prompt_tokens": tokens,
                "prompt_cut": cut,
                "text": reply.text,
                "tokens": reply.tokens,
                "cut": reply.cut,
            }
        )
        count += 1
        on_progress(count)

    async def jobs() -> AsyncIterator[Coroutine[Any, Any, None]]:
        for question, group in itertools.groupby(wanted, key=lambda sample: sample[0]):
            text = prompt_of(prompts, question)
            # in a thread: a long prompt takes a while, and answers arrive meanwhile
            prompt = await asyncio.to_thread(policy.prompt, text)
            for _, index in group:
                yield one(question, index, fingerprint(text), prompt)

    await run_all(jobs(), at_once)
