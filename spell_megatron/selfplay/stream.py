"""The streaming roles: every cluster of documents advances alone, from question to judgments.

One step rolls out clusters until N groups have mixed outcomes. There is no barrier: a cluster's
judgments may run while another cluster still writes its question. What the step uses does not
depend on timing: its clusters are the shortest prefix of the sampler's stream that holds N mixed
groups, in the order of admission. Clusters beyond it were speculation; they are cancelled and given
back to the sampler. All randomness is derived from (run seed, step, place in the stream, cluster,
role, index), and the history is read as it was when the step began.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from spell_megatron.config.schema import SamplingConfig, SelfPlayConfig
from spell_megatron.errors import UserError
from spell_megatron.selfplay.advantages import assign_advantages
from spell_megatron.selfplay.batch import Group, Role, Sample, compose
from spell_megatron.selfplay.documents import Cluster, ClusterSampler, choose_context
from spell_megatron.selfplay.history import Entry, History
from spell_megatron.selfplay.parsing import Question, Rejection, parse_answer, parse_question, parse_verdict
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.rewards import (
    admissible,
    judgment_rewards,
    majority,
    mixed,
    questioner_reward,
    responder_reward,
    trainable,
)
from spell_megatron.selfplay.scoring import rule_score

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A step is given up when more than this share of its clusters (and more than this number) failed
# in our own code: one odd sample is counted and left out, a broken program is not.
MAX_ERROR_SHARE = 0.5
MIN_ERRORS = 20

# Outcomes of a cluster that end with a group of answers.
ANSWERED = ("mixed", "all_0", "all_1")
OUTCOMES = (
    *ANSWERED,
    "ungrounded",
    *(rejection.value for rejection in Rejection),
    "error",
    "questioner_prompt_too_long",
    "responder_prompt_too_long",
)
"""How an attempt at a question can end; `selfplay/rate/<outcome>` of the metrics add up to 1."""


class Completion(Protocol):
    """One sampled continuation, as `rollout.client` returns it."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str
    weight_version: str
    routing: np.ndarray | None


