"""Judgments of answers by another model: does the answer contain what the reference says?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.evaluation.concurrency import run_all
from spell_megatron.evaluation.journal import Journal
from spell_megatron.evaluation.openai_server import OpenAIServer
from spell_megatron.selfplay.parsing import parse_verdict
from spell_megatron.selfplay.prompts import fill

PROMPT = Path(__file__).parent / "judge_prompt.md"


def load_prompt(path: Path = PROMPT) -> str:
    """A judge's prompt with the placeholders question, prediction and reference.

    Raises:
        UserError: the file cannot be read, or lacks one of them or has others.
    """
    try:
        template = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The judge's prompt {path} cannot be read: {error}. Correct --judge-prompt.") from error
    found = set(re.findall(r"\{\{([^{}]*)\}\}", template))
    if found != {"question", "prediction", "reference"}:
        raise UserError(
            f"The judge's prompt {path} must have the placeholders {{{{question}}}}, {{{{prediction}}}} and "
            f"{{{{reference}}}}, and no others; it has {', '.join(sorted(found)) or 'none'}."
        )
    return template


@dataclass(frozen=True)
class Judge:
    """Judges with one model and one prompt.

    A judgment is known by model and prompt, so that equal answers to a question are judged once.
    """

    model: str
    template: str

    def prompt(self, question: str, prediction: str, reference: str) -> str:
        return fill(self.template, question=question, prediction=prediction, reference=reference)

    def key(self, prompt: str) -> str:
        text = f"{self.model}\0{prompt}".encode("utf-8", "replace")
        return hashlib.blake2b(text, digest_size=16).hexdigest()


def verdicts(journal: Journal) -> dict[str, int]:
    """Verdict of each judgment in the journal: 1 yes, 0 no, -1 unparsable."""
    return {row["key"]: row["verdict"] for row in journal.rows()}


async def judge_all(
    judge: Judge,
    server: OpenAIServer,
    wanted: Mapping[str, str],
    max_tokens: int,
    journal: Journal,
    at_once: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Have prompts judged, greedily, and append the judgments to the journal.

    Args:
        wanted: key -> prompt.

    Raises:
        UserError: the judge cannot be used; what was done stays in the journal.
    """
    count = 0

    async def one(key: str, prompt: str) -> None:
        nonlocal count
        reply = await server.chat(prompt, temperature=0.0, top_p=1.0, max_tokens=max_tokens)
        verdict = parse_verdict(reply.text, reply.cut)
        row = {"key": key, "model": judge.model, "verdict": verdict, "prompt": prompt, "text": reply.text}
        journal.append({**row, "cut": reply.cut})
        count += 1
        on_progress(count)

    async def jobs() -> AsyncIterator[Coroutine[Any, Any, None]]:
        for key, prompt in wanted.items():
            yield one(key, prompt)

    await run_all(jobs(), at_once)
