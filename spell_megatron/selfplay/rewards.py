"""Votes and rewards of the three roles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spell_megatron.config.selfplay_sections import QuestionerConfig, VerifierConfig
from spell_megatron.selfplay.outcomes import Outcome


def majority(votes: Sequence[int]) -> int | None:
    """Verdict over one answer: 1 if more than half of the valid votes say so, else 0.

    `votes` are 1, 0 or -1 (invalid). None, no verdict, if fewer than half of the votes are valid or
    there are no votes.
    """
    yes, no = votes.count(1), votes.count(0)
    if not votes or 2 * (yes + no) < len(votes):
        return None
    return int(yes > no)


def judgment_rewards(votes: Sequence[int], majority: int | None) -> list[float]:
    """Reward of each judgment: 1 for agreeing with the verdict, 0 for not, -1 for an invalid vote.

    Without a verdict all get -1 (such a group is never trained on).
    """
    return [-1.0 if majority is None or vote < 0 else float(vote == majority) for vote in votes]


def trainable(votes: Sequence[int], majority: int | None, rule_score: int, config: VerifierConfig) -> bool:
    """Whether the judgments of one answer are worth training on.

    The share of valid votes for the verdict must lie in the configured band (unanimous votes teach
    nothing, close ones are doubtful), and the verdict must agree with the rule check if required.
    A single vote has none to agree with, so only the rule check is asked.
    """
    if majority is None:
        return False
    agreement = votes.count(majority) / (votes.count(1) + votes.count(0))
    if len(votes) > 1 and not config.agreement_low <= agreement <= config.agreement_high:
        return False
    return majority == rule_score or not config.require_rule_agreement


def responder_reward(rule: int, majority: int | None) -> float:
    """Reward of an answer: right by the rule check or by the verdict (paper, section 3)."""
    return float(max(rule, majority or 0))


def questioner_reward(mean: float, config: QuestionerConfig) -> float:
    """Reward of a question whose answers have this mean reward, in [0, 1].

    0 if all answers are right or all wrong. Otherwise the Gaussian exp(-(mean - mu)^2 / (2 sigma^2)),
    1 - mean (Absolute Zero), 1 - 2 |mean - 1/2| (R-Zero) or exp(-(v - 1/4)^2 / (2 * 0.01)) of the variance
    v = mean (1 - mean) (SPICE).
    """
    if not 0 < mean < 1:
        return 0.0
    if config.reward == "azr":
        return 1 - mean
    if config.reward == "r_zero":
        return 1 - 2 * abs(mean - 0.5)
    if config.reward == "variance":
        return math.exp(-((mean * (1 - mean) - 0.25) ** 2) / (2 * 0.01))
    return math.exp(-((mean - config.mu) ** 2) / (2 * config.sigma**2))


def question_reward(outcome: Outcome, mean: float, config: QuestionerConfig) -> float:
    """Reward of a question whose attempt ended so; `mean` is the mean reward of its answers, if it has any."""
    if outcome is Outcome.BAD_FORMAT:
        return config.bad_format_reward
    if outcome is Outcome.UNGROUNDED:
        return config.ungrounded_reward
    if outcome is Outcome.UNCONFIRMED:
        return config.unconfirmed_reward
    return questioner_reward(mean, config) if outcome.answered else 0.0


def admissible(mean: float, config: QuestionerConfig) -> bool:
    """Whether a question whose answers have this mean reward may enter the history."""
    return config.history_low < mean < config.history_high


def mixed(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards differ, so that it has advantages to learn from."""
    return min(rewards) < max(rewards)
