"""The verifier and the responder: votes, verdicts, and what they are worth.

Decided: brackets before words, words as wholes; strict majority of the valid votes, ties 0, no verdict with
fewer than half valid; the responder's reward is the maximum.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from spell_megatron.config.selfplay_sections import VerifierConfig
from spell_megatron.selfplay import parsing, rewards
from vectors.functions import function


def decide_vote(input: dict, expected: Any) -> Any:
    text = input.get("text", input.get("judge_output"))
    if "<think>" in text and "</think>" not in text:
        return -1
    text = text.rpartition("</think>")[2]
    yes, no = "[[YES]]" in text, "[[NO]]" in text
    if not yes and not no:
        found = re.split(r"\W+", text)
        yes, no = "YES" in found, "NO" in found
    return -1 if yes == no else int(yes)


@function("verifier.parse_decision", decide_vote)
def _(input: dict) -> Any:
    return parsing.parse_verdict(input["text"], truncated=False)


def judge_result(vote: int) -> dict[str, Any]:
    return {"judge_gpt": float(vote == 1), "judge_pred": {1: "YES", 0: "NO", -1: "INVALID"}[vote]}


@function("eval.judge_parse", lambda input, expected: judge_result(decide_vote(input, expected)))
def _(input: dict) -> Any:
    return judge_result(parsing.parse_verdict(input["judge_output"], truncated=False))


def decided_majority(votes: Sequence[int]) -> int:
    """The verdict; -1 for none."""
    valid = [vote for vote in votes if vote != -1]
    if len(valid) < len(votes) / 2:
        return -1
    return 1 if sum(valid) > len(valid) / 2 else 0


def decide_majority(input: dict, expected: Any) -> Any:
    return expected if isinstance(input["decisions"], str) else decided_majority(input["decisions"])


@function("verifier.majority", decide_majority)
def _(input: dict) -> Any:
    if isinstance(input["decisions"], str):  # the verifier was skipped: no votes
        return -100 if rewards.majority([]) is None else "a verdict without votes"
    verdict = rewards.majority(input["decisions"])
    return -1 if verdict is None else verdict


def decide_selection(input: dict, expected: Any) -> Any:
    votes, (low, high) = input["decisions"], input["bounds"]
    verdict = decided_majority(votes)
    valid = [vote for vote in votes if vote != -1]
    judge_rewards = [-1 if verdict == -1 or vote == -1 else int(vote == verdict) for vote in votes]
    kept = verdict != -1 and low <= valid.count(verdict) / len(valid) <= high
    if input["label"] == "maj_cons":
        kept = kept and verdict == input["rule_score"]
    kept_indices = list(range(len(votes))) if kept else []
    return {"majority": [verdict], "judge_rewards": judge_rewards, "kept_indices": kept_indices}


@function("verifier.training_selection", decide_selection)
def _(input: dict) -> Any:
    votes, (low, high) = input["decisions"], input["bounds"]
    strict = {"maj_cons": True, "maj": False}[input["label"]]
    config = VerifierConfig(agreement_low=low, agreement_high=high, require_rule_agreement=strict)
    verdict = rewards.majority(votes)
    kept = rewards.trainable(votes, verdict, input["rule_score"], config)
    return {
        "majority": [-1 if verdict is None else verdict],
        "judge_rewards": rewards.judgment_rewards(votes, verdict),
        "kept_indices": list(range(len(votes))) if kept else [],
    }


def decide_combination(input: dict, expected: Any) -> Any:
    return [max(rule, verdict, 0) for rule, verdict in zip(input["rule"], input["verifier"], strict=True)]


@function("responder.combine", decide_combination)
def _(input: dict) -> Any:
    pairs = zip(input["rule"], input["verifier"], strict=True)
    return [rewards.responder_reward(rule, None if verdict < 0 else verdict) for rule, verdict in pairs]
