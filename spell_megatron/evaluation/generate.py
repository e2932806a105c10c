"""Samples of a policy for evaluation questions: their prompts and seeds, and those that the journal lacks."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.evaluation.concurrency import run_all
from spell_megatron.evaluation.journal import Journal
from spell_megatron.evaluation.policies import Policy
from spell_megatron.selfplay.prompts import PromptSet


def sample_seed(seed: int, question: BenchmarkQuestion, index: int) -> int:
    """A seed of 53 bits (JSON's integers) for one sample of one question; no two samples of a run share one."""
    text = "\x1f".join(map(str, (seed, question.benchmark, question.id, index)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 11


def fingerprint(text: str) -> str:
    """A short name of a text. It shows whether a sample was made for the prompt of today."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


def prompt_of(prompts: PromptSet, question: BenchmarkQuestion) -> str:
    return prompts.responder(question.task, question.question, question.documents)


def missing(
    prompts: PromptSet, questions: Sequence[BenchmarkQuestion], samples: int, journal: Journal
) -> list[tuple[BenchmarkQuestion, int]]:
    """(question, index) of each sample that the journal lacks, among the first `samples` of each question.

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
