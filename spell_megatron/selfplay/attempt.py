"""One attempt at a question: a cluster of documents, and what the roles made of it so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from spell_megatron.selfplay.batch import Sample
from spell_megatron.selfplay.documents import Cluster
from spell_megatron.selfplay.history import Entry
from spell_megatron.selfplay.outcomes import Outcome

Stage = Literal["question", "answers"]


@dataclass
class Attempt:
    """What became of one admitted cluster.

    Attributes:
        index: its place among the step's clusters, in the order of admission.
        stage: `question` until the question is put to the responder.
        outcome: how it ended; None while it is under way.
        context: indices of the documents that the questioner was shown.
        judgments: the judgments of each answer that was judged.
        trainable_judgments: the same, of those answers whose judgments may be trained on, by the answer's number.
        entry: what the history shall remember of it.
        remembered: number of questions on its cluster in the history.
        counts: what `metrics` makes rates of.
    """

    index: int
    cluster: Cluster
    task: str
    stage: Stage = "question"
    outcome: Outcome | None = None
    question: Sample | None = None
    context: Sequence[int] = ()
    answers: list[Sample] = field(default_factory=list)
    judgments: list[list[Sample]] = field(default_factory=list)
    trainable_judgments: dict[int, list[Sample]] = field(default_factory=dict)
    entry: Entry | None = None
    remembered: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def end(self, outcome: Outcome) -> None:
        """Note how the attempt ended, in each of its samples too."""
        self.outcome = outcome
        # Answers are judged in any order; what the step returns must not depend on it.
        self.judgments.sort(key=lambda rows: rows[0].group)
        for sample in self.samples:
            sample.outcome = outcome

    @property
    def ended(self) -> bool:
        return self.outcome is not None

    @property
    def mixed(self) -> bool:
        return self.outcome is Outcome.MIXED

    @property
    def mean_reward(self) -> float:
        """Mean of the answers' rewards; 0 without answers."""
        return sum(answer.reward for answer in self.answers) / max(len(self.answers), 1)

    @property
    def samples(self) -> list[Sample]:
        """The question, then the answers, then the judgments."""
        question = [self.question] if self.question else []
        return [*question, *self.answers, *(row for rows in self.judgments for row in rows)]
