"""The ends of an attempt, and what a step without rows says about them."""

from pathlib import Path

import pytest

from spell_megatron.selfplay.outcomes import Outcome, remedy_for, why_empty

DUMPS = Path("runs/first/rollouts")


def test_names_are_those_of_metrics_and_dumps():
    assert [str(outcome) for outcome in Outcome] == [
        "mixed", "all_0", "all_1", "ungrounded", "unconfirmed", "repeated", "bad_format", "truncated",
        "zero_answer", "unparsable_number", "long_reference", "error", "questioner_prompt_too_long",
        "documents_too_long", "responder_prompt_too_long",
    ]  # fmt: skip
    assert Outcome("all_0") is Outcome.ALL_0 and f"{Outcome.ALL_0}" == "all_0"


def test_every_outcome_has_a_meaning_of_its_own_and_a_remedy():
    assert len({outcome.meaning for outcome in Outcome}) == len(Outcome)
    assert all(outcome.remedy.format(dumps=DUMPS).endswith(".") for outcome in Outcome)


def test_an_outcome_is_mixed_or_negative_or_dropped():
    for outcome in Outcome:
        assert (outcome is Outcome.MIXED) + outcome.negative + outcome.dropped == 1
        assert outcome.valid or not outcome.answered


def test_an_empty_step_names_the_three_most_frequent_ends_and_the_remedy_of_the_first():
    rates = {"bad_format": 0.5, "truncated": 0.25, "all_0": 0.15, "ungrounded": 0.1}
    metrics = {f"selfplay/rate/{outcome}": rate for outcome, rate in rates.items()} | {"selfplay/clusters": 20}
    text = why_empty(metrics, DUMPS)
    assert "(20 tried: 50% bad format, 25% cut off, 15% all answers wrong)" in text
    assert text.endswith(f"read its questions in {DUMPS}.")
    assert why_empty({}, DUMPS).endswith("the update is left out.")


SAYS_YES = {
    "unconfirmed": 0.6,
    "bad_format": 0.3,
    "all_1": 0.1,
    "yes_on_right": 0.92,
    "yes_on_wrong": 0.96,
    "right_by_verdict_only": 0.6,
}
"""A step of SmolLM2 whose verifier has learned to say YES: behind the gate, few questions are answered at all."""


def test_an_empty_step_names_a_verifier_that_says_yes_to_everything():
    metrics = {f"selfplay/rate/{name}": rate for name, rate in SAYS_YES.items()} | {"selfplay/clusters": 150}
    text = why_empty(metrics, DUMPS)
    assert "(150 tried: 60% reference not confirmed, 30% bad format, 10% all answers right)" in text
    assert "The verifier says YES to 96% of the answers that the rule check finds wrong" in text
    assert "selfplay.verifier.enabled: false" in text and "training.role_weights" in text
    assert "selfplay.gate" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"yes_on_wrong": 0.5},
        {"right_by_verdict_only": 0.05},
        {"all_0": 0.2, "unconfirmed": 0.4},
        {"yes_on_right": 0.05, "yes_on_wrong": 0.0, "right_by_verdict_only": 0.0},
    ],
    ids=["it judges", "the rule finds nearly all right", "most groups are all wrong", "it says no to everything"],
)
def test_other_verifiers_are_not_blamed(changes):
    assert "verifier" not in remedy_for(SAYS_YES | changes, DUMPS)


def test_a_verifier_is_blamed_where_the_rule_finds_no_answer_right():
    rates = {name: rate for name, rate in SAYS_YES.items() if name != "yes_on_right"}
    assert "YES to 96%" in remedy_for(rates | {"right_by_verdict_only": 1.0}, DUMPS)


def test_questions_are_too_easy_without_a_verifier():
    assert "too easy" in remedy_for({"all_1": 0.9, "all_0": 0.1}, DUMPS)
