"""One cluster's way through the roles: ask, check the question, answer, judge."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from spell_megatron.config.schema import SamplingConfig
from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.errors import UserError
from spell_megatron.selfplay.attempt import Attempt
from spell_megatron.selfplay.batch import Sample
from spell_megatron.selfplay.checks import Checks
from spell_megatron.selfplay.context import choose_context, remembered_documents, shorten_context
from spell_megatron.selfplay.history import Entry, History
from spell_megatron.selfplay.letters import LETTERS
from spell_megatron.selfplay.metrics import vote_counts
from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.own_code import OwnCodeError
from spell_megatron.selfplay.parsing import Question, parse_verdict
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.rewards import (
    admissible,
    judgment_rewards,
    majority,
    mixed,
    question_reward,
    responder_reward,
    trainable,
)
from spell_megatron.selfplay.step_client import Prompt, StepClient
from spell_megatron.selfplay.tasks import Tasks
from spell_megatron.selfplay.together import gather

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Roles:
    """Takes the attempts of one step through all roles.

    The history is only read. `sampling` limits the tokens of prompts and replies. `documents_fit` remembers, by the
    cluster's id, whether the responder's prompt has room for all documents; steps share it.
    """

    def __init__(
        self,
        config: SelfPlayConfig,
        sampling: SamplingConfig,
        prompts: PromptSet,
        history: History,
        client: StepClient,
        documents_fit: dict[str, bool],
        tasks: Tasks,
        own_reward: Callable[[float, str, str], float] | None = None,
    ) -> None:
        self._tasks = tasks
        self._own_reward = own_reward
        self._documents_fit = documents_fit
        self._config = config
        self._sampling = sampling
        self._prompts = prompts
        self._history = history
        self._client = client
        self._tokenizer = client.tokenizer
        self._checks = Checks(config, sampling, prompts, client, tasks)

    async def play(self, attempt: Attempt) -> None:
        """Take an attempt from its question to the judgments of its answers.

        An error of our own code, or of the user's, is the attempt's outcome; the run goes on.

        Raises:
            UserError: the engines failed, or answered with other weights.
        """
        try:
            attempt.end(await self._play(attempt))
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, OwnCodeError):
                raise
            logger.exception("cluster %s (%s) failed and is left out", attempt.cluster.id, attempt.task)
            attempt.end(Outcome.ERROR)

    async def _play(self, attempt: Attempt) -> Outcome:
        question = await self._question(attempt)
        outcome = question if isinstance(question, Outcome) else await self._answers(attempt, question)
        if row := attempt.question:
            row.reward = question_reward(outcome, attempt.mean_reward, self._config.questioner)
            if outcome is Outcome.MIXED and self._own_reward:
                row.reward = self._own_reward(attempt.mean_reward, row.prediction or "", row.reference or "")
        return outcome

    # The questioner

    async def _question(self, attempt: Attempt) -> Question | Outcome:
        """A question that can be put to the responder; otherwise how the attempt ends."""
        if not self._config.questioner.enabled:
            return Question(attempt.task, attempt.cluster.question, attempt.cluster.answer)
        question = await self._ask(attempt)
        if isinstance(question, Outcome):
            return question
        return await self._checks.fault(attempt, question) or question

    async def _ask(self, attempt: Attempt) -> Question | Outcome:
        """The questioner's question, if its text is one; otherwise how the attempt ends."""
        task, cluster, config = attempt.task, attempt.cluster, self._config.questioner
        if cluster.id not in self._documents_fit:
            everything = range(len(cluster.documents))
            self._documents_fit[cluster.id] = self._fits(await self._responder_prompt(attempt, "", everything))
        if not self._documents_fit[cluster.id]:
            return Outcome.DOCUMENTS_TOO_LONG
        rng = random.Random(self._client.seed(attempt, "context", 0))
        entries = self._history.entries(task, cluster.id)
        attempt.remembered = len(entries)
        shown_again = () if config.history_documents == "none" else entries
        context = choose_context(rng, len(cluster.documents), config.new_documents, shown_again)
        letter = rng.choice(LETTERS) if task == "doc_mc" else None
        prompt = await self._questioner_prompt(attempt, context, entries, letter)
        if prompt is None:
            return Outcome.QUESTIONER_PROMPT_TOO_LONG
        (reply,) = await self._client.generate(attempt, "questioner", prompt, self._sampling.max_response_tokens)
        count = self._tokenizer.count
        question = self._tasks.question(task, reply.text, reply.truncated, count, config.max_reference_tokens)
        attempt.question = row = self._client.sample(attempt, "questioner", task, prompt, reply, attempt.context)
        if isinstance(question, Question):
            row.prediction, row.reference = question.text, question.reference
            if self._history.knows(task, cluster.id, question.text):
                return Outcome.REPEATED
        return question

    async def _questioner_prompt(
        self, attempt: Attempt, context: Sequence[int], entries: Sequence[Entry], letter: str | None
    ) -> Prompt | None:
        """The questioner's prompt over as many of the chosen documents as fit; None if not even one does.

        The documents that are shown become the attempt's context.
        """
        documents = attempt.cluster.documents
        while context:
            shown = [documents[index] for index in context]
            write = partial(self._prompts.questioner, attempt.task, shown, entries, letter)
            prompt = await self._client.prompt(write, shown)
            if self._fits(prompt):
                attempt.context = context
                return prompt
            excess = len(prompt.ids) - self._sampling.max_prompt_tokens
            count = lambda index: self._tokenizer.count(documents[index])  # noqa: E731
            kept = await self._client.in_thread(lambda: shorten_context(context, entries, excess, count))
            attempt.counts["context_documents_cut"] += len(context) - len(kept)
            context = kept
        return None

    def _fits(self, prompt: Prompt) -> bool:
        return len(prompt.ids) <= self._sampling.max_prompt_tokens

    # The responder

    async def _answers(self, attempt: Attempt, question: Question) -> Outcome:
        """The answers to a question, each with its judgments; how the attempt ends."""
        orders = self._orders(attempt)
        prompts = {order: await self._responder_prompt(attempt, question.text, order) for order in set(orders)}
        if not all(map(self._fits, prompts.values())):
            return Outcome.RESPONDER_PROMPT_TOO_LONG
        attempt.stage = "answers"
        # One request per answer, so that each is judged as soon as it ends.
        attempt.answers = await gather(
            self._answer(attempt, question, prompts[order], order, i) for i, order in enumerate(orders)
        )
        mean = attempt.mean_reward
        if attempt.question and admissible(mean, self._config.questioner):
            entries = self._history.entries(attempt.task, attempt.cluster.id)
            documents = remembered_documents(attempt.context, entries, self._config.questioner.history_documents)
            attempt.entry = Entry(documents, question.text, question.reference)
        if mixed([answer.reward for answer in attempt.answers]):
            return Outcome.MIXED
        for answer in attempt.answers:
            answer.routing = None  # nobody trains on them, and routings are large
        return Outcome.ALL_1 if mean > 0.5 else Outcome.ALL_0

    def _orders(self, attempt: Attempt) -> list[tuple[int, ...]]:
        """For each answer, the order in which it sees the documents."""
        everything = range(len(attempt.cluster.documents))
        if not self._config.responder.shuffle_documents:
            return [tuple(everything)] * self._config.group_size
        rng = random.Random(self._client.seed(attempt, "order", 0))
        return [tuple(rng.sample(everything, len(everything))) for _ in range(self._config.group_size)]

    async def _responder_prompt(self, attempt: Attempt, question: str, order: Sequence[int]) -> Prompt:
        documents = [attempt.cluster.documents[index] for index in order]
        return await self._client.prompt(partial(self._prompts.responder, attempt.task, question, documents), documents)

    async def _answer(
        self, attempt: Attempt, question: Question, prompt: Prompt, order: Sequence[int], index: int
    ) -> Sample:
        """One answer over all documents, in this order, and its judgments."""
        # Answers that share the prompt need its routing only once.
        (reply,) = await self._client.generate(
            attempt,
            "responder",
            prompt,
            self._sampling.max_response_tokens,
            index=index,
            prompt_routing=index == 0 or self._config.responder.shuffle_documents,
        )
        answer = self._client.sample(attempt, "responder", "", prompt, reply, order)
        answer.reference = question.reference
        answer.prediction = prediction = self._tasks.answer(attempt.task, reply.text, reply.truncated)
        answer.rule_score = rule = self._tasks.score(attempt.task, prediction, question.reference)
        verdict = None
        if self._config.verifier.enabled and prediction is not None:
            verdict = await self._judge(attempt, question, prediction, rule, index)
        answer.verdict = verdict
        answer.reward = responder_reward(rule, verdict)
        return answer

    # The verifier

    async def _judge(self, attempt: Attempt, question: Question, prediction: str, rule: int, index: int) -> int | None:
        """Judge one answer several times; returns the majority (None when too few judgments are valid)."""
        write = partial(self._prompts.verifier, question.text, prediction, question.reference)
        prompt = await self._client.prompt(write)
        if not self._fits(prompt):
            attempt.counts["verifier_prompt_too_long"] += 1
            return None
        limit = self._sampling.max_verdict_tokens or self._sampling.max_response_tokens
        replies = await self._client.generate(attempt, "verifier", prompt, limit, index=index, n=self._config.votes)
        votes = [parse_verdict(reply.text, reply.truncated) for reply in replies]
        verdict = majority(votes)
        rows = []
        for reply, vote, reward in zip(replies, votes, judgment_rewards(votes, verdict), strict=True):
            row = self._client.sample(attempt, "verifier", f"/{index}", prompt, reply)
            row.reward, row.verdict, row.rule_score = reward, vote, rule
            row.reference, row.prediction = question.reference, prediction
            rows.append(row)
        attempt.judgments.append(rows)
        attempt.counts.update(vote_counts(votes, verdict, rule))
        if trainable(votes, verdict, rule, self._config.verifier):
            attempt.trainable_judgments[index] = rows
        return verdict
