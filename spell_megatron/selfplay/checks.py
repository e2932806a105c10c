"""What a question must pass before it is put to the responder: it needs its documents, and they confirm its answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.config.selfplay_sections import GateConfig, SelfPlayConfig
from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.letters import LETTERS
from spell_megatron.selfplay.names import unknown_names
from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.parsing import Question
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.quotes import quotes_found
from spell_megatron.selfplay.step_client import Prompt, StepClient
from spell_megatron.selfplay.tasks import Tasks
from spell_megatron.selfplay.together import gather


class Checks:
    """Checks the questions of one step by the policy's own answers. Nobody trains on these answers."""

    def __init__(
        self, config: SelfPlayConfig, sampling: SamplingConfig, prompts: PromptSet, client: StepClient, tasks: Tasks
    ) -> None:
        self._tasks = tasks
        self._config = config
        self._sampling = sampling
        self._prompts = prompts
        self._client = client

    async def fault(self, attempt: Attempt, question: Question) -> Outcome | None:
        """How the attempt ends because of its question; None if the responder can have it."""
        if self._config.questioner.known_names and not await self._known(attempt, question):
            return Outcome.UNCONFIRMED
        if self._config.questioner.quotes and not await self._quoted(attempt, question):
            return Outcome.UNCONFIRMED
        if self._config.grounding.enabled and await self._answered_without_documents(attempt, question):
            return Outcome.UNGROUNDED
        if self._config.gate.enabled and not await self._confirmed(attempt, question):
            return Outcome.UNCONFIRMED
        return None

    async def _known(self, attempt: Attempt, question: Question) -> bool:
        """Whether the documents that the questioner saw hold all names of its question."""
        unknown = await self._client.in_thread(lambda: unknown_names(question.stem or question.text, _shown(attempt)))
        attempt.counts["checked_names"] += 1
        attempt.counts["unknown_names"] += bool(unknown)
        return not unknown

    async def _quoted(self, attempt: Attempt, question: Question) -> bool:
        """Whether the question has quotes, and all stand in the documents that its questioner saw."""
        found = await self._client.in_thread(lambda: quotes_found(question.quotes, _shown(attempt)))
        attempt.counts["quotes"] += len(question.quotes)
        attempt.counts["quotes_found"] += found
        return found == len(question.quotes) > 0

    # The check that a question needs its documents

    async def _answered_without_documents(self, attempt: Attempt, question: Question) -> bool:
        """Whether the policy answers the question right with no documents before it.

        One right answer of a multiple-choice question proves nothing (a guess is right one time in
        four), so there the options are shown in several orders and most answers must be right.
        """
        config = self._config.grounding
        if attempt.task == "doc_mc":
            rng = random.Random(self._client.seed(attempt, "permutation", 0))
            variants = [question.permuted(rng.sample(range(4), 4)) for _ in range(config.mc_samples)]
        else:
            variants = [question] * config.samples
        right = await gather(self._no_context_score(attempt, variant, i) for i, variant in enumerate(variants))
        attempt.counts["no_context_answers"] += len(right)
        attempt.counts["no_context_right"] += sum(right)
        return sum(right) > (config.mc_threshold * len(right) if attempt.task == "doc_mc" else 0.1)

    async def _no_context_score(self, attempt: Attempt, question: Question, index: int) -> int:
        limit = self._sampling.max_no_context_tokens or self._sampling.max_response_tokens
        prompt = await self._client.prompt(partial(self._prompts.responder, attempt.task, question.text, None))
        (reply,) = await self._client.generate(attempt, "no_context", prompt, limit, index=index, prompt_routing=False)
        prediction = self._tasks.answer(attempt.task, reply.text, reply.truncated)
        return self._tasks.score(attempt.task, prediction, question.reference)

    # The gate: the check that the documents confirm the reference

    async def _confirmed(self, attempt: Attempt, question: Question) -> bool:
        """Whether enough answers from the questioner's own documents reach its reference."""
        gate = self._config.gate
        answers = await gather(self._gate_answer(attempt, question, i) for i in range(gate.answers))
        reached = [bool(self._tasks.score(attempt.task, answer, question.reference)) for answer in answers]
        attempt.counts["gate_answers"] += len(reached)
        attempt.counts["gate_answers_reaching_reference"] += sum(reached)
        if attempt.question:
            attempt.question.gate = sum(reached) / len(reached)
        others = [answer for answer, right in zip(answers, reached, strict=True) if answer is not None and not right]
        return confirms(sum(reached), len(reached), self._largest_group(attempt.task, others), gate)

    def _largest_group(self, task: str, answers: Sequence[str]) -> int:
        """How often the most frequent of some answers was given. Answers are the same if the rule check says so."""
        score = self._tasks.score
        return max((sum(score(task, other, answer) for other in answers) for answer in answers), default=0)

    async def _gate_answer(self, attempt: Attempt, question: Question, index: int) -> str | None:
        """An answer over the questioner's documents; None if it states nothing, or its prompt is too long.

        Options of multiple choice are shown in another order each time, so that a liking for a letter confirms nothing.
        The answer is the letter that its option has in the question itself.
        """
        rng = random.Random(self._client.seed(attempt, "gate documents", index if self._config.gate.shuffle else 0))
        order: Sequence[int] = ()
        shown = question
        if attempt.task == "doc_mc":
            order = random.Random(self._client.seed(attempt, "gate options", index)).sample(range(4), 4)
            shown = question.permuted(order)
        prompt = await self._gate_prompt(attempt, shown, rng)
        if len(prompt.ids) > self._sampling.max_prompt_tokens:
            return None
        limit = self._sampling.max_response_tokens
        (reply,) = await self._client.generate(attempt, "gate", prompt, limit, index=index, prompt_routing=False)
        attempt.counts["gate_prompt_tokens"] += len(prompt.ids)
        attempt.counts["gate_response_tokens"] += len(reply.completion.token_ids)
        answer = self._tasks.answer(attempt.task, reply.text, reply.truncated)
        return LETTERS[order[LETTERS.index(answer)]] if order and answer else answer

    async def _gate_prompt(self, attempt: Attempt, question: Question, rng: random.Random) -> Prompt:
        """The responder's prompt over the questioner's documents and as many distractors as fit."""
        documents, gate = attempt.cluster.documents, self._config.gate
        others = [index for index in range(len(documents)) if index not in attempt.context]
        distractors = rng.sample(others, min(gate.distractors, len(others)))
        while True:
            indices = sorted((*attempt.context, *distractors))
            if gate.shuffle:
                rng.shuffle(indices)
            shown = [documents[index] for index in indices]
            write = partial(self._prompts.responder, attempt.task, question.text, shown)
            prompt = await self._client.prompt(write, shown)
            if not distractors or len(prompt.ids) <= self._sampling.max_prompt_tokens:
                return prompt
            distractors.pop()


def _shown(attempt: Attempt) -> list[str]:
    """The documents that the questioner saw."""
    return [attempt.cluster.documents[index] for index in attempt.context]


def confirms(reached: int, answers: int, largest_other: int, config: GateConfig) -> bool:
    """Whether answers confirm a reference.

    Args:
        reached: number of answers that reach it, of `answers` in all.
        largest_other: how often the most frequent other answer was given.
    """
    return reached > largest_other if config.condition == "majority" else reached / answers >= config.threshold
