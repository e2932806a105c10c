"""The validation of a run: what it measures, of how many questions, and which."""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import replace

import pytest

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.evaluation.questions import HeldOutQuestion
from spell_megatron.evaluation.validation import validate
from spell_megatron.rollout.client import Completion
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.tasks import Tasks

QUESTIONS = [
    HeldOutQuestion(str(i), task, f"What is number {i}?", "7", (f"Number {i} is 7.",))
    for i, task in enumerate(["docmath_qa", "docmath_qa", "doc_general_qa", "docmath_qa"])
]


class Bytes:
    def prompt_ids(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()

    def count(self, text: str) -> int:
        return len(text)


class Engine:
    """Answers question i right i times."""

    async def generate(self, prompt_ids, *, n, seed, max_tokens, affinity, prompt_routing=True) -> list[Completion]:
        right = int(bytes(prompt_ids).decode().split("What is number ")[1][0])
        texts = [f"The correct answer is {7 if i < right else 8}.".encode() for i in range(n)]
        return [Completion(list(text), [0.0] * len(text), "stop", "0") for text in texts]


def measure(
    questions: list[HeldOutQuestion], tokenizer: Bytes | None = None, play: SelfPlayConfig | None = None
) -> dict[str, float]:
    prompts, tokenizer = PromptSet.load("compact"), tokenizer or Bytes()
    return asyncio.run(
        validate(Engine(), tokenizer, prompts, SamplingConfig(), questions, 4, 0, Tasks(play or SelfPlayConfig()))
    )


def test_each_accuracy_says_of_how_many_questions_it_is_and_how_exact():
    metrics = measure(QUESTIONS)
    assert metrics["validation/pass@1"] == pytest.approx(6 / 16)
    assert metrics["validation/questions"] == 4 and metrics["validation/docmath_qa/questions"] == 3
    # shares of right answers: 0, 1/4, 1/2, 3/4; their standard deviation is 0.3227
    assert metrics["validation/standard_error"] == pytest.approx(0.32275 / 4**0.5, rel=1e-4)
    assert metrics["validation/docmath_qa/standard_error"] == pytest.approx(0.38188 / 3**0.5, rel=1e-4)
    assert "validation/doc_general_qa/standard_error" not in metrics  # of a single question


def test_the_same_questions_have_the_same_number():
    same = measure(QUESTIONS)["validation/question_set"]
    assert same == measure(QUESTIONS[::-1])["validation/question_set"]
    changes = [{"question": "What is number 1? Say it."}, {"answer": "8"}, {"documents": ("Number 1 is 8.",)}]
    others = [measure([QUESTIONS[0], replace(QUESTIONS[1], **change), *QUESTIONS[2:]]) for change in changes]
    numbers = {other["validation/question_set"] for other in [*others, measure(QUESTIONS[1:])]}
    assert len(numbers) == 4 and same not in numbers


def test_prompts_are_not_tokenised_in_the_event_loop():
    class Noting(Bytes):
        threads: set[int] = set()

        def prompt_ids(self, text: str) -> list[int]:
            self.threads.add(threading.get_ident())
            return super().prompt_ids(text)

    assert measure(QUESTIONS, Noting()) == measure(QUESTIONS)
    assert len(Noting.threads) == 1 and threading.get_ident() not in Noting.threads


def test_a_rule_check_of_ones_own_scores_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "rule_of_held_out.py").write_text("def score(task, prediction, reference): return prediction == '8'\n")
    rule = SelfPlayConfig(code=tmp_path, rule="rule_of_held_out:score")
    assert measure(QUESTIONS, play=rule)["validation/pass@1"] == pytest.approx(10 / 16)  # what is wrong by the other
