"""The rows of an update: samples of all roles in the right proportions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.selfplay.outcomes import Outcome

Role = Literal["questioner", "responder", "verifier"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass
class Sample:
    """One completion of one role: what the trainer needs, then what people want to read.

    Attributes:
        uid: names the attempt at a question that the sample belongs to.
        group: names the samples that it is compared with.
        logprobs: the engine's log-probabilities of `response_ids`.
        outcome: how the attempt ended; None while it is under way.
        gate: share of the answers in the gate that reach a question's reference; None if it was not checked.
        routing: the experts to which the engine sent the tokens before the last, as many as it returned: integers
            [tokens, layers, experts per token]. None without experts.
    """

    uid: str
    group: str
    role: Role
    task: str
    cluster_id: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    logprobs: Sequence[float]
    weight_version: str
    reward: float
    advantage: float = 0.0
    outcome: Outcome | None = None
    prompt: str = ""
    response: str = ""
    reference: str | None = None
    prediction: str | None = None
    rule_score: float | None = None
    verdict: float | None = None
    gate: float | None = None
    document_ids: list[str] = field(default_factory=list)
    truncated: bool = False
    routing: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass
class Group:
    """A question (None: no questioner wrote it) whose answers were not all right or all wrong."""

    uid: str
    task: str
    question: Sample | None
    answers: list[Sample]


def compose(
    groups: Sequence[Group],
    negatives: Sequence[Sample],
    verifier_groups: Sequence[Sequence[Sample]],
    config: SelfPlayConfig,
    rng: random.Random,
) -> list[Sample]:
    """Put an update batch together.

    It holds the answers of the first N groups and their questions; as many negatives, which are questions without a
    positive reward (times `negatives_per_positive`), drawn task by task; and the first groups of judgments.
    """
    groups = groups[: config.groups]
    answers = [answer for group in groups for answer in group.answers]
    questions = [group.question for group in groups if group.question]
    judgments = [row for rows in verifier_groups[: judgment_groups(len(answers), config)] for row in rows]
    return [*answers, *questions, *_draw_negatives(questions, negatives, config, rng), *judgments]


def judgment_groups(answers: int, config: SelfPlayConfig) -> int:
    """How many groups of judgments are trained on beside so many answers, if there are enough."""
    return int(answers * config.verifier.share / config.votes)


def _draw_negatives(
    questions: Sequence[Sample], negatives: Sequence[Sample], config: SelfPlayConfig, rng: random.Random
) -> list[Sample]:
    """Draw negatives in proportion to the positives of each task, the most frequent task first.

    What one task lacks, the next one makes up. Tasks without positives give no negatives.
    """
    positives = Counter(question.task for question in questions)
    drawn: list[Sample] = []
    quota = 0.0
    for task, count in positives.most_common():
        quota += config.negatives_per_positive * count
        candidates = [sample for sample in negatives if sample.task == task]
        chosen = rng.sample(range(len(candidates)), min(len(candidates), int(quota)))
        drawn += [candidates[i] for i in sorted(chosen)]
        quota -= len(chosen)
    return drawn
