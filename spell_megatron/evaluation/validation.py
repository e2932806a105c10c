"""Validation in a run: accuracy on held-out questions with known answers, scored by rule."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean, stdev

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.evaluation.pass_at_k import pass_at_k
from spell_megatron.evaluation.prompt_cut import middle_truncate
from spell_megatron.evaluation.questions import HeldOutQuestion
from spell_megatron.selfplay.interfaces import Client, Tokenizer
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.seeds import derive_seed
from spell_megatron.selfplay.tasks import Tasks


async def validate(
    client: Client,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    sampling: SamplingConfig,
    questions: Sequence[HeldOutQuestion],
    samples: int,
    seed: int,
    tasks: Tasks,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Answer every question `samples` times and score the answers by rule.

    The sampling temperature is the rollout's. Prompts over the limit lose tokens in the middle, so
    that the question at the end survives. Returns pass@1 and pass@samples (unbiased estimate, paper
    Eq. 11) over all questions and per task, the number of questions and the standard error of pass@1 over them, and
    `validation/question_set`, a checksum: where it is equal, the questions are.
    """
    done = 0
    # Meanwhile the event loop sends what is ready. One thread: no tokenizer need bear two at a time.
    thread = ThreadPoolExecutor(1, "tokenizer")

    async def correct(question: HeldOutQuestion) -> int:
        nonlocal done
        prompt = prompts.responder(question.task, question.question, question.documents)
        whole = await asyncio.get_running_loop().run_in_executor(thread, tokenizer.prompt_ids, prompt)
        ids = middle_truncate(whole, sampling.max_prompt_tokens)
        completions = await client.generate(
            ids,
            n=samples,
            seed=derive_seed(seed, "held-out", question.id),
            max_tokens=sampling.max_response_tokens,
            affinity=question.documents[0],
            prompt_routing=False,
        )
        predictions = [
            tasks.answer(question.task, tokenizer.decode(c.token_ids), c.finish_reason == "length") for c in completions
        ]
        done += 1
        on_progress(done)
        return sum(tasks.score(question.task, prediction, question.answer) for prediction in predictions)

    counts = await asyncio.gather(*(correct(question) for question in questions))
    metrics: dict[str, float] = {"validation/question_set": _checksum(questions)}
    asked = sorted({question.task for question in questions})
    of_task = {t: [c for c, q in zip(counts, questions, strict=True) if q.task == t] for t in asked}
    for name, members in [("", counts), *((f"{t}/", some) for t, some in of_task.items())]:
        metrics[f"validation/{name}questions"] = len(members)
        for k in sorted({1, samples}):
            metrics[f"validation/{name}pass@{k}"] = fmean(pass_at_k(samples, c, k) for c in members)
        if len(members) > 1:
            metrics[f"validation/{name}standard_error"] = stdev(c / samples for c in members) / len(members) ** 0.5
    return metrics


def _checksum(questions: Sequence[HeldOutQuestion]) -> int:
    """A number that tells sets of questions apart, whatever their order."""
    texts = sorted(json.dumps([q.task, q.question, q.answer, q.documents]) for q in questions)
    return zlib.crc32("\n".join(texts).encode())