class Client(Protocol):
    """What the pipeline needs of the engines."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int,
        seed: int,
        max_tokens: int,
        affinity: str,
        prompt_routing: bool = True,
    ) -> list[Completion]: ...


class Tokenizer(Protocol):
    """What the pipeline needs of the policy's tokenizer."""

    def prompt_ids(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def count(self, text: str) -> int: ...


def derive_seed(*parts: object) -> int:
    """A 31-bit seed that depends on every part and on nothing else."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


@dataclass
class Attempt:
    """What became of one admitted cluster."""

    index: int
    cluster: Cluster
    task: str
    stage: str = "question"
    outcome: str = ""
    question: Sample | None = None
    context: Sequence[int] = ()  # the documents that the questioner was shown
    answers: list[Sample] = field(default_factory=list)
    judgments: list[list[Sample]] = field(default_factory=list)
    trainable_judgments: list[list[Sample]] = field(default_factory=list)
    entry: Entry | None = None
    remembered: int = 0  # questions on its cluster in the history
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def mixed(self) -> bool:
        return self.outcome == "mixed"

    @property
    def mean_reward(self) -> float:
        """Mean of the answers' rewards; 0 without answers."""
        return sum(answer.reward for answer in self.answers) / max(len(self.answers), 1)


@dataclass
class StepRollout:
    """All that one step rolled out.

    `batch` are the rows of the update with their advantages, `samples` every sample of the step's
    clusters, `clusters` the ids of those clusters in admission order, `metrics` flat named numbers.
    """

    # not part of the repr: that of an asyncio task has the repr of its result, and asyncio.Runner asks for it
    batch: list[Sample] = field(repr=False)
    samples: list[Sample] = field(repr=False)
    clusters: list[str]
    metrics: dict[str, float]


class MixedRate:
    """Estimates how likely a cluster in a given stage ends as a mixed group.

    It learns from clusters in the order of admission: failures end early, and counting them as they come
    would make the rate look low for as long as the others are still running. Only the amount of
    speculation depends on it, never what the step uses.
    """

    def __init__(self) -> None:
        # The prior stands for a few clusters of which half get mixed; it soon stops mattering.
        self.ended = {"question": 5.0, "answers": 5.0}
        self.passed = {"question": 3.5, "answers": 3.5}

    def record(self, stage: str, passed: bool) -> None:
        """Count a stage that ended: a question that is put to the responder, answers that are mixed."""
        self.ended[stage] += 1
        self.passed[stage] += passed

    def __call__(self, stage: str) -> float:
        rate = self.passed["answers"] / self.ended["answers"]
        return rate if stage == "answers" else rate * self.passed["question"] / self.ended["question"]

    def forget(self, keep: float = 0.5) -> None:
        """Weigh what was seen so far by `keep`, so that the estimate follows the policy."""
        for counts in (self.ended, self.passed):
            for stage in counts:
                counts[stage] *= keep


class SelfPlay:
    """The self-play of one run: sampler, history and the roles' prompts around one policy.

    The roles `untrained` play as the others do, but have no rows in the batch.
    """

    def __init__(
        self,
        config: SelfPlayConfig,
        sampling: SamplingConfig,
        prompts: PromptSet,
        tokenizer: Tokenizer,
        sampler: ClusterSampler,
        history: History,
        seed: int,
        untrained: Collection[Role] = (),
    ) -> None:
        self.config = config
        self.sampling = sampling
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.history = history
        self.seed = seed
        self.untrained = untrained
        self.rate = MixedRate()

    def state_dict(self) -> dict:
        """What a checkpoint must hold for identical next batches (JSON)."""
        return {"sampler": self.sampler.state_dict(), "history": self.history.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.history.load_state_dict(state["history"])

    async def roll_out(
        self,
        client: Client,
        step: int,
        weight_version: str,
        on_progress: Callable[[int, int], None] = lambda mixed_groups, admitted: None,
    ) -> StepRollout:
        """Roll out one step, update the history and move the sampler on.

        Raises:
            UserError: when the engines fail for good, or most clusters end in an error.
        """
        attempts, admitted = await self._stream(_StepClient(self, client, step, weight_version), on_progress)
        self.sampler.advance(len(attempts))
        solved = [attempt for attempt in attempts if attempt.entry is not None]
        entered = sum(self.history.admit(a.task, a.cluster.id, a.entry) for a in solved)
        self.rate.forget()
        batch = self._compose(attempts, step)
        metrics = self._metrics(attempts, batch, admitted)
        samples = [sample for attempt in attempts for sample in _samples(attempt)]
        metrics["history/entered"] = entered
        metrics["selfplay/generated_tokens"] = sum(len(sample.response_ids) for sample in samples)
        return StepRollout(batch, samples, [attempt.cluster.id for attempt in attempts], metrics)

    async def _stream(self, client: _StepClient, on_progress: Callable[[int, int], None]) -> tuple[list[Attempt], int]:
        """Run clusters until the finished prefix of the stream holds N mixed groups."""
        wanted = self.config.groups
        limit = self.config.max_rounds * self.config.clusters_per_round
        upcoming = self.sampler.upcoming()
        attempts: list[Attempt] = []
        running: dict[asyncio.Task[None], Attempt] = {}
        asked = 0  # the prefix whose questions have passed or failed
        used = mixed_used = 0  # the finished prefix, and the mixed groups in it
        try:
            while True:
                finished_mixed = sum(a.mixed for a in attempts)
                expected = finished_mixed + sum(self.rate(a.stage) for a in running.values())
                while expected < wanted and len(attempts) < limit:
                    attempt = Attempt(len(attempts), *next(upcoming))
                    attempts.append(attempt)
                    running[asyncio.create_task(self._play(attempt, client))] = attempt
                    expected += self.rate(attempt.stage)
                if not running:
                    break
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del running[task]
                    task.result()  # engine failures and programming errors end the step
                while asked < len(attempts) and (attempts[asked].outcome or attempts[asked].stage == "answers"):
                    self.rate.record("question", attempts[asked].stage == "answers")
                    asked += 1
                while used < len(attempts) and attempts[used].outcome and mixed_used < wanted:
                    if attempts[used].stage == "answers":
                        self.rate.record("answers", attempts[used].mixed)
                    mixed_used += attempts[used].mixed
                    used += 1
                self._refuse_broken(attempts)
                on_progress(min(sum(a.mixed for a in attempts), wanted), len(attempts))
                if mixed_used >= wanted:
                    break
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return attempts[:used], len(attempts)

    def _refuse_broken(self, attempts: Sequence[Attempt]) -> None:
        errors = sum(a.outcome == "error" for a in attempts)
        finished = sum(bool(a.outcome) for a in attempts)
        if errors >= MIN_ERRORS and errors > MAX_ERROR_SHARE * finished:
            raise UserError(
                f"{errors} of {finished} clusters of this step failed with an internal error, so the step was "
                "given up. The log holds the stack trace of each; the first usually tells the cause."
            )

    async def _play(self, attempt: Attempt, client: _StepClient) -> None:
        """Take one cluster through all roles. A fault of one sample is its outcome, not the run's."""
        try:
            attempt.outcome = await self._question(attempt, client)
        except (UserError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("cluster %s (%s) failed and is left out", attempt.cluster.id, attempt.task)
            attempt.outcome = "error"

    async def _question(self, attempt: Attempt, client: _StepClient) -> str:
        """A question, its answers and their judgments; returns the outcome's name."""
        task, cluster, config = attempt.task, attempt.cluster, self.config.questioner
        if config.enabled:
            question = await self._ask(attempt, client)
            if isinstance(question, str):
                return question
        else:
            question = Question(task, cluster.question, cluster.answer)
        prompt = self.prompts.responder(task, question.text, cluster.documents)
        prompt_ids = self.tokenizer.prompt_ids(prompt)
        if len(prompt_ids) > self.sampling.max_prompt_tokens:
            return "responder_prompt_too_long"
        attempt.stage = "answers"
        # One request per answer, so that each is judged as soon as it ends.
        answers = await _gather(
            self._answer(attempt, client, question, prompt, prompt_ids, i) for i in range(self.config.group_size)
        )
        attempt.answers = list(answers)
        mean = attempt.mean_reward
        if row := attempt.question:
            row.reward = questioner_reward(mean, config)
            if admissible(mean, config):
                attempt.entry = Entry(tuple(attempt.context), question.text, question.reference)
        if mixed([answer.reward for answer in answers]):
            return "mixed"
        if row:
            row.kind, row.reward = "zero_variance", 0.0
        for answer in answers:
            answer.routing = None  # nobody trains on them, and routings are large
        return "all_1" if mean > 0.5 else "all_0"

    async def _ask(self, attempt: Attempt, client: _StepClient) -> Question | str:
        """The questioner's question, if it can be used; otherwise the outcome's name."""
        task, cluster, config = attempt.task, attempt.cluster, self.config.questioner
        rng = random.Random(client.seed(attempt, "context", 0))
        entries = self.history.entries(task, cluster.id)
        attempt.remembered = len(entries)
        context = choose_context(rng, len(cluster.documents), config.new_documents, entries)
        letter = rng.choice("ABCD") if task == "doc_mc" else None
        prompt, prompt_ids, context = self._questioner_prompt(attempt, context, entries, letter)
        if prompt_ids is None:
            return "questioner_prompt_too_long"
        attempt.context = context
        completion = (await client.generate(attempt, "questioner", prompt_ids, self.sampling.max_response_tokens))[0]
        text = self.tokenizer.decode(completion.token_ids)
        truncated = completion.finish_reason == "length"
        question = parse_question(task, text, truncated, self.tokenizer.count, config.max_reference_tokens)
        attempt.question = row = client.sample(
            attempt, "questioner", f"{task}", prompt, prompt_ids, completion, text, documents=context
        )
        if isinstance(question, Rejection):
            if question.penalised:
                row.kind, row.reward = "bad_format", config.bad_format_reward
            return question.value
        row.prediction, row.reference = question.text, question.reference

        if self.config.grounding.enabled and await self._answered_without_documents(attempt, question, client):
            row.kind, row.reward = "bad_ground", config.ungrounded_reward
            return "ungrounded"
        return question

    def _questioner_prompt(
        self, attempt: Attempt, context: Sequence[int], entries: Sequence[Entry], letter: str | None
    ) -> tuple[str, list[int] | None, list[int]]:
        """The questioner's prompt over as many of the chosen documents as fit (None if not even one does).

        New documents go first when the prompt is too long, then older ones, always from the end.
        """
        documents = attempt.cluster.documents
        seen = {index for entry in entries for index in entry.documents}
        droppable = [i for i in context if i in seen] + [i for i in context if i not in seen]
        kept = sorted(context)
        while True:
            prompt = self.prompts.questioner(attempt.task, [documents[i] for i in kept], entries, letter)
            ids = self.tokenizer.prompt_ids(prompt)
            excess = len(ids) - self.sampling.max_prompt_tokens
            if excess <= 0:
                return prompt, ids, kept
            while excess > 0 and droppable:
                dropped = droppable.pop()
                kept.remove(dropped)
                attempt.counts["context_documents_cut"] += 1
                excess -= self.tokenizer.count(documents[dropped])
            if not kept:
                return prompt, None, kept

    async def _answered_without_documents(self, attempt: Attempt, question: Question, client: _StepClient) -> bool:
        """Whether the policy answers the question right with no documents before it.

        One right answer of a multiple-choice question proves nothing (a guess is right one time in
        four), so there the options are shown in several orders and most answers must be right.
        """
        config = self.config.grounding
        if attempt.task == "doc_mc":
            rng = random.Random(client.seed(attempt, "permutation", 0))
            variants = [question.permuted(rng.sample(range(4), 4)) for _ in range(config.mc_samples)]
        else:
            variants = [question] * config.samples
        right = await _gather(self._no_context_score(attempt, variant, client, i) for i, variant in enumerate(variants))
        attempt.counts["no_context_answers"] += len(right)
        attempt.counts["no_context_right"] += sum(right)
        return sum(right) > (config.mc_threshold * len(right) if attempt.task == "doc_mc" else 0.1)

    async def _no_context_score(self, attempt: Attempt, question: Question, client: _StepClient, index: int) -> int:
        limit = self.sampling.max_no_context_tokens or self.sampling.max_response_tokens
        prompt_ids = self.tokenizer.prompt_ids(self.prompts.responder(attempt.task, question.text, None))
        completion = (
            await client.generate(attempt, "no_context", prompt_ids, limit, index=index, prompt_routing=False)
        )[0]
        text = self.tokenizer.decode(completion.token_ids)
        prediction = parse_answer(attempt.task, text, completion.finish_reason == "length")
        return rule_score(attempt.task, prediction, question.reference)

    async def _answer(
        self,
        attempt: Attempt,
        client: _StepClient,
        question: Question,
        prompt: str,
        prompt_ids: list[int],
        index: int,
    ) -> Sample:
        """One answer over all documents, and its judgments."""
        task = attempt.task
        limit = self.sampling.max_response_tokens
        # Of a prompt that all answers share one routing is enough.
        completion = (
            await client.generate(attempt, "responder", prompt_ids, limit, index=index, prompt_routing=index == 0)
        )[0]
        text = self.tokenizer.decode(completion.token_ids)
        prediction = parse_answer(task, text, completion.finish_reason == "length")
        everything = range(len(attempt.cluster.documents))
        answer = client.sample(attempt, "responder", "", prompt, prompt_ids, completion, text, documents=everything)
        answer.reference, answer.prediction = question.reference, prediction
        rule = rule_score(task, prediction, question.reference)
        verdict = None
        if self.config.verifier.enabled and prediction is not None:
            verdict = await self._judge(attempt, client, question, prediction, rule, index)
        answer.rule_score, answer.verdict = rule, verdict
        answer.reward = responder_reward(rule, verdict)
        return answer

    async def _judge(
        self, attempt: Attempt, client: _StepClient, question: Question, prediction: str, rule: int, index: int
    ) -> int | None:
        """G judgments of one answer; returns the majority (None when too few are valid)."""
        prompt = self.prompts.verifier(question.text, prediction, question.reference)
        prompt_ids = self.tokenizer.prompt_ids(prompt)
        if len(prompt_ids) > self.sampling.max_prompt_tokens:
            attempt.counts["verifier_prompt_too_long"] += 1
            return None
        limit = self.sampling.max_verdict_tokens or self.sampling.max_response_tokens
        completions = await client.generate(attempt, "verifier", prompt_ids, limit, index=index, n=self.config.votes)
        texts = [self.tokenizer.decode(completion.token_ids) for completion in completions]
        votes = [parse_verdict(t, c.finish_reason == "length") for t, c in zip(texts, completions, strict=True)]
        verdict = majority(votes)
        rows = []
        rewards = judgment_rewards(votes, verdict)
        for completion, text, vote, reward in zip(completions, texts, votes, rewards, strict=True):
            row = client.sample(attempt, "verifier", f"/{index}", prompt, prompt_ids, completion, text)
            row.reward, row.verdict, row.rule_score = reward, vote, rule
            row.reference, row.prediction = question.reference, prediction
            rows.append(row)
        attempt.judgments.append(rows)
        yes, no = votes.count(1), votes.count(0)
        attempt.counts.update(
            {
                "votes": len(votes),
                "invalid_votes": votes.count(-1),
                "judged_answers": 1,
                "no_verdict": verdict is None,
                "tied_votes": yes == no and yes > 0,
                "unanimous_votes": max(yes, no) == len(votes),
                "verdict_against_rule": verdict is not None and verdict != rule,
                "right_by_verdict_only": verdict == 1 and rule == 0,
                "right_by_rule_only": verdict == 0 and rule == 1,
                "decisive_votes": 0 if verdict is None else yes + no,
                "agreeing_votes": 0 if verdict is None else votes.count(verdict),
            }
        )
        side = "right" if rule else "wrong"
        attempt.counts.update({f"yes_on_{side}": yes, f"valid_votes_on_{side}": yes + no})
        if trainable(votes, verdict, rule, self.config.verifier):
            attempt.trainable_judgments.append(rows)
        return verdict

    def _compose(self, attempts: Sequence[Attempt], step: int) -> list[Sample]:
        """The update's rows in a fixed order, with advantages."""
        # Answers are judged in any order; the batch must not depend on it.
        for attempt in attempts:
            attempt.judgments.sort(key=lambda rows: rows[0].group)
            attempt.trainable_judgments.sort(key=lambda rows: rows[0].group)
        groups = [Group(a.answers[0].uid, a.task, a.question, a.answers) for a in attempts if a.mixed]
        negatives = [a.question for a in attempts if a.question and a.question.kind != "good" and a.outcome != "error"]
        verifier_groups = [rows for a in attempts if a.outcome in ANSWERED for rows in a.trainable_judgments]
        rng = random.Random(derive_seed(self.seed, step, "batch"))
        batch = compose(groups, negatives, verifier_groups, self.config, rng)
        assign_advantages(batch, self.config.questioner.advantage_group)
        if self.config.shuffle_rewards:
            for role in ("questioner", "responder", "verifier"):
                rows = [sample for sample in batch if sample.role == role]
                advantages = rng.sample([row.advantage for row in rows], len(rows))
                for row, advantage in zip(rows, advantages, strict=True):
                    row.advantage = advantage
        return [sample for sample in batch if sample.role not in self.untrained]

    def _metrics(self, attempts: Sequence[Attempt], batch: Sequence[Sample], admitted: int) -> dict[str, float]:
        """Flat metrics: rates of every outcome per task, votes, history, the batch's make-up."""
        metrics: dict[str, float] = {
            "selfplay/clusters": len(attempts),
            "selfplay/surplus_clusters": admitted - len(attempts),
            "selfplay/mixed_groups": sum(a.mixed for a in attempts),
        }
        of_task = {t: [a for a in attempts if a.task == t] for t in self.config.tasks}
        for name, members in [("", attempts), *((f"{t}/", some) for t, some in of_task.items())]:
            metrics.update(_rates(f"selfplay/{name}", members))
        for role in ("questioner", "responder", "verifier"):
            rows = [sample for sample in batch if sample.role == role]
            metrics[f"batch/{role}/rows"] = len(rows)
            for key, values in (
                ("reward", [row.reward for row in rows]),
                ("response_tokens", [len(row.response_ids) for row in rows]),
                ("truncated", [float(row.truncated) for row in rows]),
            ):
                if values:
                    metrics[f"batch/{role}/{key}"] = sum(values) / len(values)
        depths = self.history.depths()
        metrics["history/clusters"] = len(depths)
        metrics["history/mean_depth"] = sum(depths) / len(depths) if depths else 0.0
        return metrics


class _StepClient:
    """The engines as one step sees them: derived seeds, one weight version, samples made of completions."""

    def __init__(self, selfplay: SelfPlay, client: Client, step: int, weight_version: str) -> None:
        self.selfplay = selfplay
        self.client = client
        self.step = step
        self.weight_version = weight_version

    def uid(self, attempt: Attempt) -> str:
        return f"{self.step}.{attempt.index}"

    def seed(self, attempt: Attempt, role: str, index: int) -> int:
        parts = (self.selfplay.seed, self.step, attempt.index, attempt.cluster.id, role, index)
        return derive_seed(*parts)

    async def generate(
        self,
        attempt: Attempt,
        role: str,
        prompt_ids: list[int],
        max_tokens: int,
        index: int = 0,
        n: int = 1,
        prompt_routing: bool = True,
    ) -> list[Completion]:
        completions = await self.client.generate(
            prompt_ids,
            n=n,
            seed=self.seed(attempt, role, index),
            max_tokens=max_tokens,
            affinity=attempt.cluster.id,
            prompt_routing=prompt_routing,
        )
        for completion in completions:
            if completion.weight_version != self.weight_version:
                raise UserError(
                    f"An engine answered with weights of version {completion.weight_version!r} in step {self.step}, "
                    f"which must use {self.weight_version!r}. Updates on mixed versions are refused; "
                    "make sure that no other run pushes weights to the same engines."
                )
        return completions

    def sample(
        self,
        attempt: Attempt,
        role: str,
        group: str,
        prompt: str,
        prompt_ids: list[int],
        completion: Completion,
        text: str,
        documents: Sequence[int] = (),
    ) -> Sample:
        """A sample with reward 0 and kind `good`; the caller fills in what it learns later.

        `group` is the task for the questioner; for the others it is what follows the question's uid.
        """
        uid = self.uid(attempt)
        return Sample(
            uid=uid,
            group=group if role == "questioner" else f"{uid}{group}",
            role=role,
            task=attempt.task,
            kind="good",
            cluster_id=attempt.cluster.id,
            prompt_ids=prompt_ids,
            response_ids=list(completion.token_ids),
            logprobs=list(completion.logprobs),
            weight_version=completion.weight_version,
            reward=0.0,
            prompt=prompt,
            response=text,
            document_ids=[attempt.cluster.document_ids[i] for i in documents],
            truncated=completion.finish_reason == "length",
            routing=completion.routing,
        )


def _samples(attempt: Attempt) -> list[Sample]:
    question = [attempt.question] if attempt.question else []
    return [*question, *attempt.answers, *(row for rows in attempt.judgments for row in rows)]


def _rates(prefix: str, attempts: Sequence[Attempt]) -> dict[str, float]:
    """Rates of the outcomes, and of what was counted on the way, among these clusters."""
    if not attempts:
        return {}
    outcomes = Counter(a.outcome for a in attempts)
    answers = [answer for a in attempts for answer in a.answers]
    rates = {f"{prefix}rate/{name}": outcomes[name] / len(attempts) for name in OUTCOMES}
    rates[f"{prefix}rate/valid"] = sum(outcomes[name] for name in (*ANSWERED, "ungrounded")) / len(attempts)
    rates[f"{prefix}history_depth"] = sum(a.remembered for a in attempts) / len(attempts)
    for role, rows in (
        ("questioner", [a.question for a in attempts if a.question]),
        ("responder", answers),
        ("verifier", [row for a in attempts for judgments in a.judgments for row in judgments]),
    ):
        if rows:
            rates[f"{prefix}{role}/reward"] = sum(row.reward for row in rows) / len(rows)
            rates[f"{prefix}{role}/prompt_tokens"] = sum(len(row.prompt_ids) for row in rows) / len(rows)
            rates[f"{prefix}{role}/response_tokens"] = sum(len(row.response_ids) for row in rows) / len(rows)
    if answers:
        rates[f"{prefix}reward"] = sum(answer.reward for answer in answers) / len(answers)
        rates[f"{prefix}rule_score"] = sum(answer.rule_score for answer in answers) / len(answers)
        rates[f"{prefix}rate/truncated_answers"] = sum(answer.truncated for answer in answers) / len(answers)
        rates[f"{prefix}rate/unparsed_answers"] = sum(a.prediction is None for a in answers) / len(answers)
    counts: Counter[str] = Counter()
    for attempt in attempts:
        counts.update(attempt.counts)
    for name, total in (
        ("invalid_votes", "votes"),
        ("tied_votes", "judged_answers"),
        ("unanimous_votes", "judged_answers"),
        ("no_verdict", "judged_answers"),
        ("verdict_against_rule", "judged_answers"),
        ("right_by_verdict_only", "judged_answers"),
        ("right_by_rule_only", "judged_answers"),
        ("agreeing_votes", "decisive_votes"),
        ("yes_on_right", "valid_votes_on_right"),
        ("yes_on_wrong", "valid_votes_on_wrong"),
        ("no_context_right", "no_context_answers"),
    ):
        if counts[total]:
            rates[f"{prefix}rate/{name}"] = counts[name] / counts[total]
    for name in ("context_documents_cut", "verifier_prompt_too_long"):
        rates[f"{prefix}count/{name}"] = counts[name]
    contexts = [len(a.question.document_ids) for a in attempts if a.question]
    if contexts:
        rates[f"{prefix}context_documents"] = sum(contexts) / len(contexts)
    return rates


async def _gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines together; when one fails, cancel the others and raise its error as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as failed:
        user_errors = [error for error in failed.exceptions if isinstance(error, UserError)]
        raise (user_errors or failed.exceptions)[0] from None
    return [task.result() for task in tasks]
