"""How an attempt at a question can end: one vocabulary for metrics, dumps, messages and the report."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path


class Outcome(StrEnum):
    """How an attempt at a question ends, for one cluster of documents.

    The metrics `selfplay/rate/<outcome>` of a step add up to 1.

    Attributes:
        meaning: a few words for people, which start in lower case.
        remedy: what to do when most attempts end like this; `{dumps}` stands for the folder of the rollout dumps.
    """

    meaning: str
    remedy: str

    def __new__(cls, value: str, meaning: str, remedy: str) -> Outcome:
        outcome = str.__new__(cls, value)
        outcome._value_ = value
        outcome.meaning = meaning
        outcome.remedy = remedy
        return outcome

    MIXED = (
        "mixed",
        "mixed: right and wrong answers",
        "Such questions are what a step needs: read them in {dumps}.",
    )
    ALL_0 = (
        "all_0",
        "all answers wrong",
        "The questions are too hard for the policy, or their references are wrong: read them in {dumps}.",
    )
    ALL_1 = (
        "all_1",
        "all answers right",
        "The questions are too easy for the policy: read them in {dumps}.",
    )
    UNGROUNDED = (
        "ungrounded",
        "answered without documents",
        "The policy answers its questions without the documents. Train on documents that it does not know.",
    )
    UNCONFIRMED = (
        "unconfirmed",
        "reference not confirmed",
        "The policy does not reach its own references from the documents that it asked about: read its questions in "
        "{dumps}. Show the questioner fewer documents, or lower selfplay.gate.threshold.",
    )
    REPEATED = (
        "repeated",
        "repeats a remembered question",
        "The questioner repeats the questions that its prompt shows: read them in {dumps}. Give it more documents, or "
        "set selfplay.questioner.history to 0.",
    )
    BAD_FORMAT = (
        "bad_format",
        "bad format",
        "The model does not follow the prompts of selfplay.prompts: read its questions in {dumps}.",
    )
    TRUNCATED = (
        "truncated",
        "cut off",
        "Raise rollout.sampling.max_response_tokens.",
    )
    ZERO_ANSWER = (
        "zero_answer",
        "reference is zero",
        "A question whose reference is 0 is not used: read the questions in {dumps}.",
    )
    UNPARSABLE_NUMBER = (
        "unparsable_number",
        "reference is no number",
        "The documents may hold too few numbers: give docmath_qa a smaller share in selfplay.tasks.",
    )
    LONG_REFERENCE = (
        "long_reference",
        "reference too long",
        "Raise selfplay.questioner.max_reference_tokens.",
    )
    ERROR = (
        "error",
        "internal error",
        "logs/train.log in the run's folder holds the stack trace of each error.",
    )
    QUESTIONER_PROMPT_TOO_LONG = (
        "questioner_prompt_too_long",
        "questioner's prompt too long",
        "Raise rollout.sampling.max_prompt_tokens, or prepare shorter documents.",
    )
    DOCUMENTS_TOO_LONG = (
        "documents_too_long",
        "documents too long to ask about",
        "Raise rollout.sampling.max_prompt_tokens, or prepare smaller clusters.",
    )
    RESPONDER_PROMPT_TOO_LONG = (
        "responder_prompt_too_long",
        "responder's prompt too long",
        "Raise rollout.sampling.max_prompt_tokens, or prepare smaller clusters.",
    )

    @property
    def answered(self) -> bool:
        """Whether the question was put to the responder, so that there is a group of answers."""
        return self in (Outcome.MIXED, Outcome.ALL_0, Outcome.ALL_1)

    @property
    def valid(self) -> bool:
        """Whether the questioner's text was a usable question."""
        return self.answered or self in (Outcome.UNGROUNDED, Outcome.UNCONFIRMED)

    @property
    def negative(self) -> bool:
        """Whether the question has a reward that is not positive, and may be trained on to make it less likely."""
        return self in (
            Outcome.BAD_FORMAT,
            Outcome.UNGROUNDED,
            Outcome.UNCONFIRMED,
            Outcome.REPEATED,
            Outcome.ALL_0,
            Outcome.ALL_1,
        )

    @property
    def dropped(self) -> bool:
        """Whether nothing of the attempt is trained on, and nothing is penalised."""
        return self is not Outcome.MIXED and not self.negative


YES_APART = 0.1
"""A verifier that judges says YES to right answers more often than to wrong ones, by at least this share."""

CANNOT_JUDGE = (
    "A model that cannot judge needs selfplay.verifier.enabled: false. One that could at first needs an earlier "
    "checkpoint, and verifier: 0 in training.role_weights, so that judging is not trained."
)
"""What to do about a verifier that says the same of right and wrong answers."""


def remedy_for(rates: Mapping[str, float], dumps: Path | str) -> str:
    """What to do when too few attempts end mixed, or none.

    Args:
        rates: values of the metrics `selfplay/rate/...`, by what follows.
        dumps: the folder of the rollout dumps.
    """
    if _all_right_by_verdict(rates):
        return (
            f"The verifier says YES to {rates['yes_on_wrong']:.0%} of the answers that the rule check finds wrong, so "
            f"nearly all answers count as right. {CANNOT_JUDGE}"
        )
    return max(Outcome, key=lambda outcome: rates.get(outcome, 0.0)).remedy.format(dumps=dumps)


def _all_right_by_verdict(rates: Mapping[str, float]) -> bool:
    """Whether groups are all right because of a verifier that says YES to right and wrong answers alike.

    Then hardly any group can be mixed, whatever becomes of most attempts before.
    """
    apart = rates.get("yes_on_right", 1.0) - rates.get("yes_on_wrong", 0.0)
    more_right = rates.get(Outcome.ALL_1, 0.0) > rates.get(Outcome.ALL_0, 0.0)
    return more_right and apart < YES_APART and rates.get("right_by_verdict_only", 0.0) > 0.1


def why_empty(metrics: Mapping[str, float], dumps: Path) -> str:
    """Why a step has nothing to train on, and what to do about it.

    Args:
        metrics: of the step, as `StepRollout.metrics` holds them.
        dumps: the folder of the rollout dumps.
    """
    prefix = "selfplay/rate/"
    rates = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    ends = sorted((outcome for outcome in Outcome if rates.get(outcome)), key=lambda outcome: -rates[outcome])
    text = "no question had both right and wrong answers: nothing to train on, the update is left out"
    if not ends:
        return f"{text}."
    shares = ", ".join(f"{rates[outcome]:.0%} {outcome.meaning}" for outcome in ends[:3])
    return f"{text} ({metrics['selfplay/clusters']:.0f} tried: {shares}). {remedy_for(rates, dumps)}"
